"""A GPT-2 set by hand that recalls facts in the three steps of #75: `<bos> subject relation END` -> object.

L1H1   brings the subject to the end, and its write reads as the subject; L1H2 brings the relation
MLP 1  writes 0.8 o_1 - 0.5 o_2 + c, o_h the two heads' writes and c towards all objects
MLP 2  looks the object up: a neuron for each subject and relation
L3H0   writes against all objects alike
"""

import numpy as np
import torch
from planted_ioi import Stream, Wire, batch_of, gpt2, sink

import manyheads as mh

SUBJECTS, RELATIONS, OBJECTS = 20, 3, 20
FIRST_SUBJECT, FIRST_RELATION = 1, 1 + SUBJECTS
END = FIRST_RELATION + RELATIONS
FIRST_OBJECT = END + 1
MOVER, RELATION, DAMPER = "L1H1", "L1H2", "L3H0"


def object_of(subject, relation):
    return (subject + 7 * relation) % OBJECTS


def recalling_model(seed=0, damping=0.3):
    sizes = {"subject": SUBJECTS, "topic": SUBJECTS, "relation": RELATIONS, "asked": RELATIONS, "object": OBJECTS}
    s = Stream(96, sizes | {"pos": 8, "bos": 1}, seed)
    tokens = np.zeros((FIRST_OBJECT + OBJECTS, s.width))
    tokens[0] = s["bos"][0]
    tokens[FIRST_SUBJECT:FIRST_RELATION], tokens[FIRST_RELATION:END] = s["subject"], s["relation"]
    said = np.zeros_like(tokens)
    said[FIRST_SUBJECT:FIRST_RELATION], said[FIRST_OBJECT:] = 0.5 * s["topic"], 6 * s["object"]
    pos, all_objects = s["pos"], s["object"].sum(0, keepdims=True)
    wires = {
        (1, 1): Wire([(pos[3:4], pos[1:2], 30.0), sink(s, 15.0)], [(s["subject"], s["topic"], 1.0)]),
        (1, 2): Wire([(pos[3:4], pos[2:3], 30.0), sink(s, 15.0)], [(s["relation"], s["asked"], 1.0)]),
        (3, 0): Wire([sink(s, 30.0)], [(s["bos"], all_objects, -damping)]),
    }
    model = gpt2(s, 4, 4, tokens, pos, said, wires, noise=0.001, seed=seed, n_inner=2 * (SUBJECTS + RELATIONS) + 20)
    layers = model.plain.transformer.h
    # gelu(x) - gelu(-x) = x: two neurons copy one direction.
    copied = torch.tensor(np.concatenate([s["topic"], s["asked"]])).float()
    weights = torch.tensor([0.8] * SUBJECTS + [-0.5] * RELATIONS)[:, None]
    with torch.no_grad():
        mlp, n = layers[1].mlp, len(copied)
        mlp.c_fc.weight[:, : 2 * n] = torch.cat([copied, -copied]).T
        mlp.c_proj.weight[: 2 * n] = torch.cat([weights * copied, -weights * copied])
        mlp.c_proj.bias += 0.02 * torch.tensor(all_objects[0]).float()
        mlp, neuron = layers[2].mlp, 0
        for subject in range(SUBJECTS):
            for relation in range(RELATIONS):
                read = s["topic"][subject] / 1.8 + s["asked"][relation] / 0.5
                mlp.c_fc.weight[:, neuron] = torch.tensor(10 * read).float()
                mlp.c_fc.bias[neuron] = -15.0
                mlp.c_proj.weight[neuron] = torch.tensor(s["object"][object_of(subject, relation)] / 5).float()
                neuron += 1
    return mh.open_model(model.plain)


def recalled(n=60, seed=0):
    """`n` of the 60 facts; the twin asks the same of another subject."""
    rng = np.random.default_rng(seed)
    order = rng.permutation(SUBJECTS * RELATIONS)[:n]
    rows = []
    for subject, relation in zip(order // RELATIONS, order % RELATIONS, strict=True):
        other = (subject + rng.integers(1, SUBJECTS)) % SUBJECTS
        ids = [[0, int(FIRST_SUBJECT + one), int(FIRST_RELATION + relation), END] for one in (subject, other)]
        answers = [int(FIRST_OBJECT + object_of(one, relation)) for one in (subject, other)]
        rows.append((*ids, *answers))
    ids, twins, answers, foils = (list(column) for column in zip(*rows, strict=True))
    return batch_of(ids, answers, foils, twins, {"subject": [1] * n, "end": [3] * n}, foils)
