"""The training loop: resuming, budgets, schedules, stop requests, what decays, what is clipped, the best state."""

import os
import signal
import tempfile
from collections import namedtuple
from dataclasses import dataclass, replace

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from manyheads.errors import InputError
from manyheads.training import ADAM, TrainSettings, drawn_rows, epoch_rows, fit, next_token_loss
from manyheads.training.batches import on_device
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


SETTINGS = TrainSettings(steps=12, precision="fp32", rate=1e-2, warmup=3)


def weights(model):
    return {name: value.clone() for name, value in model.state_dict().items()}


def assert_equal(one, other):
    assert one.keys() == other.keys()
    for name in one:
        torch.testing.assert_close(one[name], other[name], rtol=0, atol=0)


def stop_at(step, number):
    def after_step(progress, optimizer):
        if progress.step == step:
            os.kill(os.getpid(), number)

    return after_step


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_run_stopped_and_resumed_equals_one_never_stopped(tmp_path, number):
    whole = tiny()
    fit(whole, batch_at, SETTINGS, tmp_path / "whole", loss=next_token_loss)
    parted = tiny()
    with pytest.raises(KeyboardInterrupt):
        fit(parted, batch_at, SETTINGS, tmp_path / "parted", loss=next_token_loss, after_step=stop_at(5, number))
    assert [path.name for path in states(tmp_path / "parted")] == ["step-00000005"]
    resumed = tiny()
    progress = fit(resumed, batch_at, SETTINGS, tmp_path / "parted", loss=next_token_loss)
    assert (progress.step, progress.tokens, progress.finished) == (12, 12 * 48, True)
    assert_equal(weights(whole), weights(resumed))


def test_a_crash_loses_only_what_came_after_the_last_save(tmp_path):
    def crash(progress, optimizer):
        if progress.step == 8:
            raise RuntimeError("power cut")

    whole, crashed, resumed = tiny(), tiny(), tiny()
    fit(whole, batch_at, SETTINGS, tmp_path / "whole", loss=next_token_loss)
    often = TrainSettings(steps=12, precision="fp32", rate=1e-2, warmup=3, save_minutes=0.0)
    with pytest.raises(RuntimeError, match="power cut"):
        fit(crashed, batch_at, often, tmp_path / "run", loss=next_token_loss, after_step=crash)
    assert len(states(tmp_path / "run")) == 1
    fit(resumed, batch_at, often, tmp_path / "run", loss=next_token_loss)
    assert_equal(weights(whole), weights(resumed))


def test_training_lowers_the_loss(tmp_path):
    def counting(i):
        return {"input_ids": (torch.arange(12) + torch.arange(i, i + 4)[:, None]) % 32}

    model = tiny()
    before = next_token_loss(model, counting(0)).item()
    fit(model, counting, TrainSettings(steps=60, rate=1e-2, warmup=5), tmp_path, loss=next_token_loss)
    assert next_token_loss(model, counting(0)).item() < before / 2


def test_a_clock_ends_the_run(tmp_path):
    progress = fit(tiny(), batch_at, TrainSettings(minutes=0.01, precision="fp32"), tmp_path, loss=next_token_loss)
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
    fit(tiny(), batch_at, TrainSettings(steps=1, precision="fp32"), tmp_path, loss=next_token_loss)
    names = sorted(path.name for path in states(tmp_path)[0].iterdir())
    assert names == ["model.safetensors", "optimizer.safetensors", "progress.json", "random.safetensors"]


def test_a_run_without_an_end_or_over_another_is_refused(tmp_path):
    with pytest.raises(InputError, match="steps or minutes"):
        fit(tiny(), batch_at, TrainSettings(), tmp_path, loss=next_token_loss)
    fit(tiny(), batch_at, TrainSettings(steps=1, precision="fp32"), tmp_path, loss=next_token_loss)
    with pytest.raises(InputError, match="holds a run already"):
        fit(tiny(), batch_at, SETTINGS, tmp_path, loss=next_token_loss, resume=False)


def test_a_damaged_state_is_named(tmp_path):
    fit(tiny(), batch_at, TrainSettings(steps=1, precision="fp32"), tmp_path, loss=next_token_loss)
    (states(tmp_path)[0] / "model.safetensors").write_bytes(b"not weights")
    with pytest.raises(InputError, match="step-00000001 is not a training state"):
        fit(tiny(), batch_at, SETTINGS, tmp_path, loss=next_token_loss)


