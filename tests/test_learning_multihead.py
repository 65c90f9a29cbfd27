"""Several heads on one trunk: what is minimised, whose gradient reaches the trunk, what is saved, and what is refused."""

import json
import os
import signal
from dataclasses import replace

import pytest
import torch
from architectures import build, opened
from torch import nn
from torch.nn import functional as F

import manyheads as mh
from manyheads.errors import InputError, MismatchError, UnsupportedError
from manyheads.learning import (
    Attached,
    GradNorm,
    Head,
    LinearHead,
    LinearSettings,
    MultiHead,
    PCGrad,
    ScalarHead,
    Trunk,
    Uncertainty,
    Weighting,
    features,
    gradient_conflicts,
    sequence_classifier,
)
from manyheads.training import ADAM, TrainSettings, drawn_rows

WIDTH = 6


def _data(n=64, seed=0):
    draw = torch.Generator().manual_seed(seed)
    x = torch.randn(n, 5, generator=draw)
    return {"x": x, "kind": (x[:, 0] > 0).long() + (x[:, 1] > 0).long(), "size": x[:, 2] - x[:, 3]}


DATA = _data()


def _trunk(seed=0):
    torch.manual_seed(seed)

    class Small(nn.Module):
        def __init__(self):
            super().__init__()
            self.layers = nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.Linear(8, WIDTH), nn.Tanh())

        def forward(self, x):
            return self.layers(x)

    return Small()


def _heads(trunk=None, **options):
    kind = Attached(LinearHead(LinearSettings(WIDTH, 3)), **options.get("kind", {}))
    size = Attached(ScalarHead(LinearSettings(WIDTH, 1)), weight=0.5, **options.get("size", {}))
    return MultiHead(trunk or Trunk(_trunk(), frozen=False), {"kind": kind, "size": size})


def _batches(i):
    rows = drawn_rows(64, 16, i)
    return {name: values[rows] for name, values in DATA.items()}


RUN = replace(ADAM, steps=30, rate=1e-2)


def test_two_heads_train_as_in_a_loop_written_by_hand():
    heads = _heads()
    heads.fit(_batches, RUN, log_every=7)
    trunk, kind, size = _trunk(), LinearHead(LinearSettings(WIDTH, 3)), ScalarHead(LinearSettings(WIDTH, 1))
    optimizer = torch.optim.Adam([*trunk.parameters(), *kind.parameters(), *size.parameters()], lr=1e-2)
    for i in range(30):
        batch = _batches(i)
        state = trunk(batch["x"])
        loss = F.cross_entropy(kind(state), batch["kind"]) + 0.5 * F.mse_loss(size(state)[:, 0], batch["size"])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    for mine, other in zip(heads.backbone.parameters(), trunk.parameters(), strict=True):
        torch.testing.assert_close(mine, other, rtol=0, atol=1e-6)
    for mine, other in zip(heads.heads["size"].parameters(), size.parameters(), strict=True):
        torch.testing.assert_close(mine, other, rtol=0, atol=1e-6)


def _gradients(heads, share=1.0, names=("kind", "size")):
    heads.zero_grad()
    losses = heads.losses(DATA, share)
    sum(losses[name] for name in names).backward()
    return torch.cat(
        [(torch.zeros_like(p) if p.grad is None else p.grad).flatten() for p in heads.backbone.parameters()]
    )


def test_a_gradient_flows_stops_or_is_reversed_and_the_head_learns_all_the_same():
    flows = _gradients(_heads(), names=("size",))
    assert flows.abs().max() > 1e-3
    stops, reverse = _heads(size={"gradient": "stops"}), _heads(size={"gradient": "reversed"})
    assert torch.equal(_gradients(stops, names=("size",)), torch.zeros_like(flows))
    torch.testing.assert_close(_gradients(reverse, names=("size",)), -flows)
    plain = _heads()
    _gradients(plain)
    for other in (stops, reverse):
        torch.testing.assert_close(other.heads["size"].linear.weight.grad, plain.heads["size"].linear.weight.grad)


