"""A GPT-2 with an order-2 head set by hand: two heads note the last token and the one before, it matches both."""

from functools import cache

import numpy as np
import torch

import manyheads as mh
from manyheads.heads import Head
from manyheads.lab.assembly import CONTEXT, gpt2, layer
from manyheads.lab.circuits import (
    CODE,
    HEAD_DIM,
    PlantedCircuit,
    Space,
    _looks_back,
    _moves,
    plant_induction,
    plant_previous,
)
from manyheads.lab.words import word_tokenizer

INDUCTION, ORDER_2 = Head(1, 0), Head(1, 3)


def previous_but_one(space, tok):
    """`dup` is free in this model: it holds the code of the token before the last."""
    return PlantedCircuit(_moves(tok), _moves(space.dup), *_looks_back(space, 2))


def order_2(space, tok):
    """Score: 60 (<tok_t, prev_s> + <prev_t, dup_s>), for `<bos>` 96: one match is not enough, two are."""
    query, key = np.zeros((2, HEAD_DIM, tok.shape[1]))
    query[:CODE], key[:CODE] = 60 * tok, space.prev
    query[CODE : 2 * CODE], key[CODE : 2 * CODE] = 60 * space.prev, space.dup
    query[-1], key[-1] = 96 * space.one, space.bos
    return PlantedCircuit(_moves(tok), _moves(space.out), query, key)


@cache
def planted(noise=0.02, seed=0):
    rng = np.random.default_rng(seed)
    space = Space.draw(256, False, rng)
    heads = [
        {1: plant_previous(space, space.tok), 2: previous_but_one(space, space.tok)},
        {i: make(space, space.tok / 2) for i, make in ((INDUCTION.index, plant_induction), (ORDER_2.index, order_2))},
    ]
    layers = [layer(i, planted, space, 4, 4, noise, rng) for i, planted in enumerate(heads)]
    with torch.random.fork_rng(devices=[]):
        module = gpt2(layers, space, rng)
    return mh.open_model(module, tokenizer=word_tokenizer(CONTEXT))
