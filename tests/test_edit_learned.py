import signal
from dataclasses import dataclass, field, replace

import numpy as np
import pytest
import torch
from architectures import build, opened
from toys import permutation_toy

import manyheads as mh
from manyheads.edit.learn.examples import Answered, Portions
from manyheads.edit.learn.lesson import learn_edit
from manyheads.edit.learn.lofit import lofit, select_heads
from manyheads.edit.learn.selective_tuning import tune_heads
from manyheads.edit.learn.soft_injection import injection_edit, soft_injection, task_embedding
from manyheads.edit.learn.tuning import LEARNING, answer_accuracy, held_out_loss
from manyheads.errors import InputError, UnsupportedError
from manyheads.files import working_folder
from manyheads.lab.permutations import TASKS, permutation_prompts
from manyheads.training.checkpoint import states

QUICK = replace(LEARNING, rate=1e-2, epochs=2, rows=4)


def some(model, n=8, length=6, seed=0):
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, 58, (n, length + 1), generator=generator)
    return Answered.of_tokens(ids[:, :-1], ids[:, -1])


def weights(model):
    return {name: value.clone() for name, value in model.plain.state_dict().items()}


def answer_loss(model, examples, edits):
    with model.editing(*edits):
        return -float(examples.log_p(model.logits(examples.inputs(model))).mean())


@pytest.mark.parametrize("name", ["llama", "gpt2", "qwen3", "opt"])
def test_lofit_learns_its_examples_with_few_numbers_and_leaves_the_weights_bit_for_bit(name):
    model = mh.open_model(build(name))
    examples, before = some(model), weights(model)
    edit = lofit(model, examples, heads=2, selection=QUICK, tuning=replace(LEARNING, rate=5e-2, epochs=30, rows=8))
    assert len(edit.heads) == 2 and (edit.scale == 1).all() and edit.shift.shape == (2, model.head_dim)
    assert answer_loss(model, examples, edit.edits()) < answer_loss(model, examples, []) - 0.05
    assert all(torch.equal(value, before[key]) for key, value in weights(model).items())
    assert all(p.requires_grad for p in model.plain.parameters())


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_learned_offsets_fold_into_the_bias(name):
    model = mh.open_model(build(name))
    examples = some(model)
    edit = lofit(model, examples, heads=["L1H0"], tuning=QUICK)
    baked = edit.bake(model)
    with model.editing(*edit.edits()):
        wanted = model.logits(examples.inputs(model))
    assert (baked.logits(examples.inputs(model)) - wanted).abs().max() < 1e-5


def test_heads_that_write_nothing_are_never_chosen():
    model = opened("llama")
    dead = model.head_set([(layer, h) for layer in range(3) for h in (0, 2)])
    scores = select_heads(
        model.bake(mh.Scale(dead, 0.0)), some(model), sparsity=5e-3, settings=replace(LEARNING, rate=5e-3, epochs=40)
    )
    assert min(scores[h] for h in model.heads - dead) > max(scores[h] for h in dead)


def test_held_out_examples_keep_the_best_state_and_end_the_run():
    model = opened("llama")
    train, dev = some(model, seed=1), some(model, seed=2)
    edit = lofit(model, train, heads=["L0H0"], dev=dev, tuning=replace(LEARNING, rate=0.5, epochs=40, patience=2))
    measured = answer_loss(model, dev, edit.edits())
    assert measured == pytest.approx(edit.effect["held-out loss"], abs=1e-4)
    long = lofit(model, train, heads=["L0H0"], tuning=replace(LEARNING, rate=0.5, epochs=40))
    assert measured < answer_loss(model, dev, long.edits()) - 0.1


def test_an_interrupted_run_goes_on_to_the_same_edit(tmp_path):
    model, examples = opened("llama"), some(opened("llama"))
    whole = lofit(model, examples, heads=["L0H0"], tuning=replace(LEARNING, rate=1e-2, steps=10))
    lofit(model, examples, heads=["L0H0"], tuning=replace(LEARNING, rate=1e-2, steps=4), folder=tmp_path)
    parted = lofit(model, examples, heads=["L0H0"], tuning=replace(LEARNING, rate=1e-2, steps=10), folder=tmp_path)
    assert torch.allclose(whole.shift, parted.shift, atol=1e-7)