def test_a_head_probes_before_it_tunes():
    heads = _heads(kind={"tunes_from": 0.5}, size={"tunes_from": 0.5})
    assert not _gradients(heads, share=0.4).any()
    torch.testing.assert_close(_gradients(heads, share=0.5), _gradients(_heads()))
    before = [p.clone() for p in heads.backbone.parameters()]
    heads.fit(_batches, replace(RUN, steps=10), log_every=100)
    probing = _heads(kind={"tunes_from": 1.0}, size={"tunes_from": 1.0})
    probing.fit(_batches, replace(RUN, steps=10))
    assert all(torch.equal(a, b) for a, b in zip(before, probing.backbone.parameters(), strict=True))
    assert not all(torch.equal(a, b) for a, b in zip(before, heads.backbone.parameters(), strict=True))


def test_while_only_probes_train_the_trunk_drops_nothing_out():
    trunk = nn.Sequential(nn.Linear(5, WIDTH), nn.Dropout(0.9))
    heads = MultiHead(
        Trunk(trunk, frozen=False), {"size": Attached(ScalarHead(LinearSettings(WIDTH, 1)), tunes_from=0.5)}
    )
    heads.train()
    batch = {"input": DATA["x"], "size": DATA["size"]}
    assert torch.equal(heads.losses(batch, 0.1)["size"], heads.losses(batch, 0.1)["size"])
    assert not torch.equal(heads.losses(batch, 0.9)["size"], heads.losses(batch, 0.9)["size"])


def test_a_weight_may_change_over_the_run_and_a_head_of_weight_0_is_not_run():
    class Counted(ScalarHead):
        calls = 0

        def forward(self, states):
            Counted.calls += 1
            return super().forward(states)

    head = Attached(Counted(LinearSettings(WIDTH, 1)), weight=lambda share: 0.0 if share < 0.5 else 1.0)
    heads = MultiHead(Trunk(_trunk(), frozen=False), {"kind": LinearHead(LinearSettings(WIDTH, 3)), "size": head})
    assert set(heads.losses(DATA, 0.2)) == {"kind"} and set(heads.losses(DATA, 0.5)) == {"kind", "size"}
    heads.check(DATA)
    Counted.calls = 0
    heads.fit(_batches, replace(RUN, steps=10))
    assert Counted.calls == 5 + 1  # one is the check


def test_rows_without_a_target_do_not_count():
    heads = _heads()
    some = dict(DATA, kind=DATA["kind"].where(torch.arange(64) % 2 == 0, -100))
    half = {name: values[::2] for name, values in DATA.items()}
    torch.testing.assert_close(heads.losses(some)["kind"], heads.losses(half)["kind"])
    none = dict(DATA, kind=torch.full((64,), -100))
    assert set(heads.losses(none)) == {"size"}
    unlabelled = {"x": DATA["x"], "size": DATA["size"]}
    assert set(heads.losses(unlabelled)) == {"size"}
    assert heads(DATA)["kind"].shape == (64, 3)


def test_a_head_of_tokens_learns_from_tokens_with_a_target_and_never_from_padding():
    model = opened("llama")
    ids = torch.randint(3, 50, (2, 6), generator=torch.Generator().manual_seed(1))
    mask = torch.tensor([[1, 1, 1, 1, 1, 1], [1, 1, 1, 0, 0, 0]])
    tags = torch.randint(0, 4, (2, 6), generator=torch.Generator().manual_seed(2))
    width = Trunk(model).width
    heads = MultiHead(
        Trunk(model),
        {
            "tag": Attached(LinearHead(LinearSettings(width, 4)), layer=1, pool="tokens"),
            "depth": Attached(ScalarHead(LinearSettings(width, 1)), pool="tokens"),
        },
    )
    batch = {"input_ids": ids, "attention_mask": mask, "tag": tags, "depth": tags.float()}
    states = heads.trunk.states(batch, [1, -1])
    real = mask.bool()
    losses = heads.losses(batch)
    torch.testing.assert_close(losses["tag"], F.cross_entropy(heads.heads["tag"](states[0])[real], tags[real]))
    torch.testing.assert_close(
        losses["depth"], F.mse_loss(heads.heads["depth"](states[1])[real][:, 0], tags[real].float())
    )
    assert heads(batch)["tag"].shape == (2, 6, 4)
    first = dict(batch, tag=tags.where(torch.arange(6) == 0, -100))
    torch.testing.assert_close(
        heads.losses(first)["tag"], F.cross_entropy(heads.heads["tag"](states[0][:, 0]), tags[:, 0])
    )


