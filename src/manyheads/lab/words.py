"""The 256 words that constructed models know: special tokens, four ordinal classes, and filler words."""

from __future__ import annotations

from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedTokenizerFast

BOS, UNK, PAD = SPECIALS = ("<bos>", "<unk>", "<pad>")

CLASSES = {
    "days": "Monday Tuesday Wednesday Thursday Friday Saturday Sunday".split(),
    "months": "January February March April May June July August September October November December".split(),
    "numbers": "one two three four five six seven eight nine ten eleven twelve".split(),
    "letters": list("ABCDEFGHIJKLMNOPQRSTUVWXYZ"),
}

FILLERS = """
. , : ; ? ! - the a an and or but of in on at to from with by for is are was were be has had not this that it he she
we they you who what where when why how here there then next after before now today yes no Mary John Anna Tom Alice
Bob Emma Jack Sarah David Laura Peter Lucy Mark Julia Paul Kate Simon Nina Adam red blue green yellow black white
brown pink grey gold cup pen lamp ring key clock box basket bottle candle coin drum flag fork guitar hammer hat kettle
ladder mirror needle pencil phone piano plate rope scarf shoe spoon sword table ticket towel umbrella vase violin
wallet watch park store school garden library market station museum office kitchen beach forest village castle bridge
farm small large old new bright heavy quiet simple famous gentle warm cold round tall saw found moved carried liked
passed followed made took gave secret word code answer question list letter number day month year city name house door
window road river hill tree bird horse dog cat fish bread water sun moon song story apple milk king
""".split()

WORDS = [*SPECIALS, *(word for members in CLASSES.values() for word in members), *FILLERS]
IDS = {word: i for i, word in enumerate(WORDS)}


def word_tokenizer(model_max_length: int) -> PreTrainedTokenizerFast:
    """One token for each word, split at spaces and punctuation; other words become `<unk>`; every text begins with `<bos>`."""
    tokenizer = Tokenizer(WordLevel(IDS, unk_token=UNK))
    tokenizer.pre_tokenizer = Whitespace()
    tokenizer.post_processor = TemplateProcessing(single=f"{BOS} $A", special_tokens=[(BOS, IDS[BOS])])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=BOS,
        unk_token=UNK,
        pad_token=PAD,
        padding_side="left",
        model_max_length=model_max_length,
        clean_up_tokenization_spaces=False,
    )
