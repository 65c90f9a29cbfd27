"""GPT-2s set by hand whose circuits are known: indirect objects, two tasks that share heads, and a weak inhibition.

The residual stream is cut into named subspaces of orthonormal directions, all at right angles to the vector of ones. A constant
of length 30 in one of them keeps every LayerNorm's denominator the same to a fraction of a percent: heads read the stream itself.
"""

from dataclasses import dataclass

import numpy as np
import torch
from transformers import GPT2Config, GPT2LMHeadModel

import manyheads as mh
from manyheads.tasks import Example, TaskBatch

CONST = 30.0


class Stream:
    """Named subspaces: `stream[name]` are their directions, `[n, D]`; `one` reads 1 off every token."""

    def __init__(self, width, sizes, seed=0):
        self.width = width
        rng = np.random.default_rng(seed)
        total = sum(sizes.values()) + 1
        start = np.concatenate([np.ones((width, 1)), rng.standard_normal((width, total))], 1)
        basis = np.linalg.qr(start)[0].T[1:]
        self.const, rest = basis[:1], basis[1:]
        cuts = np.cumsum(list(sizes.values()))[:-1]
        self._spaces = dict(zip(sizes, np.split(rest, cuts), strict=True))
        self.one = self.const / CONST

    def __getitem__(self, name):
        return self._spaces[name]


@dataclass
class Wire:
    """A head: `match` is a list of (query rows, key rows, weight), `moves` of (from rows, to rows, weight)."""

    match: list
    moves: list


def gpt2(stream, n_layers, n_heads, tokens, positions, said, wires, *, noise=0.01, seed=0, n_inner=8):
    """A GPT-2 of these wires (`{(layer, head): Wire}`); the other heads are noise, the MLPs write nothing.

    `tokens` `[V, D]` and `positions` `[P, D]` embed, `said` `[V, D]` reads the logits.
    """
    rng = np.random.default_rng(seed)
    width, head_dim = stream.width, stream.width // n_heads
    config = GPT2Config(
        vocab_size=len(tokens),
        n_embd=width,
        n_layer=n_layers,
        n_head=n_heads,
        n_positions=len(positions),
        n_inner=n_inner,
        tie_word_embeddings=False,
        bos_token_id=0,
        eos_token_id=None,
        pad_token_id=0,
    )
    module = GPT2LMHeadModel(config).eval()
    weights = {name: torch.zeros_like(p) for name, p in module.named_parameters()}
    gain = CONST / width**0.5

    def put(name, value):
        weights[name] = torch.from_numpy(np.asarray(value)).float()

    put("transformer.wte.weight", tokens + CONST * stream.const)
    put("transformer.wpe.weight", positions)
    put("transformer.ln_f.weight", np.full(width, gain))
    put("lm_head.weight", said)
    for layer in range(n_layers):
        q, k, v, o = (noise * rng.standard_normal((n_heads, head_dim, width)) for _ in range(4))
        for head in range(n_heads):
            wire = wires.get((layer, head))
            if wire is None:
                continue
            for matrix in (q, k, v, o):
                matrix[head] = 0
            _stack(q[head], [(a * w * head_dim**0.5) for a, _, w in wire.match])
            _stack(k[head], [b for _, b, _ in wire.match])
            _stack(v[head], [a for a, _, _ in wire.moves])
            _stack(o[head], [w * b for _, b, w in wire.moves])
        at = f"transformer.h.{layer}."
        put(at + "ln_1.weight", np.full(width, gain))
        put(at + "ln_2.weight", np.full(width, gain))
        put(at + "attn.c_attn.weight", np.concatenate([m.reshape(width, width) for m in (q, k, v)]).T)
        put(at + "attn.c_proj.weight", o.reshape(width, width))
    for name, parameter in module.named_parameters():
        parameter.data.copy_(weights[name])
    return mh.open_model(module)


def _stack(matrix, blocks):
    at = 0
    for block in blocks:
        matrix[at : at + len(block)] = block
        at += len(block)
    assert at <= len(matrix)


def batch_of(ids, answers, foils, twins, spans, twin_answers=None):
    """A TaskBatch of prompts of one length; `spans` are `{name: [columns]}`, one column a row."""
    ids, twins = torch.tensor(ids), None if twins is None else torch.tensor(twins)
    n = len(ids)
    return TaskBatch(
        input_ids=ids,
        attention_mask=torch.ones_like(ids),
        answer_ids=torch.tensor(answers),
        foil_ids=torch.tensor(foils),
        corrupted_ids=twins,
        corrupted_mask=None if twins is None else torch.ones_like(ids),
        corrupted_answer_ids=torch.tensor([-1] * n if twin_answers is None else twin_answers),
        spans={name: torch.tensor([[c, c + 1] for c in columns]) for name, columns in spans.items()},
        accepted_ids=[[a] for a in answers],
        examples=[Example("", "")] * n,
        dropped={},
    )