# Balances


def _flat(heads, balance):
    """The gradient at the trunk that training with a balance uses."""
    from manyheads.learning.objective import _Objective

    balance.begin(2)
    objective = _Objective(heads, balance, 1)
    heads.zero_grad()
    value = objective((0, 1.0, DATA))
    value.backward()
    return torch.cat([p.grad.flatten() for p in heads.backbone.parameters()]), value, objective


def _opposed():
    """Two heads whose gradients conflict: one wants the size, the other its opposite."""
    trunk = Trunk(_trunk(), frozen=False)
    a, b = ScalarHead(LinearSettings(WIDTH, 1)), ScalarHead(LinearSettings(WIDTH, 1, seed=3))
    with torch.no_grad():
        b.linear.weight.copy_(-a.linear.weight + 0.1 * b.linear.weight)
    return MultiHead(trunk, {"a": Attached(a, target="size"), "b": Attached(b, target="size")})


def test_pcgrad_takes_out_of_each_gradient_what_conflicts_with_the_other():
    heads = _opposed()
    g = [_gradients(heads, names=(name,)) for name in ("a", "b")]
    assert g[0] @ g[1] < 0
    wanted = g[0] + g[1] - (g[0] @ g[1]) * (g[1] / (g[1] @ g[1]) + g[0] / (g[0] @ g[0]))
    got, value, objective = _flat(heads, PCGrad())
    torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-6)
    assert got @ g[0] >= 0 and got @ g[1] >= 0
    torch.testing.assert_close(value, sum(heads.losses(DATA).values()).detach())
    seen = objective.seen[0].gram
    torch.testing.assert_close(seen[0, 1], g[0] @ g[1], rtol=1e-4, atol=1e-7)
    # The heads' own layers get their own gradients.
    heads.zero_grad()
    own = torch.autograd.grad(heads.losses(DATA)["a"], heads.heads["a"].linear.weight)[0]
    _flat(heads, PCGrad())
    torch.testing.assert_close(heads.heads["a"].linear.weight.grad, own)


def test_gradients_that_agree_are_left_alone():
    trunk = Trunk(_trunk(), frozen=False)
    head = ScalarHead(LinearSettings(WIDTH, 1))
    heads = MultiHead(
        trunk, {"a": Attached(head, target="size"), "b": Attached(ScalarHead(LinearSettings(WIDTH, 1)), target="size")}
    )
    torch.testing.assert_close(_flat(heads, PCGrad())[0], 2 * _gradients(heads, names=("a",)), rtol=1e-4, atol=1e-7)


def test_pcgrad_is_torchjds_and_its_other_weightings_work_too():
    aggregation = pytest.importorskip("torchjd.aggregation")
    draw = torch.Generator().manual_seed(0)
    for _ in range(20):
        g = torch.randn(2, 5, generator=draw)
        gram = g @ g.T
        theirs = aggregation.PCGradWeighting()(gram)
        torch.testing.assert_close(PCGrad().coefficients(torch.ones(2), gram, [0, 1]), theirs, rtol=1e-4, atol=1e-5)
    heads = _opposed()
    mean, _, _ = _flat(heads, Weighting(aggregation.MeanWeighting()))
    torch.testing.assert_close(mean, _gradients(heads, names=("a", "b")) / 2, rtol=1e-4, atol=1e-6)
    with pytest.raises(InputError, match="one number for each of 2 heads"):
        _flat(heads, Weighting(lambda gram: gram))


