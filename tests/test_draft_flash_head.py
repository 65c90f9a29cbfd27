"""FlashHead: with every cluster probed it is the dense head; with few it mostly agrees, and beside a model it leaves no trace."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache, partial
from typing import Any

import pytest
import torch
import transformers as tf
from architectures import DECODERS, LLAMA, build, inputs_for
from torch.nn import functional as F

import manyheads as mh
from manyheads.draft.output.clustering import balanced_clusters, scattered_clusters
from manyheads.draft.output.flash_head import FlashHead
from manyheads.draft.output.measuring import ReadText, fewest_probes, read_texts
from manyheads.draft.output.sampling import sampling_loss
from manyheads.errors import InputError, MismatchError, UnsupportedError
from manyheads.model.headmodel import HeadModel
from manyheads.model.opening import open_model
from manyheads.tasks import get_task


def planted(vocab: int, width: int, clusters: int, spread: float, seed: int = 0) -> torch.Tensor:
    """Rows about `clusters` directions, with norms from 0.5 to 2, in random order."""
    g = torch.Generator().manual_seed(seed)
    base = F.normalize(torch.randn(clusters, width, generator=g), dim=-1)
    rows = base[torch.arange(vocab) % clusters] + spread * torch.randn(vocab, width, generator=g)
    norms = 0.5 * 4 ** torch.rand(vocab, 1, generator=g)
    return (F.normalize(rows, dim=-1) * norms)[torch.randperm(vocab, generator=g)]


def states(rows: torch.Tensor, n: int, strength: float = 8.0, seed: int = 1) -> torch.Tensor:
    """`strength` times a row's direction, and unit noise."""
    g = torch.Generator().manual_seed(seed)
    which = torch.randint(len(rows), (n,), generator=g)
    return strength * F.normalize(rows[which], dim=-1) + torch.randn(n, rows.shape[1], generator=g)


@cache
def sheet() -> tuple[torch.Tensor, torch.Tensor]:
    """4,096 rows of equal norm in 256 planted clusters, and 4,000 states."""
    rows = F.normalize(planted(4096, 64, 256, 0.15), dim=-1)
    return rows, states(rows, 4000)


@cache
def ladon() -> tuple[HeadModel, torch.Tensor]:
    """The bundled model and what its output matrix reads at the ends of prompts of every kind, one position each."""
    model = mh.open_model()
    seen: list[torch.Tensor] = []
    assert model.layout.unembedding is not None
    handle = model.layout.unembedding.register_forward_pre_hook(lambda _, args: seen.append(args[0][0, 4:]))
    for name in ("facts", "ioi", "needle", "choice", "docstring", "greater_than"):
        for example in get_task(name).examples(12, seed=0, split="test"):
            model.logits(example.prompt)
    handle.remove()
    return model, torch.cat(seen)


@pytest.mark.parametrize(("vocab", "clusters"), [(512, 32), (500, None), (997, 60), (17, 5), (10, 7)])
def test_every_row_is_in_one_cluster_and_sizes_differ_by_one_at_most(vocab: int, clusters: int | None) -> None:
    rows = planted(vocab, 16, 8, 0.3)
    ids = FlashHead.of(rows, clusters=clusters, probes=1).ids
    assert torch.equal(ids[ids >= 0].sort().values, torch.arange(vocab))
    assert set((ids >= 0).sum(1).tolist()) <= {ids.shape[1], ids.shape[1] - 1}
    if vocab % len(ids) == 0:
        assert (ids >= 0).all()