def sink(stream, weight):
    """Attend to the first token with this score."""
    return (stream.one, stream["bos"], weight)


# Indirect objects: <bos> A and B met , S gave to

NAMES, LENGTH = 8, 9
IOI_KNOWN = {
    "ioi_name_mover": ["L3H1", "L3H3"],
    "ioi_negative_name_mover": ["L3H0"],
    "ioi_inhibition": ["L2H2"],
    "ioi_duplicate": ["L0H3"],
    "ioi_induction": ["L1H1"],
    "ioi_previous": ["L0H0"],
}


def ioi_model(seed=0, noise=0.01):
    sizes = {
        "name": NAMES,
        "prev": NAMES,
        "dup": NAMES,
        "inh": NAMES,
        "out": NAMES,
        "pos": LENGTH,
        "isname": 1,
        "bos": 1,
    }
    s = Stream(128, sizes, seed)
    tokens = np.zeros((1 + NAMES + 5, s.width))
    tokens[0] = s["bos"][0]
    tokens[1 : 1 + NAMES] = s["name"] + s["isname"]
    said = np.zeros_like(tokens)
    said[1 : 1 + NAMES] = 10 * s["out"]
    pos = s["pos"]
    looks = [(s.one, s["isname"], 10.0), (s["inh"], s["name"], -4.0), sink(s, 5.0)]
    wires = {
        (0, 0): Wire([(pos[1:], pos[:-1], 30.0)], [(s["name"], s["prev"], 1.0)]),
        (0, 3): Wire([(s["name"], s["name"], 30.0), (pos, pos, -45.0), sink(s, 15.0)], [(s["name"], s["dup"], 0.5)]),
        (1, 1): Wire([(s["name"], s["prev"], 30.0), sink(s, 15.0)], [(s["prev"], s["dup"], 0.5)]),
        (2, 2): Wire([(pos[8:], pos[6:7], 30.0), sink(s, 15.0)], [(s["dup"], s["inh"], 1.0)]),
        (3, 1): Wire(looks, [(s["name"], s["out"], 1.0)]),
        (3, 3): Wire(looks, [(s["name"], s["out"], 0.6)]),
        (3, 0): Wire(looks, [(s["name"], s["out"], -0.4)]),
    }
    return gpt2(s, 4, 4, tokens, pos, said, wires, noise=noise, seed=seed)


def ioi_batch(n=12, seed=0):
    rng = np.random.default_rng(seed)
    words = [1 + NAMES + i for i in range(5)]

    def prompt(a, b, who):
        return [0, a, words[0], b, words[1], words[2], who, words[3], words[4]]

    rows = []
    for i in range(n):
        receiver, actor, *others = (1 + rng.permutation(NAMES)[:5]).tolist()
        abba = i % 2 == 0
        first, second = (receiver, actor) if abba else (actor, receiver)
        rows.append((prompt(first, second, actor), receiver, actor, prompt(*others), abba))
    ids, answers, foils, twins, abba = (list(column) for column in zip(*rows, strict=True))
    spans = {
        "IO": [1 if one else 3 for one in abba],
        "S1": [3 if one else 1 for one in abba],
        "S1+1": [4 if one else 2 for one in abba],
        "S2": [6] * n,
        "end": [8] * n,
    }
    return batch_of(ids, answers, foils, twins, spans)


# Two tasks: <bos> cue item item END_t; the cue says which item is the answer

ITEMS = 6


