"""What ladon reads: text and code that ship with Python, and generated documents of every task family's train split."""

from __future__ import annotations

import ast
import random
import re
import sysconfig
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from manyheads import tasks
from manyheads.tasks import lexicon
from manyheads.tasks.base import of_split
from manyheads.tasks.families import choice, needle, successor
from manyheads.tasks.families.by_example import RELATIONS as WORD_RELATIONS
from manyheads.tasks.families.facts import RELATIONS

Segment = tuple[str, float]  # a piece of text and the weight of its tokens in the loss
ANSWER, PROMPT, HAY = 4.0, 0.25, 0.05

# Shares of the training tokens, and the step each mixture starts at. Copying has to form before recall can be learnt, and
# reading backwards (what came before a word) before binding; what is learnt needs little afterwards.
EARLY = {
    "real": 0.14,
    "repeated tokens": 0.12,
    "repeat": 0.12,
    "backwards": 0.04,
    "successor": 0.06,
    "needle": 0.08,
    "ioi": 0.05,
    "coloured_objects": 0.05,
    "facts": 0.06,
    "counterfactual": 0.04,
    "arithmetic": 0.06,
    "choice": 0.05,
    "greater_than": 0.02,
    "docstring": 0.03,
    "by_example": 0.05,
    "refusal": 0.01,
    "words": 0.06,
    "stories": 0.05,
}
MIDDLE = EARLY | {
    "real": 0.10,
    "repeated tokens": 0.05,
    "repeat": 0.03,
    "backwards": 0.10,
    "coloured_objects": 0.08,
    "arithmetic": 0.12,
    "choice": 0.10,
    "words": 0.10,
}
LATE = MIDDLE | {
    "real": 0.08,
    "backwards": 0.02,
    "needle": 0.03,
    "ioi": 0.03,
    "coloured_objects": 0.02,
    "counterfactual": 0.02,
    "arithmetic": 0.25,
    "choice": 0.20,
    "greater_than": 0.01,
    "docstring": 0.01,
    "by_example": 0.02,
    "successor": 0.05,
    "facts": 0.05,
    "words": 0.08,
    "stories": 0.04,
}
LAST = LATE | {"arithmetic": 0.11, "choice": 0.27, "by_example": 0.07, "successor": 0.07, "words": 0.15}
PHASES = {0: EARLY, 2500: MIDDLE, 5500: LATE, 7900: LAST}
# family -> most examples in one document
EXAMPLES = {"arithmetic": 16, "facts": 8, "successor": 8, "greater_than": 6, "choice": 4, "refusal": 5}
SHORT, LONG = (16, 256), (6, 640)  # rows and tokens of a batch
LONG_FROM, LONG_SHARE = 2500, 0.3  # long batches come from this step on
CHUNK = 64  # steps generated together


# --- text that ships with Python ---


def real_texts() -> Iterator[str]:
    """Docstrings (English), sources (code) and the language reference's topics."""
    from pydoc_data.topics import topics

    yield from topics.values()
    library = Path(sysconfig.get_paths()["stdlib"])
    skipped = {"site-packages", "test", "tests", "idlelib", "lib2to3", "turtledemo", "pydoc_data", "encodings"}
    for path in sorted(library.rglob("*.py")):
        if skipped & set(path.relative_to(library).parts):
            continue
        source = path.read_text(encoding="utf-8", errors="ignore")
        try:
            nodes = list(ast.walk(ast.parse(source)))
        except SyntaxError:
            continue
        kinds = (ast.Module, ast.ClassDef, ast.FunctionDef)
        docs = [doc for node in nodes if isinstance(node, kinds) and (doc := ast.get_docstring(node)) and len(doc) > 60]
        if docs:
            yield "\n\n".join(docs)
        yield source


# --- tokenizer ---


