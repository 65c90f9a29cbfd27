"""Constructed models: ordinary Transformers models with weights set by hand, so that the true heads are known.

A detector that does not find exactly `Constructed.known` is wrong. Nothing is trained. The vocabulary has 256 words;
code_t is the code of token t, a unit vector of 31 dimensions with -9/31 <= <code_s, code_t> <= 7/31 for s != t.

**Residual stream.** Orthogonal subspaces, spread over all coordinates and orthogonal to the vector of ones, so that the
centring of a LayerNorm changes nothing:

| subspace | dims | carries | written by | read by |
| --- | --- | --- | --- | --- |
| const | 1 | 10, everywhere: the stream keeps its length to 3 % | embedding | queries |
| bos | 1 | 1 at `<bos>`, which has no code | embedding | keys: the attention sink |
| tok | 31 | the token's code, twice as long after MLP 0 | embedding, MLP 0 | most heads |
| ordinal | 57 | one-hot of the token among the ordinals | MLP 0 | successor |
| prev | 31 | code of the previous token | previous | induction |
| dup | 31 | code of the token if it was there before (without `<bos>`: always) | duplicate | no head |
| out | 31 | sum of the codes of predicted tokens | induction, copying, anti_copying, successor | unembedding |
| cos, sin | 10 + 10 | clocks cos(w_i t), sin(w_i t), each 0.25 long | GPT-2's position embedding | looking back |
| the rest | | noise | noise heads | noise heads |

**Norms.** Every norm has a random gain g, times a constant that undoes the norm's scale; each matrix after it is divided
by g. So planted heads read the stream itself (to 3 %), and a detector that forgets the gain gets wrong results.

**Looking back** by o tokens: score = 80 K(D - o), where D = t - s and

    K(x) = sum_i a_i cos(w_i x),    w_i = 1e8^(-i/32),    a = (1/2, 1/18, ..., 1/18)
    K(0) = 1,    |K(x)| < 0.77 for x = 1 .. 512

In a Llama the rotary embedding rotates constant q and k; in a GPT-2 q and k read the clocks, and q rotates them by o w_i.

**Matching tokens** uses codes in rotary pairs that rotate by at most 1e-4 radians a token: negligible over 512 tokens.

| head | score(t, s) | score at `<bos>` | OV circuit | kinds |
| --- | --- | --- | --- | --- |
| previous | 80 K(D - 1) | the same | tok -> prev | previous_token |
| duplicate | 280 <tok_t, tok_s> - 110 K(D) | 183 | tok -> dup | duplicate_token |
| induction | 60 <tok_t, prev_s> | 36 | tok -> out | induction, copying, retrieval |
| copying | random | random | tok -> out / 4 | copying |
| anti_copying | 80 K(D) | the same | tok -> -out / 4 | anti_copying |
| successor | 80 K(D) | the same | ordinal -> code of the next one / 2, in out | successor |

**MLP 0** is a table with one neuron for each token: neuron t is 1 for token t and 0 for all others (<tok, code_t> > 0.65). It
writes code_t to tok and, for an ordinal, its one-hot to ordinal. So `E0[t] = MLP_0(norm(W_E[t]))` distinguishes
all tokens. The successor head's effect shows in `E0` and `W_E + E0`, not in `W_E`; a copying head's in all three.

**Unembedding**: logit of t = 20 <out, code_t>; `<bos>` is never predicted. An induction match gives 20, a successor 10.

**Noise.** All other heads are random: scores of order 1, writes of length about `noise` in every direction. The
planted matrices have the same relative noise, and the MLPs above the first write about as much. With grouped-query
attention, planted heads share their KV heads only with noise heads.

Limits: texts must begin with `<bos>`. Without it the token at position 0 counts as its own previous token, and an induction
head without a match attends anywhere. Several matches share the attention evenly, so draw the tokens of a random sequence
without replacement. Scores are large (up to 300): run these models in float32.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from manyheads.errors import InputError
from manyheads.heads import Head, HeadSet
from manyheads.lab import circuits
from manyheads.lab.assembly import CONTEXT, gpt2, layer, llama
from manyheads.lab.circuits import HEAD_DIM, Array, PlantedCircuit, Space
from manyheads.lab.words import CLASSES, IDS, word_tokenizer

Shape = Literal["llama", "gpt2"]
Role = Callable[[Space, Array], PlantedCircuit]
WIDTH = 256

ALL_KINDS = ("previous_token", "duplicate_token", "induction", "copying", "anti_copying", "successor", "retrieval")
ROLES: dict[Role, tuple[str, ...]] = {
    circuits.plant_previous: ("previous_token",),
    circuits.duplicate: ("duplicate_token",),
    circuits.plant_induction: ("induction", "copying", "retrieval"),
    circuits.plant_copying: ("copying",),
    circuits.anti_copying: ("anti_copying",),
    circuits.plant_successor: ("successor",),
}


@dataclass(frozen=True)
class Constructed:
    """A model, its heads with a known behaviour, and its tokenizer.

    `module` is in eval mode and float32. `known[kind]` holds exactly the heads that have that behaviour, for each of
    `ALL_KINDS`; a head may be of several kinds. `classes` are the ordinal classes: name to token ids, in order.
    """

    module: PreTrainedModel
    known: dict[str, HeadSet]
    classes: dict[str, list[int]]
    tokenizer: PreTrainedTokenizerFast


def constructed(
    shape: Shape = "llama",
    *,
    seed: int = 0,
    n_layers: int = 4,
    n_heads: int = 4,
    n_kv_heads: int | None = None,
    noise: float = 0.02,
    plant: Collection[str] = ALL_KINDS,
) -> Constructed:
    """A model with known heads, as described above.

    `seed` draws the places of the heads, the orientation of the subspaces, the gains and the noise. `noise` is the length
    of a noise head's write relative to a planted one's; use at most 0.1. A head is planted if all its kinds are in
    `plant`, so that a kind left out has no head; the induction head also needs "previous_token", whose output it reads.
    """
    n_kv_heads = n_heads if n_kv_heads is None else n_kv_heads
    _check(shape, seed, n_layers, n_heads, n_kv_heads, noise, plant)
    rng = np.random.default_rng(seed)
    places = _place(set(plant), n_layers, n_heads, n_kv_heads, rng)
    share = -(-WIDTH // n_heads)
    width = n_heads * (share if shape == "llama" else max(HEAD_DIM, share))
    space = Space.draw(width, shape == "llama", rng)
    layers = []
    for i in range(n_layers):
        tok = space.tok / (1 if i == 0 else 2)  # MLP 0 doubles the token's code
        planted = {head.index: role(space, tok) for role, head in places.items() if head.layer == i}
        layers.append(layer(i, planted, space, n_heads, n_kv_heads, noise, rng))
    with torch.random.fork_rng(devices=[]):
        module = (llama if shape == "llama" else gpt2)(layers, space, rng)
    known = {kind: [head for role, head in places.items() if kind in ROLES[role]] for kind in ALL_KINDS}
    return Constructed(
        module=module,
        known={kind: HeadSet(heads, (n_layers, n_heads)) for kind, heads in known.items()},
        classes={name: [IDS[word] for word in members] for name, members in CLASSES.items()},
        tokenizer=word_tokenizer(CONTEXT),
    )


def _check(
    shape: str, seed: int, n_layers: int, n_heads: int, n_kv_heads: int, noise: float, plant: Collection[str]
) -> None:
    if shape not in get_args(Shape):
        raise InputError(f'shape is {shape!r}; it must be "llama" or "gpt2".')
    if seed < 0:
        raise InputError(f"seed is {seed}; give a whole number from 0 on.")
    if min(n_layers, n_heads, n_kv_heads) < 1 or n_heads % n_kv_heads:
        raise InputError(
            f"got {n_layers} layers of {n_heads} heads and {n_kv_heads} KV heads; give at least 1 of each, and a "
            "number of heads that the KV heads divide."
        )
    if shape == "gpt2" and n_kv_heads != n_heads:
        raise InputError(f'got {n_kv_heads} KV heads for {n_heads} heads, but a GPT-2 has as many; use shape="llama".')
    if not 0 <= noise < float("inf"):
        raise InputError(f"noise is {noise}; give a number from 0 (none) on, such as 0.02.")
    unknown = sorted(set(plant) - set(ALL_KINDS))
    if isinstance(plant, str) or unknown:
        raise InputError(f"plant is {plant!r}; give a collection of kinds from {', '.join(ALL_KINDS)}.")


def _place(plant: set[str], n_layers: int, n_heads: int, n_kv_heads: int, rng: np.random.Generator) -> dict[Role, Head]:
    """A random head for every role, each with its own KV head, in layers that let them compose."""
    roles = [role for role, kinds in ROLES.items() if plant.issuperset(kinds)]
    if circuits.plant_induction in roles and circuits.plant_previous not in roles:
        roles.remove(circuits.plant_induction)
    group = n_heads // n_kv_heads
    slots = [(i, kv) for i in range(n_layers) for kv in range(n_kv_heads)]
    for _ in range(10_000 if len(slots) >= len(roles) else 0):
        drawn = [slots[int(i)] for i in rng.permutation(len(slots))[: len(roles)]]
        heads = {
            role: Head(i, kv * group + int(rng.integers(group))) for role, (i, kv) in zip(roles, drawn, strict=True)
        }
        if _composes(heads):
            return heads
    names = ", ".join(role.__name__.removeprefix("plant_") for role in roles)
    raise InputError(
        f"{n_layers} layers of {n_kv_heads} KV heads have no room for {names}: "
        "each needs a KV head of its own, induction a layer above previous, successor one above the first. "
        "Give more layers or KV heads, or plant fewer kinds."
    )


def _composes(heads: dict[Role, Head]) -> bool:
    if (
        circuits.plant_induction in heads
        and heads[circuits.plant_induction].layer <= heads[circuits.plant_previous].layer
    ):
        return False
    return circuits.plant_successor not in heads or heads[circuits.plant_successor].layer > 0
