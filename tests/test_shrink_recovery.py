"""Recovery: what was cut is trained for as many tokens as it says, and the result is a checkpoint of the same form."""

from functools import cache

import pytest
import torch
import transformers as tf
from architectures import LLAMA

import manyheads as mh
from manyheads.errors import InputError
from manyheads.shrink.recovery import FULL, LORA, _objective, recover
from manyheads.training import TrainSettings

TEXTS = ["the cat sat on the mat and the dog sat on the rug. " * 60]


@cache
def whole():
    """A small random model that reads what ladon's tokenizer writes."""
    torch.manual_seed(0)
    config = tf.LlamaConfig(**{**LLAMA, "vocab_size": 4096, "initializer_range": 0.1})
    return mh.open_model(tf.LlamaForCausalLM(config).eval(), tokenizer=mh.open_model().tokenizer)


@cache
def small():
    """The same without two heads, its layers of different sizes."""
    return whole().prune(["L0H0", "L0H1"])


def fast(settings):
    return TrainSettings(**{**vars(settings), "rate": 2e-2, "rows": 4, "warmup": 1})


@pytest.mark.parametrize(("rank", "settings"), [(4, LORA), (None, FULL)], ids=["LoRA", "full"])
def test_recovery_lowers_the_loss_and_leaves_a_checkpoint_of_the_same_form(rank, settings, tmp_path):
    model = small()
    before = model.fingerprint
    after, record = recover(model, TEXTS, 640, lora_rank=rank, length=16, settings=fast(settings))
    assert model.fingerprint == before
    assert record.tokens == 640 and record.loss_after < record.loss_before - 0.2
    shapes = [{name: p.shape for name, p in one.plain.named_parameters()} for one in (model, after)]
    assert shapes[0] == shapes[1] and type(after.plain) is type(model.plain)
    n = sum(p.numel() for p in model.plain.parameters())
    assert record.trained == n if rank is None else record.trained < n / 10
    after.save_pretrained(tmp_path / "m")
    assert mh.open_model(tmp_path / "m").fingerprint == after.fingerprint
    assert type(tf.AutoModelForCausalLM.from_pretrained(tmp_path / "m")) is type(model.plain)


def test_lora_begins_at_the_model_and_leaves_what_is_outside_of_layers():
    model = small()
    after, record = recover(
        model, TEXTS, 64, lora_rank=2, length=16, settings=TrainSettings(**{**vars(LORA), "rate": 0.0})
    )
    assert torch.allclose(after.logits(torch.arange(9)[None]), model.logits(torch.arange(9)[None]), atol=1e-5)
    assert record.loss_after == pytest.approx(record.loss_before, abs=1e-5)
    moved, _ = recover(model, TEXTS, 320, lora_rank=2, length=16, settings=fast(LORA))
    old, new = dict(model.plain.named_parameters()), dict(moved.plain.named_parameters())
    changed = {name for name in old if not torch.equal(old[name], new[name])}
    assert changed == {name for name, p in old.items() if ".layers." in name and p.ndim == 2}


@pytest.mark.usefixtures("any_shape")
def test_an_interrupted_run_goes_on_to_the_same_weights(tmp_path):
    class Stop(Exception):
        pass

    steps = []

    def bar(*_, **__):
        steps.append(1)
        if len(steps) == 5:
            raise KeyboardInterrupt

    # A run of half the steps is a state of the whole one at a constant rate.
    constant = TrainSettings(**{**vars(fast(LORA)), "decay": 0.0, "save_minutes": 1e-9, "every": 1})
    whole, _ = recover(small(), TEXTS, 640, length=16, settings=constant)
    with pytest.raises(KeyboardInterrupt):
        recover(small(), TEXTS, 640, length=16, settings=constant, folder=tmp_path / "run", bar=bar)
    again, record = recover(small(), TEXTS, 640, length=16, settings=constant, folder=tmp_path / "run")
    assert record.tokens == 640
    ids = torch.arange(9)[None]
    assert torch.allclose(again.logits(ids), whole.logits(ids), atol=1e-5)
    assert sum(file.stat().st_size for file in (tmp_path / "run").rglob("*")) < 2e6  # what learns, not the whole model


@pytest.mark.parametrize(
    ("kwargs", "reason"),
    [
        ({"tokens": 0}, "tokens is 0"),
        ({"lora_rank": 0}, "lora_rank is 0"),
        ({"length": 1}, "length is 1"),
        ({"texts": ["too short"]}, "no passage of 256 tokens"),
        ({"texts": ["a b c d e f g h i j " * 4], "length": 24}, "one is held out"),
    ],
)
def test_settings_that_cannot_be_are_refused(kwargs, reason):
    with pytest.raises(InputError, match=reason):
        recover(small(), **{"texts": TEXTS, **kwargs})


def test_without_peft_lora_says_what_to_install(monkeypatch):
    monkeypatch.setattr("manyheads.shrink.recovery.find_spec", lambda name: None)
    with pytest.raises(InputError, match="pip install peft"):
        recover(small(), TEXTS)


# A teacher


def test_the_loss_of_a_teacher_is_the_divergence_of_its_predictions():
    student, teacher = small(), whole()
    ids = torch.randint(5, 4096, (2, 12), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        p, q = (one.plain(input_ids=ids).logits.double().softmax(-1) for one in (teacher, student))
        found = _objective(student.plain, teacher, {"input_ids": ids})
        own = _objective(student.plain, student, {"input_ids": ids})
    assert float(found) == pytest.approx(float((p * (p / q).log()).sum(-1).mean()), rel=1e-4)
    assert float(own) == pytest.approx(0.0, abs=1e-6) and float(found) > 1e-3


def test_what_was_cut_learns_its_teacher_and_the_teacher_stays_as_it_was():
    student, teacher = small(), whole()
    before = teacher.fingerprint
    ids = mh.tasks.texts.passages(student, TEXTS, n=8, length=16, seed=3)

    def apart(model):
        with torch.no_grad():
            return float(_objective(model.plain, teacher, {"input_ids": ids}))

    how = dict(lora_rank=None, length=16, settings=TrainSettings(**{**vars(fast(FULL)), "rate": 1e-3}))
    taught, record = recover(student, TEXTS, 640, teacher=teacher, **how)
    told, _ = recover(student, TEXTS, 640, **how)
    assert record.tokens == 640 and teacher.fingerprint == before
    assert not any(parameter.grad is not None for parameter in teacher.plain.parameters())
    # The texts are far from what a random model predicts: learning them leads away from it.
    assert apart(taught) < 0.7 * apart(student) < apart(told)


def test_a_teacher_of_other_tokens_is_refused():
    torch.manual_seed(0)
    other = mh.open_model(tf.LlamaForCausalLM(tf.LlamaConfig(**{**LLAMA, "vocab_size": 64})).eval())
    with pytest.raises(InputError, match="the teacher knows 64 tokens and the model 4096"):
        recover(small(), TEXTS, teacher=other)