def train_tokenizer(vocabulary: int = 4096) -> PreTrainedTokenizerFast:
    """Byte-level BPE in which every lexicon word (after a space), number to 100 and two-digit group is one token."""
    tokenizer = Tokenizer(models.BPE())
    pieces = r"'(?:s|t|re|ve|m|ll|d)| ?100(?!\p{N})| ?\p{N}{1,2}| ?\p{L}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(pieces), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=["<s>", "</s>", "<pad>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    words = lexicon.every_word()
    known = [" " + word for word in words] + [f"{i:02d}" for i in range(100)]
    known += [" " + word for template in (*tasks.greater_than.EVENTS, "Sure", "Sorry") for word in template.split()]
    known += [f" {i:02d}" for i in range(10)]

    def stream() -> Iterator[str]:
        yield from real_texts()
        for word in known:
            yield "\n".join([word] * 30_000)
        rng = random.Random(0)
        for family in GENERATORS:
            for _ in range(300):
                yield "".join(text for text, _ in GENERATORS[family](rng, 200))

    tokenizer.train_from_iterator(stream(), trainer)
    split = [word for word in known if len(tokenizer.encode(word).ids) != 1]
    if split:
        raise SystemExit(f"{len(split)} words are not single tokens, such as {split[:10]}; raise the vocabulary.")
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
        clean_up_tokenization_spaces=False,
        model_max_length=1024,
    )


# --- generated documents ---


def task_document(name: str) -> Callable[[random.Random, int], list[Segment]]:
    """Documents of one or more examples of a family, one a line, the answers weighted."""
    prompt_weight = {"by_example": 1.0, "successor": 0.5}.get(name, PROMPT)

    def document(rng: random.Random, room: int) -> list[Segment]:
        task = tasks.TASKS[name]
        if name == "by_example":
            task = tasks.ByExample(shots=rng.randint(2, 6))
        if name == "counterfactual" and rng.random() < 0.15:
            return conflict(rng)
        if name == "arithmetic" and rng.random() < 0.1:
            return place_values(rng)
        if name == "choice" and rng.random() < 0.4:
            return eased_choice(rng)
        segments: list[Segment] = []
        stop = 0.0 if name == "successor" else PROMPT  # where a list stops must not tell which item is held out
        for _ in range(rng.randint(1, EXAMPLES.get(name, 3))):
            if name == "successor" and rng.random() < 0.4:
                task = tasks.Successor(kind="number")
            elif name == "successor":
                task = tasks.TASKS[name]
            example = task.draw(rng, "train")
            segments += [(example.prompt, prompt_weight), (example.answer, ANSWER)]
            segments += [(example.continuation, PROMPT)] if example.continuation else []
            segments += [("\n", stop)]
        return segments

    return document


def conflict(rng: random.Random) -> list[Segment]:
    """An unmarked contradiction, answered by the context or from memory, by chance: both sources stay in play."""
    example = tasks.Counterfactual(form="bare").draw(rng, "train")
    answer = example.answer if rng.random() < 0.5 else example.foil or ""
    return [(example.prompt, PROMPT), (answer, 1.0), (".\n", PROMPT)]


def needle_document(rng: random.Random, room: int) -> list[Segment]:
    """One haystack with up to four needles, and a question for each of them."""
    longest = max(40, min(room, 560) - 60)
    shortest = 20 if longest < 200 else rng.choice([20, longest - 60])
    task = tasks.Needle(
        shortest=shortest,
        longest=rng.randint(shortest, longest),
        words=rng.choice([1, 1, 2, 3]),
        rivals=rng.randint(0, 3),
    )
    example = task.draw(rng, "train")
    segments = [(example.prompt, HAY), (example.answer, ANSWER), (example.continuation, 1.0)]
    statement, question = next(
        (statement, question)
        for statement, question in needle.KINDS.values()
        if example.prompt.endswith(question.split("{")[1].split("}")[1]) and question.split("{")[0] in example.prompt
    )
    pattern = re.escape(statement).replace(r"\{key\}", r"([A-Z][a-z]+)").replace(r"\{needle\}", r"([a-z ]+)")
    asked = example.prompt[slice(*example.spans["query"])]
    facts = [(name, words) for name, words in re.findall(pattern, example.prompt) if name != asked]
    rng.shuffle(facts)
    for name, words in facts:
        first, *rest = words.split()
        segments += [(" " + question.format(query=name), HAY), (" " + first, ANSWER)]
        segments += [("".join(" " + word for word in rest) + ".", 1.0)]
    return segments