def test_uncertainty_finds_the_weight_of_each_loss():
    balance = Uncertainty()
    balance.begin(2)
    losses = torch.tensor([4.0, 0.25])
    optimizer = torch.optim.Adam(balance.parameters(), lr=0.05)
    for _ in range(400):
        optimizer.zero_grad()
        balance.total(losses, [0, 1]).backward()
        optimizer.step()
    torch.testing.assert_close(
        torch.exp(-balance.log_variances).detach() * losses, torch.tensor([0.5, 0.5]), rtol=0, atol=0.01
    )
    heads = _heads()
    used = Uncertainty()
    heads.fit(_batches, RUN, balance=used)
    assert used.log_variances.abs().min() > 1e-3


def test_gradnorm_brings_gradients_to_one_size():
    heads = _heads(size={"target": "large"})

    def big(i):
        return {**(batch := _batches(i)), "large": 30 * batch["size"]}

    balance = GradNorm(alpha=0.0, rate=0.01)
    run = heads.fit(big, replace(RUN, steps=150, rate=1e-4), balance=balance, log_every=1)
    frame = run.conflicts.to_frame()
    sizes = frame[["norm_a", "norm_b"]].to_numpy()
    first, last = sizes[0, 1] / sizes[0, 0], sizes[-1, 1] / sizes[-1, 0]
    weighted = last * float(balance.weights[1] / balance.weights[0])
    assert first > 5 and 0.7 < weighted < 1.4
    torch.testing.assert_close(balance.weights.sum(), torch.tensor(2.0))


# What is seen


def test_conflicts_are_cosines_of_the_heads_gradients():
    heads = _opposed()
    found = gradient_conflicts(heads, [DATA, _batches(0)])
    a, b = (_gradients(heads, names=(name,)) for name in ("a", "b"))
    row = found.to_frame().iloc[0]
    assert abs(row["cosine"] - float(F.cosine_similarity(a, b, dim=0))) < 1e-5
    assert abs(row["norm_a"] - float(a.norm())) < 1e-5
    summary = found.summary().iloc[0]
    assert summary["n"] == 2 and summary["conflicts"] == 1.0
    with pytest.raises(InputError, match="frozen"):
        gradient_conflicts(MultiHead(_trunk(), {"size": ScalarHead(LinearSettings(WIDTH, 1))}), [DATA])


def test_a_run_says_each_heads_loss_and_a_head_is_measured():
    heads = _heads()
    run = heads.fit(_batches, replace(RUN, steps=200), log_every=50)
    assert list(run.losses["step"].unique()) == [0, 50, 100, 150] and set(run.losses["head"]) == {"kind", "size"}
    first, last = (run.losses.query("head == 'size'")["loss"].iloc[i] for i in (0, -1))
    assert last < first / 2
    found = heads.evaluate([{n: v[:40] for n, v in DATA.items()}, {n: v[40:] for n, v in DATA.items()}])
    values = found.set_index(["head", "metric"])["value"]
    output = heads(DATA)["kind"]
    assert values["kind", "accuracy"] == pytest.approx(float((output.argmax(1) == DATA["kind"]).float().mean()))
    assert values["size", "r2"] > 0.5 and values["size", "loss"] == pytest.approx(values["size", "rmse"] ** 2)


def test_an_interrupted_run_ends_where_an_uninterrupted_one_does(tmp_path):
    settings = replace(RUN, steps=20)
    whole = _heads()
    kept = whole.fit(_batches, settings, tmp_path / "whole", balance=GradNorm(), log_every=3)
    cut = _heads()

    def stopped(i):  # Ctrl-C during a step ends after it, with the state on disk
        if i == 11:
            os.kill(os.getpid(), signal.SIGINT)
        return _batches(i)

    with pytest.raises(KeyboardInterrupt):
        cut.fit(stopped, settings, tmp_path / "cut", balance=GradNorm(), log_every=3)
    again = _heads()
    run = again.fit(_batches, settings, tmp_path / "cut", balance=GradNorm(), log_every=3)
    for a, b in zip(whole.parameters(), again.parameters(), strict=True):
        assert torch.equal(a, b)
    assert run.losses.equals(kept.losses) and len(run.conflicts.seen) == len(kept.conflicts.seen) == 7


