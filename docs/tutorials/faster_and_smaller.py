# %% [markdown]
# # Generate faster, remember less
#
# Two things that need no training. *Speculative decoding* guesses several tokens and checks them in one pass: the
# text stays the same. A *press* lets a KV cache (the keys and values of earlier tokens) forget what matters least:
# the memory is freed.

# %%
import manyheads as mh
from manyheads.draft.drafters.prompt_lookup import PromptLookup

model = mh.open_model()
prompt = "red cat seven lamp Paris green box red cat seven lamp Paris green box red cat"

# %% [markdown]
# **Faster.** Prompt lookup guesses that the text goes on as it did before. The model keeps the guesses that it
# agrees with.

# %%
plain = model.generate(prompt, max_new_tokens=24)
drafted = mh.draft.generate(model, PromptLookup(), [prompt], max_new_tokens=24)
print("the same text:", drafted.text[0] == plain)
print(f"{drafted.tally.tokens_a_pass:.1f} tokens a pass instead of 1")

# %% [markdown]
# **Smaller.** With SnapKV each head keeps the half of the tokens that the end of the prompt attends to most.

# %%
from manyheads.shrink.cache.press import Press
from manyheads.shrink.cache.snapkv import SnapKV

text = "The secret word of Mary is lamp. " + "The red cat sat on the green mat. " * 12
for press in (Press(), SnapKV(compression_ratio=0.5)):
    with press(model) as block:
        model.generate(text, max_new_tokens=1)
        print(f"{type(press).__name__}: {block.nbytes / 1024:.0f} KiB of keys and values")

# %% [markdown]
# **What does it cost?** `manyheads shrink` measures loss, tasks, memory and time of several methods beside the
# model as it is:
#
# ```
# manyheads shrink ladon --method duo,snapkv --ratio 0.5 --lengths 256 --out smaller
# ```
