# %% [markdown]
# # Find heads, and prove that they matter
#
# A Transformers model has layers, and each layer has several *attention heads*. A head looks back at earlier tokens
# and copies something of what it finds. Here we ask which heads continue text that occurred before (*induction
# heads*), and test the answer.
#
# It takes half a minute on the small model that comes with the package. Put a hub id in its place for your own.

# %%
import manyheads as mh

model = mh.open_model()  # or mh.open_model("HuggingFaceTB/SmolLM2-135M-Instruct")
print(model.n_layers, "layers of", model.n_heads, "heads")

# %% [markdown]
# **Scores.** The score of a head is the share of its attention that goes to the token after the last occurrence of
# the current token, on random tokens that stand twice. 0 is none, 1 is all.

# %%
scores = mh.atlas.induction(model, n=16)
for head, score in scores.ranked()[:5]:
    print(head, f"{score:.2f}")
heads = scores.above(0.4)
print("found:", heads)

# %% [markdown]
# **Does the model need them?** A score says where a head looks, not what it is good for. So we *ablate* the heads
# (their output becomes zero) and look at what the model loses. Any heads would cost something. So the same is done
# with 20 random sets of heads of the same layers. *p* is the share of sets that cost as much; with 20 sets it is
# never below 1/21 = 0.048.

# %%
check = mh.atlas.causal_check(model, "induction", heads, mh.atlas.repeats_judge(model))
print(f"lost without them: {check.effect:.1f} nats a token")
print(f"lost without random heads: {check.random_mean:.1f}")
print(f"p = {check.p_value:.3f}")

# %% [markdown]
# **What it looks like.** Without the heads the model cannot repeat the words any more. The edit ends with the
# block.

# %%
prompt = "red cat seven lamp Paris red cat seven lamp"
print("with them:", model.generate(prompt, max_new_tokens=2))
with model.editing(mh.Ablate(heads)):
    print("without:", model.generate(prompt, max_new_tokens=2))

# %% [markdown]
# **Everything at once.** A survey scores all behaviours, checks each one, and writes a page. On the command line:
#
# ```
# manyheads atlas ladon --out atlas
# ```