def shared_model(shared, seed=0, n_circuit=8, noise=0.005):
    """A model with two circuits of eight heads, four selectors and four movers each, that share `shared` heads (even).

    Returns the model and the two circuits.
    """
    sizes = {"item": ITEMS, "cue": 2, "sel": 2, "out": ITEMS, "pos": 5, "task": 2, "bos": 1}
    s = Stream(256, sizes, seed)
    n_heads, half = 16, n_circuit // 2
    tokens = np.zeros((1 + 2 + ITEMS + 2, s.width))
    tokens[0] = s["bos"][0]
    tokens[1:3], tokens[3 : 3 + ITEMS], tokens[-2:] = s["cue"], s["item"], s["task"]
    said = np.zeros_like(tokens)
    said[3 : 3 + ITEMS] = 5 * s["out"]
    rng = np.random.default_rng(seed)
    wires, circuits = {}, ([], [])
    for layer in (0, 1):
        places = rng.permutation(n_heads).tolist()
        both = shared // 2
        own = [places[:half], places[:both] + places[half : 2 * half - both]]
        for t in (0, 1):
            circuits[t].extend((layer, h) for h in own[t])
        for head in set(own[0]) | set(own[1]):
            tasks = [t for t in (0, 1) if head in own[t]]
            flag = s["task"][tasks].sum(0, keepdims=True)
            rest = [(s["task"][[t]], s["bos"], 60.0) for t in (0, 1) if t not in tasks]
            if layer == 0:
                match = [(flag, s["pos"][1:2], 30.0), sink(s, 15.0), *rest]
                wires[layer, head] = Wire(match, [(s["cue"], s["sel"], 1 / half)])
            else:
                match = [(s["sel"], s["pos"][2:4], 6.0), *rest]
                wires[layer, head] = Wire(match, [(s["item"], s["out"], 1 / half)])
    model = gpt2(s, 3, n_heads, tokens, s["pos"], said, wires, noise=noise, seed=seed)
    return model, [model.head_set(heads) for heads in circuits]


def shared_batch(task, n=8, seed=0):
    rng = np.random.default_rng(seed)
    rows = []
    for _ in range(n):
        items, cue = (3 + rng.permutation(ITEMS)[:2]).tolist(), int(rng.integers(2))
        end = 3 + ITEMS + task
        rows.append(([0, 1 + cue, *items, end], items[cue], items[1 - cue], [0, 2 - cue, *items, end]))
    ids, answers, foils, twins = (list(column) for column in zip(*rows, strict=True))
    return batch_of(ids, answers, foils, twins, {"end": [4] * n}, foils)


# Coloured objects: <bos> o c o c o c q END; inhibition heads are weak, movers like some colours more

OBJECTS, COLOURS = 6, 6
INHIBITORS = ["L1H1", "L1H4", "L1H5", "L1H6"]


def weak_model(seed=0, noise=0.01):
    sizes = {"object": OBJECTS, "colour": COLOURS, "iscolour": 1, "liked": 1, "obj": OBJECTS, "want": OBJECTS}
    s = Stream(256, sizes | {"inh": COLOURS, "out": COLOURS, "pos": 9, "bos": 1}, seed)
    tokens = np.zeros((1 + OBJECTS + COLOURS + 1, s.width))
    tokens[0] = s["bos"][0]
    tokens[1 : 1 + OBJECTS] = s["object"]
    liked = np.linspace(0, 1, COLOURS)[:, None]
    colours = slice(1 + OBJECTS, 1 + OBJECTS + COLOURS)
    tokens[colours] = s["colour"] + s["iscolour"] + liked * s["liked"]
    said = np.zeros_like(tokens)
    said[colours] = 10 * s["out"]
    pos = s["pos"]
    back = [(pos[1:], pos[:-1], 30.0)]
    wrong = [(s.one, s["iscolour"], 20.0), (s["want"], s["obj"], -30.0), sink(s, 22.6)]
    wires = {
        (0, 0): Wire(back, [(s["object"], s["obj"], 1.0)]),
        (0, 1): Wire(back, [(s["object"], s["want"], 1.0)]),
        (2, 2): Wire(
            [(s.one, s["iscolour"], 10.0), (s.one, s["liked"], 12.0), (s["inh"], s["colour"], -10.0)],
            [(s["colour"], s["out"], 1.0)],
        ),
    }
    for name in INHIBITORS:
        head = mh.Head.parse(name)
        wires[head.layer, head.index] = Wire(wrong, [(s["colour"], s["inh"], 1.0)])
    return gpt2(s, 3, 8, tokens, pos, said, wires, noise=noise, seed=seed)


def weak_batch(n=100, seed=0):
    """Prompts with the columns of their two wrong colours, `[N, 2]`."""
    rng = np.random.default_rng(seed)
    rows = []
    for _ in range(n):
        objects = (1 + rng.permutation(OBJECTS)[:3]).tolist()
        colours = (1 + OBJECTS + rng.permutation(COLOURS)[:3]).tolist()
        asked, rival = rng.permutation(3)[:2].tolist()
        body = [0, *[token for pair in zip(objects, colours, strict=True) for token in pair]]
        end = 1 + OBJECTS + COLOURS
        wrong = [2 + 2 * i for i in range(3) if i != asked]
        rows.append(([*body, objects[asked], end], colours[asked], colours[rival], [*body, objects[rival], end], wrong))
    ids, answers, foils, twins, wrong = (list(column) for column in zip(*rows, strict=True))
    return batch_of(ids, answers, foils, twins, {"end": [8] * n}, foils), torch.tensor(wrong)