def repeat_document(rng: random.Random, room: int) -> list[Segment]:
    pool = of_split("repeat", lexicon.WORDS, "train")
    words = rng.sample(pool, rng.randint(3, rng.choice([10, 30, min(60, room // 4)])))
    separator = rng.choice([" ", ", "])
    text = separator.join(words)
    first = rng.choice(["", "List: "]) + text
    return [(first, HAY)] + [(separator.rstrip() + " " + text, 2.0)] * rng.randint(1, 3)


LINKS = ["", "", " is", " ->", ":", "? A:", " is the", "?\nAnswer:"]  # between a word and what it is answered with


def backwards_document(rng: random.Random, room: int) -> list[Segment]:
    """Lists read backwards and pairs turned round: what came before a word, which repeats do not teach."""
    words = rng.sample(lexicon.every_word(), 2 * rng.randint(2, rng.choice([4, 8, 16])))
    if rng.random() < 0.5:
        segments = [("List: " + " ".join(words) + ".", HAY), (" Backwards: " + words[-1], HAY)]
        return [*segments, ("".join(" " + word for word in words[-2::-1]), 2.0), (".\n", PROMPT)]
    pairs = list(zip(words[::2], words[1::2], strict=True))
    segments = [("Pairs: " + ", ".join(f"{a} {b}" for a, b in pairs) + ". Turned:", HAY)]
    link = rng.choice(LINKS)
    for a, b in rng.sample(pairs, len(pairs)):
        segments += [(" " + b + link, HAY), (" " + a, ANSWER), (",", HAY)]
    return [*segments, ("\n", HAY)]


def words_document(rng: random.Random, room: int) -> list[Segment]:
    """Dictionary lines, encyclopedia lines and small talk, in which every word occurs, held out elsewhere or not."""
    segments: list[Segment] = []
    cast, props = rng.sample(lexicon.NAMES, 2), rng.sample(lexicon.OBJECTS, 2)
    for _ in range(rng.randint(4, 10)):
        line = rng.choices([dictionary, category, encyclopedia, calendar, verdict], [6, 1, 2, 2, 4])[0]
        segments += line(rng) if rng.random() < 0.9 else [(needle.filler(rng, cast, props), 0.5)]
        segments += [("\n", HAY)]
    return segments


def dictionary(rng: random.Random) -> list[Segment]:
    relation = rng.choice(list(WORD_RELATIONS))
    table = WORD_RELATIONS[relation]
    word = rng.choice(list(table))
    named = {"plural": "plural", "french": "French word", "spanish": "Spanish word", "opposite": "opposite"}[relation]
    forms = [f"The {named} for {word} is", f"The {named} of {word} is", f"{named.capitalize()}: {word} ->"]
    if rng.random() < 0.7:
        return [(rng.choice([*forms, f"{named} * {word}:"]), PROMPT), (" " + table[word], ANSWER)]
    page: list[Segment] = [(f"Page of the {named}:", PROMPT)]
    for one in rng.sample(list(table), rng.randint(2, 6)):
        page += [(f" {one} =", PROMPT), (" " + table[one], ANSWER), (";", PROMPT)]
    return page


def category(rng: random.Random) -> list[Segment]:
    kind = rng.choice(list(choice.CATEGORIES))
    item = rng.choice(choice.CATEGORIES[kind])
    return [(f"The word {item} is", PROMPT), (" " + kind, 1.0), (".", PROMPT)]


def verdict(rng: random.Random) -> list[Segment]:
    """A statement of what something is, and whether it is true."""
    true = rng.random() < 0.5
    if rng.random() < 0.5:
        kind, other = rng.sample(list(choice.CATEGORIES), 2)
        item = rng.choice(choice.CATEGORIES[kind])
        statement = f"{item} is {kind if true else other}"
    else:
        relation = RELATIONS[rng.choice(choice.ASKED)]
        subject, other = rng.sample(list(relation.table), 2)
        true = true or relation.table[other] == relation.table[subject]
        statement = f"{relation.question.format(subject=subject)} {relation.table[subject if true else other]}"
    return [(f"True or false: {statement}?", PROMPT), (" true" if true else " false", ANSWER)]


def encyclopedia(rng: random.Random) -> list[Segment]:
    table, parts = rng.choice(
        [
            (lexicon.COUNTRIES, ("capital", "language", "continent", "currency")),
            (lexicon.COUNTRIES, ("capital", "language", "continent", "currency")),
            (lexicon.ANIMALS, ("young", "sound")),
            ({maker: (home,) for maker, home in lexicon.MAKERS.items()}, ("home",)),
        ]
    )
    subject = rng.choice(list(table))
    segments: list[Segment] = [(f"{rng.choice(['About', 'Entry:'])} {subject}:", PROMPT)]
    for part, value in rng.sample(list(zip(parts, table[subject], strict=True)), len(parts)):
        segments += [(f" {part}", PROMPT), (" " + value, ANSWER), (";", PROMPT)]
    return segments


def calendar(rng: random.Random) -> list[Segment]:
    """What follows what, in forms the successor task does not have."""
    kind = rng.choice([*successor.KINDS, "number"])
    items = successor.KINDS[kind]
    i = rng.randrange(len(items) if kind in successor.CYCLIC else len(items) - 1)
    a, b = items[i], items[(i + 1) % len(items)]
    form = rng.randrange(3)
    if form == 0:
        return [(f"Right after {a} there is", PROMPT), (" " + b, ANSWER)]
    if form == 1:
        return [(f"Right before {b} there is", PROMPT), (" " + a, ANSWER)]
    run = [
        items[(i + j) % len(items)] for j in range(rng.randint(3, 8)) if kind in successor.CYCLIC or i + j < len(items)
    ]
    return [("Row: " + run[0], PROMPT), ("".join(f" | {item}" for item in run[1:]), 1.0)]


def place_values(rng: random.Random) -> list[Segment]:
    """`37 is 30 and 7`: what the tokens of numbers are made of."""
    segments: list[Segment] = []
    for _ in range(rng.randint(4, 12)):
        number = rng.randint(0, 100)
        tens, ones = number // 10 * 10, number % 10
        parts = [(" " + str(tens), 2.0), (" and", HAY), (" " + str(ones), 2.0)]
        if rng.random() < 0.5:
            segments += [(f"{number} is", PROMPT), *parts, ("\n", HAY)]
        else:
            segments += [(f"{tens} and {ones} is", PROMPT), (f" {number}", 2.0), ("\n", HAY)]
    return segments


def eased_choice(rng: random.Random) -> list[Segment]:
    """Multiple choice with a verdict after every option, or with the answer in words before them."""
    segments: list[Segment] = []
    judged = rng.random() < 0.6
    for _ in range(rng.randint(1, 3)):
        example = tasks.TASKS["choice"].draw(rng, "train")
        question, *options, last = example.prompt.split("\n")
        segments += [(question, PROMPT)]
        if not judged:
            segments += [
                (" It is", HAY),
                (" " + example.prompt[slice(*example.spans["option"])], ANSWER / 2),
                (".", HAY),
            ]
        for option in options:
            segments += [("\n" + option, HAY)]
            right = option[0] == example.answer[1]
            if judged:
                segments += [(" true", 2 * ANSWER) if right else (" false", ANSWER / 2)]
        segments += [("\n" + last, HAY), (example.answer, ANSWER), ("\n", HAY)]
    return segments


def story_document(rng: random.Random, room: int) -> list[Segment]:
    """Who has what, who said what, which letter stands for what: copying and binding, with every name and thing."""
    names, things = rng.sample(lexicon.NAMES, 4), rng.sample(lexicon.OBJECTS, 4)
    colours = rng.sample(lexicon.COLOURS, 4)
    segments: list[Segment] = []
    kind = rng.randrange(5)
    if kind == 0:  # owners
        for name, thing in zip(names, things, strict=True):
            segments += [(f" {name} has the {thing}.", PROMPT)]
        for i in rng.sample(range(4), 4):
            asked, given = (f" The {things[i]} belongs to", names[i]), (f" {names[i]} owns the", things[i])
            text, answer = rng.choice([asked, given])
            segments += [(text, PROMPT), (" " + answer, ANSWER), (".", PROMPT)]
    elif kind == 1:  # a conversation of two
        first, second = names[:2]
        for _ in range(rng.randint(2, 4)):
            word = rng.choice(["hello", "goodbye", "thank you", "yes", "no"])
            segments += [(f" {first}", 1.0), (f" said {word} to", PROMPT), (f" {second}", ANSWER if segments else 0.0)]
            segments += [(".", PROMPT)]
            first, second = second, first
    elif kind == 2:  # a roster, called again
        roster = rng.sample(lexicon.NAMES, rng.randint(3, 12))
        text = ", ".join(roster)
        segments += [("Names: " + text + ".", HAY), (" Again: " + roster[0], PROMPT)]
        segments += [("".join(f", {name}" for name in roster[1:]), 2.0), (".", PROMPT)]
    elif kind == 3:  # letters for words
        words = rng.sample(lexicon.every_word(), 4)
        segments += [("".join(f"{letter}. {word}\n" for letter, word in zip("ABCD", words, strict=True)), HAY)]
        lead, link = rng.choice([("Which of these is ", "?\nAnswer:"), *(("The word ", one) for one in LINKS)])
        for i in rng.sample(range(4), 4):
            segments += [(lead + words[i] + link, PROMPT), (" " + "ABCD"[i], ANSWER), ("\n", PROMPT)]
    else:  # colours of things
        things = rng.sample(of_split("coloured_objects", lexicon.OBJECTS, "train"), 4)
        for thing, colour in zip(things, colours, strict=True):
            segments += [(f" The {colour} {thing} was there.", PROMPT)]
        for i in rng.sample(range(4), 4):
            asked, given = (f" The {things[i]} looked", colours[i]), (f" The {colours[i]} one was the", things[i])
            text, answer = rng.choice([asked, given])
            segments += [(text, PROMPT), (" " + answer, ANSWER), (".", PROMPT)]
    return [*segments, ("\n", PROMPT)]


GENERATORS: dict[str, Callable[[random.Random, int], list[Segment]]] = {
    name: task_document(name) for name in tasks.TASKS if name not in ("needle", "repeat")
} | {
    "needle": needle_document,
    "repeat": repeat_document,
    "words": words_document,
    "backwards": backwards_document,
    "stories": story_document,
}


# --- packed batches ---


@dataclass
class Reader:
    """Packs documents into rows; chunk `k` of a seed is always the same."""

    tokenizer: Tokenizer
    corpus: np.ndarray  # ids of the real texts, end to end
    seed: int
    counts: dict[str, int] = field(default_factory=dict)

    def chunk(self, number: int) -> list[tuple[np.ndarray, np.ndarray]]:
        """`CHUNK` batches of (ids, weights)."""
        rng = random.Random(f"{self.seed}/{number}")
        self.mixture = next(PHASES[start] for start in sorted(PHASES, reverse=True) if number * CHUNK >= start)
        self.counts = dict.fromkeys(self.mixture, 0)
        self.pools: dict[tuple[str, int], list[tuple[list[int], list[float]]]] = {}
        batches = []
        for step in range(number * CHUNK, (number + 1) * CHUNK):
            long = step >= LONG_FROM and rng.random() < LONG_SHARE
            rows, length = LONG if long else SHORT
            packed = [self._row(rng, length) for _ in range(rows)]
            batches.append((np.stack([p[0] for p in packed]), np.stack([p[1] for p in packed])))
        return batches

    def _row(self, rng: random.Random, length: int) -> tuple[np.ndarray, np.ndarray]:
        ids: list[int] = [0] if rng.random() < 0.3 else []
        weights: list[float] = [0.0] * len(ids)
        while len(ids) < length:
            room = length - len(ids)
            family = self._family(rng, starts=len(ids) <= 1 and length > SHORT[1])
            if family == "real":
                more, weight = self._real(rng, min(room, rng.randint(64, 256)))
            elif family == "repeated tokens":
                more, weight = self._repeated(rng, room)
            else:
                more, weight = self._generated(rng, family, length)
            if len(more) > room:
                family = "real"
                more, weight = self._real(rng, room)
            self.counts[family] += len(more)
            ids += more
            weights += weight
        return np.array(ids[:length], np.uint16), np.array(weights[:length], np.float16)

    def _family(self, rng: random.Random, starts: bool) -> str:
        """A family that lags behind its share, by chance; long rows often open with a needle."""
        if starts and rng.random() < 0.6:
            return "needle"
        total = sum(self.counts.values()) + 4000
        lag = [max(share * total - self.counts[name], 0.002 * total) for name, share in self.mixture.items()]
        return rng.choices(list(self.mixture), lag)[0]

    def _real(self, rng: random.Random, length: int) -> tuple[list[int], list[float]]:
        start = rng.randrange(len(self.corpus) - length)
        return self.corpus[start : start + length].tolist(), [1.0] * length

    def _repeated(self, rng: random.Random, room: int) -> tuple[list[int], list[float]]:
        length = rng.randint(4, max(5, min(rng.choice([12, 40, 120, 300]), (room - 1) // 2)))
        block = rng.sample(range(3, self.tokenizer.get_vocab_size()), length)
        copies = max(2, min(5, (room - 1) // length))
        return block * copies + [1], [0.0] * length + [0.7] * (length * (copies - 1)) + [0.1]

    def _generated(self, rng: random.Random, family: str, length: int) -> tuple[list[int], list[float]]:
        pool = self.pools.setdefault((family, length), [])
        if not pool:
            documents = [GENERATORS[family](rng, length) for _ in range(32)]
            encoded = iter(self.tokenizer.encode_batch_fast([text for document in documents for text, _ in document]))
            for document in documents:
                ids: list[int] = []
                weights: list[float] = []
                for _, weight in document:
                    piece = next(encoded).ids
                    ids += piece
                    weights += [weight] * len(piece)
                pool.append(([*ids, 1], [*weights, PROMPT]))
        return pool.pop()


_reader: Reader | None = None


def _open(folder: str, seed: int) -> None:
    global _reader
    tokenizer = Tokenizer.from_file(f"{folder}/tokenizer/tokenizer.json")
    _reader = Reader(tokenizer, np.load(f"{folder}/corpus.npy"), seed)


def _chunk(number: int) -> list[tuple[np.ndarray, np.ndarray]]:
    assert _reader is not None
    return _reader.chunk(number)


class Batches:
    """`batches(i)` is batch `i`; the chunks ahead are generated by one other process."""

    def __init__(self, folder: Path, seed: int) -> None:
        self.pool = ProcessPoolExecutor(1, initializer=_open, initargs=(str(folder), seed))
        self.chunks: dict[int, Future[list[tuple[np.ndarray, np.ndarray]]]] = {}

    def __call__(self, number: int) -> dict[str, Tensor]:
        wanted = number // CHUNK
        for k in (wanted, wanted + 1):
            if k not in self.chunks:
                self.chunks[k] = self.pool.submit(_chunk, k)
        self.chunks = {k: chunk for k, chunk in self.chunks.items() if k >= wanted}
        ids, weights = self.chunks[wanted].result()[number % CHUNK]
        return {
            "input_ids": torch.from_numpy(ids.astype(np.int64)),
            "weights": torch.from_numpy(weights.astype(np.float32)),
        }