@dataclass(frozen=True)
class Interrupting:
    """Examples that send Ctrl-C the `at`-th time their loss is asked for."""

    inner: Answered
    at: int
    asked: list[int] = field(default_factory=list)

    @property
    def input_ids(self):
        return self.inner.input_ids

    def __len__(self):
        return len(self.inner)

    def rows(self, index):
        return Interrupting(self.inner.rows(index), self.at, self.asked)

    def loss(self, log_p):
        self.asked.append(1)
        if len(self.asked) == self.at:
            signal.raise_signal(signal.SIGINT)
        return self.inner.loss(log_p)


@pytest.mark.parametrize("step", [3, 4, 5])  # before a look, at one (which is then not taken), after one
def test_a_run_that_ctrl_c_stopped_goes_on_to_the_same_edit_and_the_same_looks(tmp_path, step):
    model, examples, dev = opened("llama"), some(opened("llama"), n=16), some(opened("llama"), seed=1)
    how = replace(LEARNING, rate=5e-2, steps=14, rows=4, every=2, patience=3)
    whole = lofit(model, examples, heads=["L0H0"], dev=dev, tuning=how)
    with pytest.raises(KeyboardInterrupt):
        lofit(model, Interrupting(examples, step), heads=["L0H0"], dev=dev, tuning=how, folder=tmp_path)
    assert states(tmp_path / "tuning")[-1].name == f"step-{step:08d}"
    parted = lofit(model, examples, heads=["L0H0"], dev=dev, tuning=how, folder=tmp_path)
    assert torch.allclose(whole.shift, parted.shift, atol=1e-7)
    assert whole.effect["held-out loss"] == pytest.approx(parted.effect["held-out loss"], abs=1e-6)


def test_a_run_that_stopped_early_is_over_for_the_same_call(tmp_path):
    model, examples, dev = opened("llama"), some(opened("llama")), some(opened("llama"), seed=2)
    how = replace(LEARNING, rate=0.5, steps=60, rows=4, every=2, patience=2)
    first, again = (lofit(model, examples, heads=["L0H0"], dev=dev, tuning=how, folder=tmp_path) for _ in range(2))
    last = states(tmp_path / "tuning")[-1].name
    assert last < "step-00000060" and torch.equal(first.shift, again.shift) and first.effect == again.effect


def test_tuned_heads_stop_early_too_and_keep_the_best_state():
    model, examples, dev = opened("llama"), some(opened("llama")), some(opened("llama"), seed=2)
    how = replace(LEARNING, rate=0.02, steps=40, rows=8, every=1, patience=2)

    def of(steps, **more):
        tuned = tune_heads(model, examples, ["L1H0"], settings=replace(how, steps=steps), **more)
        return answer_loss(tuned, dev, [])

    losses = [of(steps) for steps in range(1, 7)]
    best = next(i for i in range(5) if all(later > losses[i] for later in losses[i + 1 : i + 3]))
    assert of(40, dev=dev) == pytest.approx(losses[best], abs=1e-6)


def test_a_task_embedding_is_the_mean_z_of_last_tokens():
    model = opened("llama")
    ids = torch.arange(3, 53).reshape(5, 10)
    assert torch.allclose(task_embedding(model, ids), model.read_z(ids)[:, :, -1].mean(1), atol=1e-6)


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_closed_gates_are_the_model_and_open_ones_put_the_embedding_there(name):
    model, ids = opened(name), torch.arange(3, 33).reshape(3, 10)
    embedding = torch.randn(*model.shape, model.head_dim, generator=torch.Generator().manual_seed(0))
    plain = model.logits(ids)
    with model.editing(*injection_edit(model, torch.zeros(model.shape), embedding).edits(prompt_length=10)):
        assert (model.logits(ids) - plain).abs().max() < 1e-5
    with model.editing(*injection_edit(model, torch.ones(model.shape), embedding).edits(prompt_length=10)):
        z = model.read_z(ids)
    assert torch.allclose(z[:, :, -1], embedding[:, None].expand(-1, 3, -1, -1), atol=1e-6)
    assert torch.allclose(z[0, :, :-1], model.read_z(ids)[0, :, :-1])