def test_a_killed_run_sees_no_step_twice_and_a_clock_is_no_reason_to_look_at_every_step(tmp_path):
    folder, settings = tmp_path / "run", replace(RUN, steps=12, save_minutes=60.0)
    whole = _heads().fit(_batches, settings, log_every=3)

    def killed(i):
        if i == 8:
            raise OSError("the machine went away")
        return _batches(i)

    with pytest.raises(OSError, match="went away"):  # no state is there yet, but the looks of steps 0, 3 and 6 are
        _heads().fit(killed, settings, folder, log_every=3)
    assert json.loads((folder / "heads.json").read_text())["gradients"]
    again = _heads().fit(_batches, settings, folder, log_every=3)
    assert [one.step for one in again.conflicts.seen] == [one.step for one in whole.conflicts.seen] == [0, 3, 6, 9]
    clocked = _heads().fit(_batches, replace(RUN, steps=None, minutes=0.01))
    assert len(clocked.conflicts.seen) <= 1 + clocked.progress.step // 100


# Files


def test_heads_on_a_frozen_trunk_come_back_bit_for_bit_and_beside_that_trunk_only(tmp_path):
    model = opened("llama")
    heads = MultiHead(
        model, {"a": Attached(LinearHead(LinearSettings(Trunk(model).width, 3)), layer=1, pool="last", stays=True)}
    )
    batch = {"input_ids": torch.randint(3, 50, (2, 6))}
    heads.save(tmp_path / "heads")
    assert not (tmp_path / "heads" / "trunk").exists()
    again = MultiHead.load(tmp_path / "heads", model)
    assert torch.equal(again(batch)["a"], heads(batch)["a"])
    assert again.attached["a"].layer == 1 and again.attached["a"].pool == "last" and again.attached["a"].target == "a"
    with pytest.raises(InputError, match="give the model they were trained on"):
        MultiHead.load(tmp_path / "heads")
    with pytest.raises(MismatchError, match="beside model"):
        MultiHead.load(tmp_path / "heads", opened("gpt2"))
    with pytest.raises(InputError, match="exists"):
        heads.save(tmp_path / "heads")


def test_a_tuned_trunk_is_saved_with_its_heads(tmp_path):
    module = build("llama")
    heads = MultiHead(
        Trunk(module, frozen=False), {"a": Attached(ScalarHead(LinearSettings(module.config.hidden_size, 1)))}
    )
    ids = torch.randint(3, 50, (8, 6), generator=torch.Generator().manual_seed(0))
    batch = {"input_ids": ids, "a": torch.randn(8)}
    heads.fit(lambda i: batch, replace(RUN, steps=3))
    heads.save(tmp_path / "heads")
    again = MultiHead.load(tmp_path / "heads")
    assert torch.equal(again(batch)["a"], heads(batch)["a"])
    fresh = MultiHead.load(tmp_path / "heads", build("llama"))
    assert torch.equal(fresh(batch)["a"], heads(batch)["a"])

    own = _heads()
    own.fit(_batches, replace(RUN, steps=3))
    own.save(tmp_path / "own")
    other = MultiHead.load(tmp_path / "own", _trunk(seed=9))
    assert torch.equal(other(DATA)["kind"], own(DATA)["kind"])
    with pytest.raises(InputError, match="give the module"):
        MultiHead.load(tmp_path / "own")
    with pytest.raises(MismatchError, match="another module"):
        MultiHead.load(tmp_path / "own", nn.Linear(5, WIDTH))


def test_heads_that_do_not_stay_are_not_run_and_what_is_left_is_the_plain_backbone(tmp_path):
    module = build("llama")
    width = module.config.hidden_size
    heads = MultiHead(
        Trunk(module, frozen=False),
        {
            "kept": ScalarHead(LinearSettings(width, 1)),
            "helper": Attached(ScalarHead(LinearSettings(width, 1)), stays=False),
        },
    )
    batch = {"input_ids": torch.randint(3, 50, (2, 6))}
    assert set(heads(batch)) == {"kept"}
    heads.backbone.save_pretrained(tmp_path / "plain")
    from transformers import AutoModel

    plain = AutoModel.from_pretrained(tmp_path / "plain")
    assert torch.equal(plain(**batch).last_hidden_state, heads.trunk.states(batch))


