# %% [markdown]
# # Explain one answer, change it, keep the change
#
# Who gets the camera? The model answers "Eric". We ask which heads made that answer, switch one of them off, and
# save the change as a file and as an ordinary checkpoint.

# %%
import tempfile
from pathlib import Path

import manyheads as mh

model = mh.open_model()
prompt = "When Rachel and Eric went to the garden, Rachel gave a camera to"
print(model.generate(prompt, max_new_tokens=1))

# %% [markdown]
# **Which components wrote the answer?** Every head (`L3H7`: layer 3, head 7) and every MLP (`M5`: layer 5) adds
# something to the *logits*, the scores from which the next token is chosen. The parts below sum to the difference
# between the logits of Eric and Rachel.

# %%
found = mh.explain(model, prompt, "Eric", "Rachel")
print(f"difference: {found.difference:.2f} logits")
print(found.to_frame().head(5))

# %% [markdown]
# **What did the strongest head read?** For each head of the explanation, its part is split by the tokens that it
# attended to.

# %%
head, parts = next(iter(found.sources.items()))
print(
    head, [(token, round(float(part), 2)) for token, part in zip(found.tokens, parts, strict=True) if abs(part) > 0.1]
)

# %% [markdown]
# **Would the answer miss it?** What a head writes is one question, what is lost without it is another: other heads
# may step in. So here each head is replaced by its mean over the prompt, and the layers above it are computed
# again.

# %%
missed = mh.explain(model, prompt, "Eric", "Rachel", method="ablation").to_frame()
print(missed.head(3))
head = missed["node"].iloc[0]

# %% [markdown]
# **Turn it up and down.** `Scale(heads, 0.0)` switches heads off, 0.5 halves what they write, -1 turns it round.
# The edit ends with the block.

# %%
eric, rachel = (model.tokenizer(f" {name}").input_ids[-1] for name in ("Eric", "Rachel"))
for factor in (1.0, 0.5, 0.0, -1.0):
    with model.editing(mh.Scale([head], factor)):
        logits = model.logits(prompt)[0, -1]
    print(f"{head} times {factor:4}: {float(logits[eric] - logits[rachel]):.2f} logits")

# %% [markdown]
# **Keep it.** A head edit is a small file. Baked into the weights it is a checkpoint that Transformers loads
# without manyheads.

# %%
from manyheads.model.editing.head_edit import HeadEdit

folder = Path(tempfile.mkdtemp())
edit = HeadEdit.of(model, mh.Scale([head], 0.0), method="by hand", found="the head that one answer misses most")
edit.save(folder / "edit")
with model.editing(*HeadEdit.load(folder / "edit").edits()):
    edited = model.logits(prompt)

baked = model.bake(mh.Scale([head], 0.0))
baked.save_pretrained(folder / "checkpoint")
print("baked equals edited:", bool((baked.logits(prompt) - edited).abs().max() < 1e-3))