def test_injection_learns_gates_alone_and_injects_once_while_decoding():
    model = mh.open_model(build("llama"))
    before, examples = weights(model), some(model)
    embedding = torch.randn(*model.shape, model.head_dim, generator=torch.Generator().manual_seed(0))
    found = soft_injection(model, embedding, examples, settings=replace(LEARNING, rate=0.2, steps=60, rows=8))
    assert found.gates.values.size == len(model.heads) and ((found.gates.values > 0) & (found.gates.values < 1)).all()
    assert all(torch.equal(value, before[key]) for key, value in weights(model).items())
    closed = injection_edit(model, torch.full(model.shape, 0.5), embedding)
    loss = {
        name: answer_loss(model, examples, e.edits(prompt_length=6)) for name, e in (("0", closed), ("1", found.edit))
    }
    assert loss["1"] < loss["0"]
    ids = examples.input_ids[:2, :6]
    with model.editing(*found.edit.edits(prompt_length=6)):
        cached = model.generate(ids, max_new_tokens=4, do_sample=False)
        slow = model.generate(ids, max_new_tokens=4, do_sample=False, use_cache=False)
    assert torch.equal(cached, slow)
    with pytest.raises(UnsupportedError, match="cannot be baked"):
        found.edit.bake(model)


def test_wrong_examples_and_shapes_are_refused():
    model = opened("llama")
    with pytest.raises(InputError, match="no examples"):
        lofit(model, some(model).rows(slice(0, 0)), heads=["L0H0"])
    with pytest.raises(InputError, match="asked for 0 heads"):
        lofit(model, some(model), heads=0)
    with pytest.raises(InputError, match=r"shape \[1, 2, 3\]"):
        soft_injection(model, torch.zeros(1, 2, 3), some(model))
    given = some(model)
    uneven = Answered(given.input_ids, given.attention_mask, given.is_answer.clone())
    uneven.is_answer[0, 2] = True
    with pytest.raises(InputError, match="different columns"):
        lofit(model, uneven, heads=["L0H0"])


# The trained toy: four permutations of 16 tokens (slow)


def zero_shot(task, n, seed):
    given = permutation_prompts(n, shots=0, task=task, seed=seed)
    return Answered.of_tokens(given.tokens, given.answers)