@pytest.mark.parametrize("vocab", [512, 500])
@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_with_every_cluster_probed_it_is_the_dense_head(
    vocab: int, with_bias: bool, packed: bool, dtype: torch.dtype
) -> None:
    rows = planted(vocab, 24, 30, 0.3).to(dtype)
    bias = torch.randn(vocab).to(dtype) if with_bias else None
    hidden = states(rows.float(), 150).to(dtype).view(3, 50, 24)
    head = FlashHead.of(rows, bias=bias, probes=-(-vocab // 16), packed=packed)
    dense = F.linear(hidden, rows, bias)
    assert head(hidden).shape == dense.shape and head(hidden).dtype == dtype
    rounding = {} if dtype == torch.bfloat16 else {"atol": 1e-4, "rtol": 1e-4}
    torch.testing.assert_close(head(hidden), dense, **(rounding or {"atol": 5e-2, "rtol": 2e-2}))
    if dtype != torch.bfloat16:
        assert torch.equal(head.choose(hidden), dense.argmax(-1)) and head.agreement(hidden) == 1.0


def test_logits_are_exact_inside_the_probed_clusters_and_absent_outside() -> None:
    rows = planted(800, 24, 50, 0.3)
    hidden = states(rows, 40)
    head = FlashHead.of(rows, probes=3, specials=[7, 790])
    logits, dense = head(hidden), hidden @ rows.T
    for i in range(40):
        best = (hidden[i] @ head.centres.T).topk(3).indices
        inside = set(head.ids[best].flatten().tolist()) | {7, 790}
        assert inside == set(logits[i].isfinite().nonzero()[:, 0].tolist())
    inside_mask = logits.isfinite()
    torch.testing.assert_close(logits[inside_mask], dense[inside_mask], atol=1e-4, rtol=1e-4)
    assert torch.equal(head.choose(hidden), logits.argmax(-1))


def test_planted_clusters_are_retrieved_and_random_ones_are_not() -> None:
    rows, hidden = sheet()
    head = FlashHead.of(rows, clusters=256, probes=16)
    agreed = {}
    for head.probes in (1, 4, 16, 64):
        agreed[head.probes] = head.agreement(hidden)
    head.probes = 16
    assert head.share == 0.125
    control = FlashHead.of(rows, clusters=scattered_clusters(rows, 256), probes=16).agreement(hidden)
    assert agreed[16] >= 0.97 and agreed[16] - control >= 0.45, (agreed, control)
    assert list(agreed.values()) == sorted(agreed.values()) and agreed[64] >= 0.99


def test_centres_that_know_their_largest_row_agree_more_where_norms_vary() -> None:
    rows = planted(4096, 64, 256, 0.15)
    rows = rows * rows.norm(dim=-1, keepdim=True)
    hidden = states(rows, 3000)
    found = balanced_clusters(rows, 256)
    weighted, unit = (FlashHead.of(rows, clusters=found, probes=16, weighted=w) for w in (True, False))
    torch.testing.assert_close(unit.centres.norm(dim=-1), torch.ones(256))
    assert weighted.agreement(hidden) > unit.agreement(hidden) + 0.015


def test_comparing_in_bfloat16_clusters_as_well_as_in_float32_and_far_better_than_chance(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    rows = planted(4096, 32, 256, 0.1)
    full = balanced_clusters(rows, 256)
    monkeypatch.setattr("manyheads.draft.output.clustering.WIDE", 1)
    monkeypatch.setattr("manyheads.draft.output.clustering._fast_in_bfloat16", lambda unit: True)
    assert abs(balanced_clusters(rows, 256).cosine - full.cosine) < 0.01
    assert full.cosine > scattered_clusters(rows, 256).cosine + 0.4


def test_special_tokens_are_scored_whatever_is_probed() -> None:
    model, hidden = ladon()
    head = FlashHead.of(model, clusters=64, probes=1, rounds=2, texts=())
    assert set(head.specials) >= set(model.tokenizer.all_special_ids) | {model.plain.generation_config.eos_token_id}
    assert head(hidden)[:, head.specials].isfinite().all()


def test_drawing_with_every_cluster_is_drawing_from_the_dense_softmax() -> None:
    rows = planted(64, 8, 8, 0.3)
    hidden = states(rows, 1, strength=2.0)
    head = FlashHead.of(rows, clusters=8, probes=8)
    generator = torch.Generator().manual_seed(0)
    drawn = head.choose(hidden.expand(20000, -1), temperature=0.7, generator=generator)
    odds = (hidden @ rows.T / 0.7).softmax(-1)[0]
    assert 0.5 * (torch.bincount(drawn, minlength=64) / 20000 - odds).abs().sum() < 0.03


def test_clusters_are_drawn_without_replacement_by_the_softmax_of_their_means() -> None:
    rows = planted(80, 8, 5, 0.3)
    hidden = states(rows, 1, strength=1.0)
    head = FlashHead.of(rows, clusters=5, probes=2)
    generator = torch.Generator().manual_seed(0)
    drawn = head.probe(hidden.expand(20000, -1), temperature=0.5, generator=generator).sort(1).values
    assert (drawn[:, 0] < drawn[:, 1]).all()
    p = (hidden @ torch.stack([rows[ids].mean(0) for ids in head.ids]).T / 0.5).softmax(-1)[0].double()
    for a in range(5):
        for b in range(a + 1, 5):
            chance = p[a] * p[b] / (1 - p[a]) + p[b] * p[a] / (1 - p[b])
            assert abs(float((drawn == torch.tensor([a, b])).all(1).double().mean() - chance)) < 0.015


def test_sampling_can_say_every_token_while_greedy_probing_cannot() -> None:
    rows = planted(64, 8, 8, 0.3)
    hidden = states(rows, 1, strength=1.0)
    head = FlashHead.of(rows, clusters=8, probes=1)
    generator = torch.Generator().manual_seed(0)
    drawn = head.choose(hidden.expand(20000, -1), temperature=2.0, generator=generator)
    assert len(drawn.unique()) == 64
    assert int(head(hidden).isfinite().sum()) == 8


def test_centres_of_eight_bits_probe_nearly_the_same_and_leave_logits_exact() -> None:
    rows, hidden = sheet()
    full = FlashHead.of(rows, clusters=256, probes=16)
    coarse = FlashHead.of(rows, clusters=256, probes=16, quantised=True)
    assert coarse.centres.dtype == torch.int8
    assert abs(coarse.agreement(hidden) - full.agreement(hidden)) < 0.005
    logits = coarse(hidden[:50])
    torch.testing.assert_close(logits[logits.isfinite()], (hidden[:50] @ rows.T)[logits.isfinite()])


def phi() -> Any:
    """A model whose unembedding has a bias."""
    model = tf.PhiForCausalLM(tf.PhiConfig(**{k: v for k, v in LLAMA.items() if k != "num_key_value_heads"})).eval()
    torch.nn.init.normal_(model.lm_head.bias, std=2.0)
    return model


def cohere() -> Any:
    """A model that scales its logits."""
    return tf.CohereForCausalLM(tf.CohereConfig(**LLAMA, logit_scale=0.25)).eval()


@pytest.mark.parametrize(
    "make", [*(partial(build, name) for name in DECODERS), phi, cohere], ids=[*DECODERS, "phi", "cohere"]
)
def test_beside_any_architecture_it_serves_single_tokens_and_leaves_no_trace(make: Callable[[], Any]) -> None:
    model = open_model(make())
    batch = inputs_for("llama", batch=2, length=5)
    head = FlashHead.of(model, clusters=8, probes=8, rounds=2)
    plain = model.plain
    dense = plain.get_output_embeddings()
    hooks = sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in plain.modules())
    with torch.no_grad():
        prompt = plain(**batch)
        step = {"input_ids": batch["input_ids"][:, -1:]}
        before = plain(**step).logits
        with head.serving(model):
            assert torch.equal(plain(**batch).logits, prompt.logits)
            torch.testing.assert_close(plain(**step).logits, before, atol=1e-4, rtol=1e-4)
            head.probes = 1
            few = plain(**step).logits
            assert few.shape == before.shape
            inside = few.isfinite()
            assert (few[~inside] == -torch.inf).all() and inside.sum(-1).max() <= 8 + len(head.specials)
            torch.testing.assert_close(few[inside], before[inside], atol=1e-4, rtol=1e-4)
        assert torch.equal(plain(**step).logits, before)
    assert plain.get_output_embeddings() is dense and "forward" not in vars(dense)
    assert sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in plain.modules()) == hooks


def test_prompts_and_large_batches_use_the_dense_head_even_if_only_the_last_logits_are_wanted() -> None:
    model, _ = ladon()
    head = FlashHead.of(model, clusters=64, probes=1, rounds=1, texts=())
    asked: list[int] = []
    ask = head.logits
    head.logits = lambda hidden, **kwargs: (asked.append(len(hidden)), ask(hidden, **kwargs))[1]  # type: ignore[method-assign]
    ids = torch.randint(3, 4000, (3, 6))
    with head.serving(model, max_batch=2):
        model.generate(ids[:2], max_new_tokens=4, min_new_tokens=4, do_sample=False)
        assert asked == [2, 2, 2]
        model.generate(ids, max_new_tokens=4, min_new_tokens=4, do_sample=False)
        assert asked == [2, 2, 2]


def test_generating_with_every_cluster_is_dense_generation_and_an_error_inside_restores_it() -> None:
    model, _ = ladon()
    head = FlashHead.of(model, clusters=64, probes=64, rounds=1, texts=())
    prompts = [example.prompt for example in get_task("facts").examples(6, seed=0)]
    dense = model.generate(prompts, max_new_tokens=8, do_sample=False)
    with head.serving(model):
        assert model.generate(prompts, max_new_tokens=8, do_sample=False) == dense
    with pytest.raises(KeyError), head.serving(model):
        raise KeyError
    assert model.layout.unembedding is not None and "forward" not in vars(model.layout.unembedding)


def test_serving_at_a_temperature_draws_clusters_and_repeats_with_its_seed() -> None:
    model, _ = ladon()
    head = FlashHead.of(model, clusters=256, probes=2, rounds=1, texts=())
    step = torch.randint(3, 4000, (1, 1))

    def inside(**settings: float) -> list[torch.Tensor]:
        with head.serving(model, **settings):  # type: ignore[arg-type]
            return [model.logits(step).isfinite().cpu() for _ in range(3)]

    first, again, greedy = inside(temperature=2.0), inside(temperature=2.0), inside()
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert not torch.equal(first[0], first[1]) and torch.equal(greedy[0], greedy[1])


@cache
def ladons_texts() -> list[ReadText]:
    return read_texts(ladon()[0], rows=32, length=64)


def test_on_ladon_its_clusters_agree_more_than_random_ones() -> None:
    model, hidden = ladon()
    weight = model.layout.unembedding.weight  # type: ignore[union-attr]
    found = FlashHead.of(model, texts=())
    control = FlashHead.of(model, clusters=scattered_clusters(weight, len(found.ids)), texts=())
    assert found.agreement(hidden) > control.agreement(hidden) + 0.1
    assert found.agreement(hidden) > 0.9


@pytest.mark.slow
def test_clusters_fitted_to_texts_need_half_the_probes_on_their_held_out_part_and_fewer_on_other_prompts() -> None:
    model, hidden = ladon()
    fitted, plain = FlashHead.of(model, texts=ladons_texts()), FlashHead.of(model, texts=())
    for text in ladons_texts():
        late = text.states[len(text.states) * 3 // 4 :]
        needs = [fewest_probes(head.needed(late), 0.95) for head in (fitted, plain)]
        assert needs[0] <= 0.6 * needs[1], (text.name, needs)
    needs = [fewest_probes(head.needed(hidden), 0.95) for head in (fitted, plain)]
    assert needs[0] <= 0.8 * needs[1], needs


def test_probes_are_the_fewest_that_reach_the_stated_agreement_and_the_card_says_what_was_held_out() -> None:
    model, _ = ladon()
    texts = ladons_texts()
    chosen_on = [text.states[len(text.states) // 2 : 3 * len(text.states) // 4] for text in texts]
    for asked in (0.9, 0.99):
        head = FlashHead.of(model, agreement=asked, texts=texts, clusters=256)
        assert min(map(head.agreement, chosen_on)) >= asked
        card = head.meta["agreement"]
        assert card["asked"] == asked and set(card["held out"]) == {"prose", "its own text"}
        for text in texts:
            late, following = (part[3 * len(text.states) // 4 :] for part in (text.states, text.following))
            said = card["held out"][text.name]
            assert said["agreement"] == head.agreement(late) and said["states"] == len(late)
            holds = head(late).gather(1, following[:, None]).isfinite().double().mean()
            assert said["holds the next token"] == float(holds)
        head.probes -= 1
        assert min(map(head.agreement, chosen_on)) < asked
    assert FlashHead.of(model, probes=9, texts=texts).meta["agreement"]["asked"] is None
    with pytest.raises(InputError, match="agreement=0"):
        FlashHead.of(model, agreement=0.0)
    with pytest.raises(InputError, match="'short'"):
        FlashHead.of(model, texts=[ReadText("short", torch.randn(3, 256), torch.zeros(3, dtype=torch.long))])


@pytest.mark.parametrize("with_texts", [False, True])
def test_the_loss_of_sampling_is_that_of_tokens_that_were_drawn(with_texts: bool) -> None:
    rows, bias = planted(60, 6, 8, 0.3), torch.randn(60)
    text = ReadText("made", states(rows, 400, strength=1.5), torch.arange(400) % 60)
    head = FlashHead.of(rows, bias=bias, clusters=9, probes=2, specials=[5], texts=[text] if with_texts else None)
    one = ReadText("one", text.states[:1], text.following[7:8])
    ours, dense = sampling_loss(head, one, temperature=0.8, draws=20_000)
    p = ((one.states @ rows.T + bias) / 0.8).softmax(-1)[0]
    drawn = head.choose(one.states.expand(60_000, -1), temperature=0.8, generator=torch.Generator().manual_seed(0))
    q = torch.bincount(drawn, minlength=60) / len(drawn)
    assert (q > 0).sum() > 40  # clusters that the greedy search leaves out are drawn too
    assert ours.tv == pytest.approx(float((q - p).abs().sum() / 2), abs=0.012) and ours.tv > 0.1
    assert ours.kl == pytest.approx(float(torch.special.xlogy(q, q / p).sum()), abs=0.012)
    assert ours.sampled == pytest.approx(float((q * -p.log()).sum().exp()), rel=0.02)
    assert ours.text == pytest.approx(1 / float(q[7]), rel=0.15)
    assert dense.tv == dense.kl == 0 and dense.text == pytest.approx(1 / float(p[7]))
    best, _ = sampling_loss(head, one, temperature=0.8, best=True)
    inside = head(one.states)[0].isfinite()
    assert best.tv == pytest.approx(1 - float(p[inside].sum()), abs=1e-6)
    head.probes = 9
    assert sampling_loss(head, one)[0].tv < 1e-6


def test_what_is_saved_is_small_and_loads_for_its_own_model_only(tmp_path) -> None:  # type: ignore[no-untyped-def]
    model, hidden = ladon()
    texts = ladons_texts()
    head = FlashHead.of(
        model, clusters=100, probes=9, rounds=2, quantised=True, packed=False, specials=[11], texts=texts
    )
    folder = head.save(tmp_path / "head")
    assert sum(file.stat().st_size for file in folder.iterdir()) < 50_000
    again = FlashHead.load(folder, model)
    assert torch.equal(again(hidden[:20]), head(hidden[:20])) and again.specials == head.specials
    with pytest.raises(InputError, match="exists"):
        head.save(folder)
    with pytest.raises(InputError, match="holds no FlashHead"):
        FlashHead.load(tmp_path, model)
    with pytest.raises(MismatchError, match="learned beside model"):
        FlashHead.load(folder, torch.randn(4096, 256))
    assert FlashHead.load(folder, torch.randn(4096, 256), force=True).probes == 9
    with pytest.raises(MismatchError, match="tokens"):
        FlashHead.load(folder, torch.randn(50, 256), force=True)


def test_wrong_input_is_refused_with_a_sentence() -> None:
    rows = torch.randn(40, 6)
    with pytest.raises(InputError, match="clusters"):
        FlashHead.of(rows, clusters=41)
    with pytest.raises(InputError, match="probes"):
        FlashHead.of(rows, clusters=4, probes=5)
    with pytest.raises(InputError, match="special"):
        FlashHead.of(rows, specials=[40])
    with pytest.raises(InputError, match="hold"):
        FlashHead.of(rows, clusters=balanced_clusters(rows[:20], 4))
    head = FlashHead.of(rows, clusters=4)
    with pytest.raises(InputError, match="width 6"):
        head(torch.randn(2, 5))
    with pytest.raises(InputError, match="temperature -1"):
        head.choose(torch.randn(2, 6), temperature=-1.0)
    with pytest.raises(MismatchError, match="another output matrix"), head.serving(ladon()[0]):
        pass
    with pytest.raises(UnsupportedError, match="next tokens"):
        FlashHead.of(open_model(build("bert")))