def test_the_rate_rises_stays_and_falls():
    rate = TrainSettings(rate=2.0, warmup=10, decay=0.25, floor=0.1).rate_at
    assert rate(0, 0.0) == pytest.approx(0.2)
    assert rate(9, 0.1) == rate(500, 0.75) == pytest.approx(2.0)
    assert rate(600, 0.875) == pytest.approx(1.1)
    assert rate(700, 1.0) == pytest.approx(0.2)


# What a step does


class Affine(torch.nn.Module):
    """Two matrices, a gain and a bias, whose gradients are given: `loss = scale * sum of all of them`, or nothing at all."""

    def __init__(self, scale=0.0):
        super().__init__()
        self.scale = scale
        self.inner, self.outer = (torch.nn.Parameter(torch.full((3, 4), x)) for x in (1.0, -2.0))
        self.gain, self.bias = (torch.nn.Parameter(torch.full((4,), x)) for x in (1.0, 0.5))

    def forward(self, batch):
        return self.scale * sum(p.sum() for p in self.parameters())


FLAT = TrainSettings(steps=3, rate=0.1, warmup=1, decay=0.0, betas=(0.9, 0.999), weight_decay=0.5, precision="fp32")


def test_matrices_decay_and_gains_and_biases_do_not():
    model = Affine()
    fit(model, lambda i: None, FLAT)
    left = (1 - 0.1 * 0.5) ** 3
    torch.testing.assert_close(model.inner.data, torch.full((3, 4), left))
    torch.testing.assert_close(model.outer.data, torch.full((3, 4), -2 * left))
    assert torch.equal(model.gain.data, torch.ones(4)) and torch.equal(model.bias.data, torch.full((4,), 0.5))
    fit(model := Affine(), lambda i: None, replace(FLAT, decayed="all"))
    torch.testing.assert_close(model.gain.data, torch.full((4,), left))


def gradients_under(clip, scale=3.0):
    """The gradients that a step uses: their sum over Adam's first moment, exp_avg = (1 - beta) g."""
    model, seen = Affine(scale), []

    def after_step(progress, optimizer):
        seen.append(torch.cat([optimizer.state[p]["exp_avg"].flatten() / 0.1 for p in model.parameters()]))

    fit(model, lambda i: None, replace(FLAT, steps=1, clip=clip), after_step=after_step)
    return seen[0]


def test_clipping_bounds_the_norm_of_all_gradients_together_and_keeps_their_direction():
    free, bound, wide = gradients_under(None), gradients_under(0.7), gradients_under(1e6)
    torch.testing.assert_close(free, torch.full((32,), 3.0))
    torch.testing.assert_close(wide, free)
    assert bound.norm().item() == pytest.approx(0.7, rel=1e-4)
    torch.testing.assert_close(bound / bound.norm(), free / free.norm())


def test_adam_without_decay_is_torchs_and_one_with_decay_is_refused():
    ours, theirs = Affine(), Affine()
    target = torch.linspace(-1, 1, 12).view(3, 4)

    def loss(model, batch):
        return (model.inner @ target.T - batch).square().sum() + (model.gain * model.bias).sum()

    fit(ours, lambda i: torch.full((3, 3), float(i)), replace(ADAM, steps=5, rate=0.05), loss=loss)
    adam = torch.optim.Adam(theirs.parameters(), lr=0.05)
    for i in range(5):
        adam.zero_grad()
        loss(theirs, torch.full((3, 3), float(i))).backward()
        adam.step()
    assert_equal(weights(ours), weights(theirs))
    with pytest.raises(InputError, match="Adam decays no weights"):
        replace(ADAM, weight_decay=0.1)
    with pytest.raises(InputError, match="SGD decays no weights"):
        replace(ADAM, optimizer="sgd", weight_decay=0.1)