@pytest.mark.slow
def test_on_the_toy_selection_finds_every_live_head_before_any_dead_one():
    model = permutation_toy()
    places = np.random.default_rng(0).permutation(24)[:8]
    dead = model.head_set([(int(i) // 8, int(i) % 8) for i in places])
    how = replace(LEARNING, rate=5e-3, steps=150)
    scores = select_heads(model.bake(mh.Scale(dead, 0.0)), zero_shot(0, 1200, 1), sparsity=5e-3, settings=how)
    ratio = min(scores[h] for h in model.heads - dead) / max(scores[h] for h in dead)
    print(f"least live over largest dead norm: {ratio:.0f}")
    assert ratio >= 50


@pytest.mark.slow
def test_on_the_toy_three_heads_teach_a_permutation_and_chosen_ones_hardly_better_than_random():
    model = permutation_toy()
    how = replace(LEARNING, rate=1e-2, steps=150)
    rows = []
    for task in range(TASKS):
        train, test = zero_shot(task, 1200, 1), zero_shot(task, 200, 2)
        edit = lofit(
            model, train, heads=3, sparsity=5e-3, selection=replace(LEARNING, rate=5e-3, steps=150), tuning=how
        )
        other = [lofit(model, train, heads=heads, tuning=how) for heads in edit.heads.matched_random(3, task)]
        everything = lofit(model, train, heads=model.heads, tuning=how)
        random = np.mean([answer_accuracy(model, test, e.edits()) for e in other])
        rows.append(
            [
                answer_accuracy(model, test),
                answer_accuracy(model, test, edit.edits()),
                random,
                answer_accuracy(model, test, everything.edits()),
            ]
        )
    before, chosen, random, everything = np.mean(rows, 0)
    print(f"zero-shot {before:.2f}, three chosen heads {chosen:.2f}, three random {random:.2f}, all {everything:.2f}")
    assert chosen >= before + 0.25 and everything >= 0.95
    assert random >= before + 0.25  # which is why chosen heads prove nothing here


@pytest.mark.slow
def test_on_two_toys_injection_answers_without_demonstrations():
    table = np.mean([_injected(seed) for seed in (0, 1)], 0)
    before, after, erased, foreign, shuffled = table
    print(
        f"zero-shot {before:.2f}, injected {after:.2f}, all gates open {erased:.2f}, another task's embedding {foreign:.2f}, "
        f"gates shuffled over heads {shuffled:.2f}"
    )
    assert before <= 0.5 and after >= 0.95 and erased <= 0.15
    assert max(foreign, shuffled) <= after - 0.3


def _injected(seed):
    """Accuracy without, with, with all gates open, with another task's embedding, with gates shuffled: means over four tasks."""
    model, rng = permutation_toy(seed), np.random.default_rng(0)
    shown = [permutation_prompts(50, task=task, seed=5).tokens for task in range(TASKS)]
    embeddings = [task_embedding(model, prompts) for prompts in shown]
    rows = []
    for task, embedding in enumerate(embeddings):
        found = soft_injection(model, embedding, zero_shot(task, 400, 1), dev=zero_shot(task, 100, 3))
        test, values = zero_shot(task, 200, 2), found.gates.values
        mixed = torch.from_numpy(rng.permutation(values.ravel()).reshape(values.shape)).float()
        others = [e for i, e in enumerate(embeddings) if i != task]
        kinds = [
            [found.edit],
            [injection_edit(model, torch.ones(model.shape), embedding)],
            [found.with_embedding(model, other) for other in others],
            [injection_edit(model, mixed, embedding)],
        ]
        length = test.input_ids.shape[1] - 1
        right = [np.mean([answer_accuracy(model, test, e.edits(prompt_length=length)) for e in kind]) for kind in kinds]
        rows.append([answer_accuracy(model, test), *right])
    return np.mean(rows, 0)


def test_held_out_loss_is_the_mean_over_all_rows():
    model, examples = opened("llama"), some(opened("llama"), n=7)
    from manyheads.edit.learn.lofit import _Offsets

    learned = _Offsets(model, model.head_set(["L0H0"]), 0)
    whole = held_out_loss(learned, examples)
    assert held_out_loss(learned, examples, rows=3) == pytest.approx(whole, abs=1e-5)


def test_wrong_ways_to_learn_an_edit_are_refused_before_anything_is_read(tmp_path):
    portions = Portions([], [], [])
    with pytest.raises(InputError, match="method is 'hope'; choose from lofit, inject, tune"):
        learn_edit(None, portions, "hope", folder=tmp_path)
    with pytest.raises(InputError, match="prompts that follow examples"):
        learn_edit(None, portions, "inject", folder=tmp_path)


def test_a_working_folder_goes_on_with_its_own_request_only_and_stays_after_an_interruption(tmp_path):
    folder = tmp_path / "work"
    with pytest.raises(KeyboardInterrupt), working_folder(folder, {"seed": 1}):
        (folder / "state").write_text("half")
        raise KeyboardInterrupt
    with pytest.raises(InputError, match="not the work of this call"), working_folder(folder, {"seed": 2}):
        pass
    with working_folder(folder, {"seed": 1}, keep=True):
        assert (folder / "state").read_text() == "half"
    with pytest.raises(InputError, match="of ours"), working_folder(folder, {"seed": 1}):
        raise InputError("an error of ours")
    assert folder.exists(), "it was not new"
    with working_folder(folder, {"seed": 1}):
        pass
    assert not folder.exists()
    with pytest.raises(InputError, match="of ours"), working_folder(folder, {"seed": 1}):
        raise InputError("an error of ours")
    assert not folder.exists()