@pytest.mark.parametrize("name", ["llama", "gpt2", "qwen3"])
def test_a_scalar_head_becomes_a_classifier_of_transformers(name, tmp_path):
    from transformers import AutoModelForSequenceClassification

    model = opened(name)
    head = ScalarHead(LinearSettings(Trunk(model).width, 1, bias=False))
    heads = MultiHead(model, {"reward": Attached(head, pool="last")})
    made = sequence_classifier(heads, "reward")
    made.save_pretrained(tmp_path / "made")
    again = AutoModelForSequenceClassification.from_pretrained(tmp_path / "made")
    assert again.config.num_labels == 1
    ids = torch.randint(3, 50, (1, 7))
    torch.testing.assert_close(again(input_ids=ids).logits, heads({"input_ids": ids})["reward"], rtol=1e-4, atol=1e-5)


def test_a_head_that_no_classifier_computes_is_not_exported():
    model = opened("llama")
    width = Trunk(model).width
    early = MultiHead(model, {"a": Attached(ScalarHead(LinearSettings(width, 1, bias=False)), layer=1, pool="last")})
    with pytest.raises(UnsupportedError, match="reads other states"):
        sequence_classifier(early, "a")
    biased = MultiHead(model, {"a": Attached(ScalarHead(LinearSettings(width, 1)), pool="last")})
    with pytest.raises(UnsupportedError, match="bias=False"):
        sequence_classifier(biased, "a")
    with pytest.raises(InputError, match="the heads are a"):
        sequence_classifier(biased, "b")
    with pytest.raises(UnsupportedError, match="Small is not exported"):
        sequence_classifier(_heads(), "kind")


# Refusals


@pytest.mark.usefixtures("any_shape")
@pytest.mark.parametrize(
    "change, match",
    [
        ({"size": DATA["size"] * float("nan")}, r"head 'size'.*NaN"),
        ({"kind": DATA["kind"] + 5}, r"head 'kind'.*from 5 to 7, and it has 3 outputs"),
        ({"size": torch.randn(64, 4)}, r"head 'size'.*\[64, 1\].*\[64, 4\]"),
        ({"size": torch.randn(10)}, r"head 'size'.*\[10\]"),
        ({"kind": DATA["size"]}, r"head 'kind'"),
    ],
)
def test_a_target_that_does_not_fit_its_head_is_refused_before_training_and_the_head_is_named(change, match):
    heads = _heads()
    before = [p.clone() for p in heads.parameters()]
    with pytest.raises(InputError, match=match):
        heads.fit(lambda i: {**DATA, **change}, RUN)
    assert all(torch.equal(a, b) for a, b in zip(before, heads.parameters(), strict=True))


@pytest.mark.usefixtures("any_shape")
def test_other_heads_that_do_not_fit_are_named_too():
    trunk = Trunk(_trunk(), frozen=False)
    with pytest.raises(InputError, match=r"head 'a'.*no layer 3"):
        MultiHead(trunk, {"a": Attached(LinearHead(LinearSettings(WIDTH, 3)), target="kind", layer=3)}).fit(
            _batches, RUN
        )
    with pytest.raises(InputError, match=r"head 'a'"):
        MultiHead(trunk, {"a": Attached(LinearHead(LinearSettings(WIDTH + 1, 3)), target="kind")}).fit(_batches, RUN)
    with pytest.raises(InputError, match=r"head 'a'.*the batch has no 'a', only x, kind, size"):
        MultiHead(trunk, {"a": LinearHead(LinearSettings(WIDTH, 3))}).fit(_batches, RUN)

    class Long(ScalarHead):
        def loss(self, output, target):
            return (output[:, 0] - target) ** 2

    with pytest.raises(InputError, match=r"head 'size'.*shape \[64\]; a loss is one number"):
        MultiHead(trunk, {"size": Long(LinearSettings(WIDTH, 1))}).check(DATA)
    with pytest.raises(InputError, match="at least one"):
        MultiHead(trunk, {})
    with pytest.raises(InputError, match="letters"):
        MultiHead(trunk, {"a b": LinearHead(LinearSettings(WIDTH, 3))})
    with pytest.raises(InputError, match="pool"):
        Attached(LinearHead(LinearSettings(WIDTH, 3)), pool="max")
    with pytest.raises(InputError, match="steps"):
        MultiHead(trunk, {"kind": Attached(LinearHead(LinearSettings(WIDTH, 3)), tunes_from=0.5)}).fit(
            _batches, TrainSettings(minutes=1)
        )