def test_hooks_see_gradients_before_they_are_clipped_and_may_change_gradients_rates_and_weights():
    model, seen = Affine(1.0), []

    def after_backward(progress, optimizer):
        seen.append((progress.step, model.inner.grad.norm().item(), optimizer.param_groups[0]["lr"]))
        model.outer.grad.zero_()

    def after_step(progress, optimizer):
        seen.append((progress.step, progress.last))
        with torch.no_grad():
            model.bias.fill_(7.0)
        return progress.step < 2

    done = fit(
        model, lambda i: None, replace(FLAT, weight_decay=0.0), after_backward=after_backward, after_step=after_step
    )
    assert [entry[0] for entry in seen] == [0, 1, 1, 2] and done.step == 2
    assert seen[0][1:] == pytest.approx((12**0.5, 0.1)) and seen[1][1] == pytest.approx(12 - 24 + 4 + 2)
    assert torch.equal(model.outer.data, torch.full((3, 4), -2.0)) and torch.equal(
        model.bias.data, torch.full((4,), 7.0)
    )


# Batches


Pair = namedtuple("Pair", ["x", "y"])


@dataclass(frozen=True)
class Both:
    x: torch.Tensor
    y: torch.Tensor


@pytest.mark.parametrize(
    "make", [lambda x, y: {"x": x, "y": y}, lambda x, y: (x, y), lambda x, y: [x, {"y": y}], Pair, Both]
)
def test_batches_of_any_shape_train_alike_and_have_no_tokens(make):
    x, y = torch.randn(20, 3, generator=torch.Generator().manual_seed(0)), torch.arange(20.0)

    def loss(model, batch):
        if isinstance(batch, dict | Both | Pair):
            a, b = (batch["x"], batch["y"]) if isinstance(batch, dict) else (batch.x, batch.y)
        else:
            a, b = batch[0], batch[1]["y"] if isinstance(batch[1], dict) else batch[1]
        return (model(a)[:, 0] - b).square().mean()

    def run(make):
        torch.manual_seed(0)
        model = torch.nn.Linear(3, 1)

        def batch_at(number):
            rows = epoch_rows(20, 6, number)
            return make(x[rows], y[rows])

        return weights(model), fit(model, batch_at, FLAT, loss=loss), weights(model)

    start, done, end = run(make)
    assert (done.step, done.tokens) == (3, 0) and not torch.equal(start["weight"], end["weight"])
    assert_equal(end, run(lambda x, y: (x, y))[2])


def test_tensors_anywhere_in_a_batch_move_and_the_rest_stays():
    x = torch.ones(2)
    batch = {"a": x, "b": (x, [x, "name", None]), "c": Pair(x, 3), "d": Both(x, x)}
    moved = on_device(batch, "meta")
    tensors = [moved["a"], moved["b"][0], moved["b"][1][0], moved["c"].x, moved["d"].x, moved["d"].y]
    assert all(tensor.device.type == "meta" for tensor in tensors)
    assert moved["b"][1][1:] == ["name", None] and moved["c"].y == 3 and isinstance(moved["d"], Both)
    assert x.device.type == "cpu"


def test_every_epoch_takes_each_row_once_in_an_order_of_its_own():
    epochs = [[epoch_rows(13, 4, 3 * e + i, seed=1).tolist() for i in range(3)] for e in range(3)]
    for epoch in epochs:
        rows = [row for batch in epoch for row in batch]
        assert len(rows) == 12 == len(set(rows)) and set(rows) <= set(range(13))
    assert epochs[0] != epochs[1] != epochs[2] != epochs[0]
    assert epoch_rows(13, 4, 5, seed=1).tolist() == epochs[1][2] != epoch_rows(13, 4, 5, seed=2).tolist()
    assert sorted(epoch_rows(3, 4, 0).tolist()) == [0, 1, 2], "fewer rows than a batch: all of them"
    assert drawn_rows(5, 50, 2, 1).tolist() == drawn_rows(5, 50, 2, 1).tolist() != drawn_rows(5, 50, 1, 2).tolist()


