"""The training loop: resuming, budgets, schedules, stop requests."""

import os
import signal

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from manyheads.errors import InputError
from manyheads.training import TrainSettings, WarmupStableDecay, fit, next_token_loss
from manyheads.training.checkpoint import states


def tiny():
    torch.manual_seed(7)
    config = LlamaConfig(
        vocab_size=32,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        tie_word_embeddings=True,
    )
    return LlamaForCausalLM(config)


def batch_at(i):
    generator = torch.Generator().manual_seed(i)
    block = torch.randint(0, 32, (4, 6), generator=generator)
    return {"input_ids": block.repeat(1, 2), "weights": torch.ones(4, 12)}


SETTINGS = TrainSettings(steps=12, precision="fp32", schedule=WarmupStableDecay(peak=1e-2, warmup=3))


def weights(model):
    return {name: value.clone() for name, value in model.state_dict().items()}


def assert_equal(one, other):
    assert one.keys() == other.keys()
    for name in one:
        torch.testing.assert_close(one[name], other[name], rtol=0, atol=0)


def stop_at(step, number):
    def after_step(progress):
        if progress.step == step:
            os.kill(os.getpid(), number)

    return after_step


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_run_stopped_and_resumed_equals_one_never_stopped(tmp_path, number):
    whole = tiny()
    fit(whole, batch_at, tmp_path / "whole", SETTINGS)
    parted = tiny()
    with pytest.raises(KeyboardInterrupt):
        fit(parted, batch_at, tmp_path / "parted", SETTINGS, after_step=stop_at(5, number))
    assert [path.name for path in states(tmp_path / "parted")] == ["step-00000006"]
    resumed = tiny()
    progress = fit(resumed, batch_at, tmp_path / "parted", SETTINGS)
    assert (progress.step, progress.tokens, progress.finished) == (12, 12 * 48, True)
    assert_equal(weights(whole), weights(resumed))


def test_a_crash_loses_only_what_came_after_the_last_save(tmp_path):
    def crash(progress):
        if progress.step == 8:
            raise RuntimeError("power cut")

    whole, crashed, resumed = tiny(), tiny(), tiny()
    fit(whole, batch_at, tmp_path / "whole", SETTINGS)
    often = TrainSettings(steps=12, precision="fp32", schedule=SETTINGS.schedule, save_minutes=0.0)
    with pytest.raises(RuntimeError, match="power cut"):
        fit(crashed, batch_at, tmp_path / "run", often, after_step=crash)
    assert len(states(tmp_path / "run")) == 1
    fit(resumed, batch_at, tmp_path / "run", often)
    assert_equal(weights(whole), weights(resumed))


def test_training_lowers_the_loss(tmp_path):
    def counting(i):
        return {"input_ids": (torch.arange(12) + torch.arange(i, i + 4)[:, None]) % 32}

    model = tiny()
    before = next_token_loss(model, counting(0)).item()
    fit(model, counting, tmp_path, TrainSettings(steps=60, schedule=WarmupStableDecay(peak=1e-2, warmup=5)))
    assert next_token_loss(model, counting(0)).item() < before / 2


def test_a_clock_ends_the_run(tmp_path):
    progress = fit(tiny(), batch_at, tmp_path, TrainSettings(minutes=0.01, precision="fp32"))
    assert progress.finished
    assert 0.01 <= progress.minutes < 0.1


def test_weights_of_zero_take_tokens_out_of_the_loss():
    model, batch = tiny(), batch_at(0)
    only_last = batch | {"weights": torch.zeros(4, 12)}
    only_last["weights"][:, -1] = 3.0
    logits = model(input_ids=batch["input_ids"]).logits[:, -2]
    expected = torch.nn.functional.cross_entropy(logits, batch["input_ids"][:, -1])
    torch.testing.assert_close(next_token_loss(model, only_last), expected)


def test_states_hold_no_pickle(tmp_path):
    fit(tiny(), batch_at, tmp_path, TrainSettings(steps=1, precision="fp32"))
    names = sorted(path.name for path in states(tmp_path)[0].iterdir())
    assert names == ["model.safetensors", "optimizer.safetensors", "progress.json", "random.safetensors"]


def test_a_run_without_an_end_or_over_another_is_refused(tmp_path):
    with pytest.raises(InputError, match="steps or minutes"):
        fit(tiny(), batch_at, tmp_path, TrainSettings())
    fit(tiny(), batch_at, tmp_path, TrainSettings(steps=1, precision="fp32"))
    with pytest.raises(InputError, match="holds a run already"):
        fit(tiny(), batch_at, tmp_path, SETTINGS, resume=False)


def test_a_damaged_state_is_named(tmp_path):
    fit(tiny(), batch_at, tmp_path, TrainSettings(steps=1, precision="fp32"))
    (states(tmp_path)[0] / "model.safetensors").write_bytes(b"not weights")
    with pytest.raises(InputError, match="step-00000001 is not a training state"):
        fit(tiny(), batch_at, tmp_path, SETTINGS)


def test_the_rate_rises_stays_and_falls():
    schedule = WarmupStableDecay(peak=1.0, warmup=10, decay=0.25, floor=0.1)
    assert schedule(0, 0.0) == pytest.approx(0.1)
    assert schedule(9, 0.1) == schedule(500, 0.75) == pytest.approx(1.0)
    assert schedule(600, 0.875) == pytest.approx(0.55)
    assert schedule(700, 1.0) == pytest.approx(0.1)