def test_a_loss_that_is_no_longer_finite_ends_the_run_with_the_heads_name():
    heads = _heads()

    def later(i):
        return _batches(i) if i < 3 else {**_batches(i), "size": torch.full((16,), float("nan"))}

    with pytest.raises(InputError, match=r"head 'size'.*at step 3"):
        heads.fit(later, RUN)


def test_a_card_of_an_unknown_head_is_refused_by_name(tmp_path):
    heads = _heads()
    heads.save(tmp_path / "h")
    card = json.loads((tmp_path / "h" / "head.json").read_text())
    card["about"]["heads"]["kind"]["kind"] = "Nowhere"
    (tmp_path / "h" / "head.json").write_text(json.dumps(card))
    with pytest.raises(InputError, match="'Nowhere'; import the module that defines it"):
        MultiHead.load(tmp_path / "h", _trunk())


def test_heads_read_text_through_a_model_with_a_tokenizer():
    model = mh.open_model()
    heads = MultiHead(model, {"a": Attached(LinearHead(LinearSettings(Trunk(model).width, 2)), pool="last")})
    out = heads({"text": ["red cat seven", "lamp"]})["a"]
    alone = heads({"text": ["lamp"]})["a"]
    torch.testing.assert_close(out[1:], alone, rtol=1e-4, atol=1e-4)
    run = heads.fit(lambda i: {"text": ["red cat seven", "lamp"], "a": torch.tensor([0, 1])}, replace(RUN, steps=30))
    assert run.progress.last < 0.3 and not run.conflicts.seen


class _Free(Head):
    """A head without a target."""

    def loss(self, output, target):
        assert target is None
        return output.square().mean()

    def forward(self, states):
        return states


def test_a_head_may_have_no_target_or_several():
    class Pair(_Free):
        def loss(self, output, target):
            kind, size = target
            return (output.mean(1) - size - kind).square().mean()

    pair = Attached(Pair(None), target=("kind", "size"))
    heads = MultiHead(Trunk(_trunk(), frozen=False), {"none": Attached(_Free(None), target=()), "two": pair})
    assert set(heads.losses(DATA)) == {"none", "two"}
    heads.fit(_batches, replace(RUN, steps=2))


def test_states_of_many_texts_are_each_texts_own_whatever_their_order():
    model = mh.open_model()
    texts = ["red cat seven lamp", "lamp", "Paris red", "cat cat cat cat cat"]
    found = features(model, texts, layer=2, pool="last", rows=2)
    for i in (0, 3):
        torch.testing.assert_close(found[i], Trunk(model).states([texts[i]], 2, "last")[0], rtol=1e-4, atol=1e-4)
    assert torch.equal(features(_trunk(), DATA["x"], rows=10), _trunk()(DATA["x"]).detach())
    with pytest.raises(InputError, match="at least one"):
        features(model, [])
    with pytest.raises(InputError, match="pool by mean"):
        features(model, texts, pool="tokens")


def test_a_run_and_its_conflicts_have_pages(tmp_path):
    heads = _opposed()
    run = heads.fit(_batches, replace(RUN, steps=20), log_every=5)
    text = run.report(tmp_path / "run.html").read_text("utf-8")
    assert "a, b" in text and text.count('class="dot"') == 4 and "conflict in 100% of looks" in text
    assert "a, b" in gradient_conflicts(heads, [DATA]).report(tmp_path / "conflicts.html").read_text("utf-8")
    alone = MultiHead(_trunk(), {"size": ScalarHead(LinearSettings(WIDTH, 1))}).fit(_batches, replace(RUN, steps=3))
    assert "none can conflict" in alone.report(tmp_path / "alone.html").read_text("utf-8")