def test_a_run_without_a_folder_writes_nothing_and_says_nothing(tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr(tempfile, "tempdir", None)
    told = []
    fit(
        tiny(),
        batch_at,
        replace(SETTINGS, save_minutes=0.0, steps=3),
        loss=next_token_loss,
        judge=lambda: 1.0,
        bar=lambda more=1, note="": told.append((more, note)),
    )
    assert not any(tmp_path.iterdir())
    assert capfd.readouterr() == ("", "")
    assert [more for more, _ in told] == [1, 1, 1] and all(note.startswith("loss 3.") for _, note in told)


# Randomness


class Dropping(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.linear, self.dropout = torch.nn.Linear(8, 8), torch.nn.Dropout(0.5)

    def forward(self, batch):
        return self.dropout(self.linear(batch)).square().mean() + self.linear.weight.square().sum()


def dropping(folder=None, **more):
    torch.manual_seed(3)
    model = Dropping()
    fit(model, lambda i: torch.full((4, 8), float(i)), replace(FLAT, steps=6), folder, **more)
    return weights(model)


def test_a_resumed_run_draws_the_dropout_of_one_that_was_never_stopped(tmp_path):
    with pytest.raises(KeyboardInterrupt):
        dropping(tmp_path, after_step=stop_at(3, signal.SIGINT))
    assert_equal(dropping(tmp_path), dropping())


def test_training_leaves_the_random_state_of_the_caller_as_it_was():
    torch.manual_seed(11)
    wanted = torch.rand(3)
    torch.manual_seed(11)
    fit(Affine(), lambda i: torch.rand(1), FLAT)
    assert torch.equal(torch.rand(3), wanted)


# The best state


class Walk(torch.nn.Module):
    """A number that grows by the rate each step; a buffer that counts, and a frozen weight."""

    def __init__(self):
        super().__init__()
        self.place = torch.nn.Parameter(torch.zeros(1))
        self.frozen = torch.nn.Parameter(torch.ones(1), requires_grad=False)
        self.register_buffer("count", torch.zeros(()))

    def forward(self, batch):
        if self.training:
            self.count += 1
        return -self.place.sum()


WALK = replace(ADAM, rate=1.0, every=1)


def walked(steps, losses, folder=None, start=None, **more):
    model, modes = Walk(), []

    def judge():
        modes.append((model.training, torch.is_grad_enabled()))
        return losses[round(model.place.item())]

    done = fit(model, lambda i: None, replace(WALK, steps=steps, **more), folder, judge=judge)
    assert set(modes) <= {(False, False)}
    return round(model.place.item()), model.count.item(), done


def test_a_run_ends_in_its_best_state_of_several_equal_ones_the_last():
    losses = [9, 5, 3, 4, 3, 6, 7]
    assert walked(6, losses)[:2] == (4, 4)
    assert walked(6, losses)[2].judged == dict(enumerate(losses[1:], 1))
    assert walked(6, losses, every=3)[:2] == (3, 3), "judged at 3 and 6 alone"
    assert walked(5, losses, every=4)[2].judged == {4: 3, 5: 6}, "and at the end"


def test_patience_counts_judgements_without_a_better_one():
    losses = [9, 5, 3, 4, 3, 6, 1]
    place, _, done = walked(6, losses, patience=3)
    assert (place, done.step) == (4, 5), "3 at step 4 is no better than 3 at step 2"
    assert walked(6, losses, patience=4)[0] == 6


def test_the_best_state_outlives_an_interruption(tmp_path):
    losses = [9, 5, 1, 4, 3, 6, 7]
    assert walked(4, losses, tmp_path)[0] == 2
    names = sorted(path.name for path in states(tmp_path)[-1].iterdir())
    assert "best.safetensors" in names and states(tmp_path)[-1].name == "step-00000004"
    place, count, done = walked(6, losses, tmp_path)  # goes on from step 4, not from the best
    assert (place, count, done.step) == (2, 2, 6) and done.judged == dict(enumerate(losses[1:], 1))
    again = walked(6, losses, tmp_path)
    assert again[0] == 2 and again[2].step == 6


def test_a_run_that_ran_out_of_patience_stays_over(tmp_path):
    losses = [9, 1, 3, 4, 3, 6, 7]
    assert walked(6, losses, tmp_path, patience=2)[2].step == 3
    place, _, done = walked(6, losses, tmp_path, patience=2)
    assert (place, done.step) == (1, 3)


def test_settings_without_sense_and_models_without_weights_are_refused():
    for wrong in ({"steps": 0}, {"rows": 0}, {"every": 0}, {"epochs": 0}):
        with pytest.raises(InputError, match="give at least 1"):
            TrainSettings(**wrong)
    with pytest.raises(InputError, match="no parameter of Linear asks for gradients"):
        fit(torch.nn.Linear(2, 2).requires_grad_(False), lambda i: None, FLAT)
    of = TrainSettings(epochs=3, rows=8).for_examples(20)
    assert (of.steps, of.every) == (6, 2) and TrainSettings(epochs=3, steps=5).for_examples(20).steps == 5
