"""How much a survey holds at once: a thousand tokens of prompts, one judge's run, and no more of a run than replays read."""

import weakref
from dataclasses import fields
from functools import cache
from importlib import import_module

import numpy as np
import planted_ioi as planted
import pytest
import torch
from architectures import inputs_for, opened
from planted_gates import planted as planted_gates
from planted_gates import prompts
from torch import Tensor

import manyheads as mh
from manyheads.atlas.core.judges import repeats_judge
from manyheads.atlas.safety.ships import final_states, ships, swept
from manyheads.model.replay import recording as recordings
from manyheads.model.replay.patching import Receiver, path_patching
from manyheads.progress import Bar
from manyheads.tasks.encoding import MAX_TOKENS

ioi = import_module("manyheads.atlas.circuits.ioi")


@cache
def many_prompts():
    model, batch = planted.ioi_model(0), planted.ioi_batch(250, 0)
    assert batch.input_ids.numel() > 2 * MAX_TOKENS
    return model, batch


def tokens_a_pass(model, work):
    """The most tokens that one forward pass of `work` was given."""
    seen = []
    handle = model.plain.register_forward_pre_hook(
        lambda _, args, kwargs: seen.append(kwargs["input_ids"].numel()), with_kwargs=True
    )
    work()
    handle.remove()
    return max(seen)


@pytest.mark.parametrize("part", [None, "query"])
def test_paths_of_many_prompts_are_patched_a_thousand_tokens_at_a_time(part):
    """The same effects as of all prompts in one pass."""
    model, batch = many_prompts()
    ends = None if part is None else [Receiver(mh.Head(3, 1), part)]
    at = None if part is None else batch.spans["end"][:, 1] - 1
    found = []
    assert tokens_a_pass(model, lambda: found.append(ioi.path_effects(model, batch, ends, positions=at))) <= MAX_TOKENS
    where = None if at is None else at[:, None]
    whole = path_patching(
        model, batch.inputs, batch.twins, batch.logit_difference, receivers=ends, positions=where, keep=1
    )
    effects = (whole.values - whole.clean) / (whole.corrupted.mean() - whole.clean.mean())
    assert np.abs(effects).max() > 0.1
    assert np.allclose(found[0], effects.T.reshape(250, *model.shape), atol=1e-5)


def test_ships_reads_a_thousand_tokens_of_requests_at_a_time():
    """The same scores as of all requests in one replay."""
    model = planted_gates({(1, 1): ("watch", 3.0)}, seed=4)
    batch = prompts(200, words=12, flagged=1.0)
    assert batch.input_ids.numel() > 2 * MAX_TOKENS
    found = []
    assert tokens_a_pass(model, lambda: found.append(ships(model, task=batch))) <= MAX_TOKENS
    run = model.record(batch.inputs)
    kl, direction, states = swept(model, run, batch.answer_ids, [[head] for head in model.heads], "undifferentiated")
    clean = final_states(model, run)
    shift = ((states - clean).norm(dim=-1) / clean.norm(dim=-1).mean()).mean(1)
    for name, values in (("ships", kl.mean(1)), ("ships_direction", direction.mean(1)), ("ships_shift", shift)):
        assert np.allclose(found[0][name].values.ravel(), values, atol=1e-5), name


@pytest.mark.parametrize("name", ["llama", "gpt2", "falcon"])
def test_a_run_recorded_for_sweeps_holds_the_stream_and_z_alone(name):
    model, inputs = opened(name), inputs_for(name)
    run = model.record(inputs, keep=1, mlps=False)
    attention, mlp = (sum(x.numel() for x in tensors(part) if not x.is_meta) for part in (run.attention[1:], run.mlp))
    assert attention == mlp == 0
    held = {field.name: sum(x.numel() for x in tensors(getattr(run, field.name))) for field in fields(run)}
    assert held["outputs"] == run.batch * run.length * model.layout.hidden_size * model.n_layers
    assert held["logits"] == run.batch * model.vocab_size
    edits = [mh.Ablate([head], mode) for head in model.heads for mode in ("zero", "uniform")]
    values = [
        model.sweep(one, edits, lambda logits: logits[:, -1, :9].sum(1), keep=1)
        for one in (run, model.record(inputs), inputs)
    ]
    assert np.array_equal(values[0], values[1]) and np.array_equal(values[0], values[2])


def tensors(value):
    """The tensors in lists and tuples."""
    if isinstance(value, Tensor):
        return [value]
    return [x for part in value for x in tensors(part)] if isinstance(value, (tuple, list)) else []


def test_a_judge_that_gave_up_its_run_makes_the_same_one_again():
    model = mh.open_model()
    judge = repeats_judge(model, n=3, length=12)
    first, mean, clean = judge.recording, judge.mean_z, judge.clean
    judge.release()
    assert judge.recording is not first and judge.mean_z is mean and judge.clean is clean
    for z, again in zip(first.z, judge.recording.z, strict=True):
        assert torch.equal(z, again)
    assert torch.allclose(mean, model.mean_z(judge.inputs), atol=1e-6)


class Watching(Bar):
    """Counts the recorded runs that exist whenever something is reported."""

    def __init__(self, runs, most):
        self.runs, self.most = runs, most

    def __call__(self, more=1, /, note=""):
        self.most.append(sum(run() is not None for run in self.runs))

    def step(self, name, total=None, *, done=0):
        return self


def test_a_survey_holds_one_judges_run_at_a_time(monkeypatch):
    runs, most, record = [], [], recordings.record

    def noted(*args, **kwargs):
        made = record(*args, **kwargs)
        runs.append(weakref.ref(made))
        return made

    monkeypatch.setattr("manyheads.model.opened.record", noted)
    names = ["induction", "ngram_2", "ngram_3"]
    atlas = mh.atlas.survey(opened("llama"), names, n=4, bar=Watching(runs, most))
    assert len(atlas.effects) == 3 and [check.behaviour for check in atlas.checks] == [x for x in names for _ in "12"]
    assert max(most) == 1
