"""Attention-output autoencoders: terms sum, splices change nothing, rows are unit, files go round, families are found."""

import json
import time
from collections import Counter
from dataclasses import replace
from functools import cache

import numpy as np
import pytest
import torch
from architectures import DECODERS, opened
from bars import Stopped, Stopping
from planted_sae import pca_sae, random_sae, superposed, superposed_texts, task_text
from safetensors.torch import load_file, save_file
from torch.nn import functional as F
from toys import permutation_toy

import manyheads as mh
from manyheads.errors import InputError, MismatchError, UnsupportedError
from manyheads.lab.constructed import constructed
from manyheads.lab.permutations import CUE, permutation_prompts
from manyheads.model.editing.edits import Ablate, Scale
from manyheads.model.headmodel import HeadModel
from manyheads.model.reading.readers import ReadAttention
from manyheads.tasks import repeated_tokens
from manyheads.trace.sae.attribution import attribute_feature, recursive_attribution
from manyheads.trace.sae.autoencoder import AttentionSae, head_outputs, quality, refitted, with_unit_rows
from manyheads.trace.sae.features import (
    FeatureCard,
    FeatureExample,
    FeatureReport,
    feature_cards,
    logit_effects,
    polysemanticity,
)
from manyheads.trace.sae.files import export_sae_lens, import_sae_lens, load_sae, save_sae
from manyheads.trace.sae.training import TRAINING, SaeSettings, _Kept, _Read, _Trained, train_sae
from manyheads.training import fit

NORMS_WRITES = ("gemma2", "gemma3", "olmo2")  # norms between a head and the stream
PLAIN = [name for name in DECODERS if name not in NORMS_WRITES]
SHORT = replace(TRAINING, steps=60, rows=64, warmup=10)
SMALL = SaeSettings(features=40, sparsity=0.02, buffer=4, resample_at=(30,), training=SHORT)


def ids_of(rows=2, length=9, seed=1):
    return torch.randint(3, 60, (rows, length), generator=torch.Generator().manual_seed(seed))


def random_batches(i):
    return ids_of(4, 16, seed=i)


def plain_pre(model, sae, ids, row, position, feature):
    return float(sae.pre(model.read_z(ids)[sae.layer, row, position].flatten())[feature])


# Attribution


@pytest.mark.parametrize("name", list(DECODERS))
def test_terms_by_head_and_source_sum_to_the_feature_before_its_relu(name):
    model, ids = opened(name), ids_of()
    sae = random_sae(model, 2)
    for feature, row, position in ((3, 1, -2), (7, 0, 4)):
        found = attribute_feature(model, sae, ids, feature, position=position, row=row)
        assert found.pre == pytest.approx(plain_pre(model, sae, ids, row, position, feature), abs=1e-4)
        assert not found.terms[:, found.position + 1 :].any()  # nothing comes from later tokens
        assert found.to_frame()["value"].sum() + found.constant == pytest.approx(found.pre)


@pytest.mark.parametrize("name", PLAIN)
def test_what_wrote_to_the_sources_sums_to_each_term_also_through_lower_features(name):
    model, ids = opened(name), ids_of()
    sae, lower = random_sae(model, 2), random_sae(model, 1, seed=4)
    direct = attribute_feature(model, sae, ids, 3, position=-2, row=1)
    for below in ([], [lower]):
        found = recursive_attribution(model, sae, ids, 3, position=-2, row=1, below=below)
        assert torch.allclose(found.terms.sum(0), direct.terms, atol=1e-4)
        assert found.pre == pytest.approx(plain_pre(model, sae, ids, 1, -2, 3), abs=1e-4)
        assert ("L1H0" in found.components) != bool(below)


def by_hand(model, sae, ids, feature, position, write):
    """What `write` `[S, D]`, added to the stream below layer 1 of the Llama, is worth to a feature, the norm's length held."""
    resid = model.read_site(ids, "resid")[1, 0]
    block = model.layout.blocks[1].module
    norm = block.input_layernorm
    normed = write * norm.weight / (resid.square().mean(-1, keepdim=True) + norm.variance_epsilon).sqrt()
    values = (normed @ block.self_attn.v_proj.weight.T).unflatten(-1, (2, 8)).repeat_interleave(2, 1)  # [S, H, Dh]
    weighed = torch.einsum("shd,hd->hs", values, sae.W_enc[:, feature].unflatten(0, (4, 8)))
    seen = []
    model.look(ids, ReadAttention(lambda call: seen.append(call.pattern[0, :, position]), layers=[1]))
    return (seen[0] * weighed).detach()


def test_a_head_and_a_lower_feature_are_worth_what_their_writes_are_by_hand():
    model, ids = opened("llama"), ids_of(1)
    sae, lower = random_sae(model, 1), random_sae(model, 0, seed=2)
    plain = recursive_attribution(model, sae, ids, 5, position=6)
    head = model.read_z(ids)[0, 0, :, 2] @ model.W_O(0)[2]
    found = plain.terms[plain.components.index("L0H2")].float()
    assert torch.allclose(found, by_hand(model, sae, ids, 5, 6, head), atol=1e-5)
    split = recursive_attribution(model, sae, ids, 5, position=6, below=[lower])
    features = lower.read(model, ids)[0]
    active = (features > 0).any(0).nonzero()[:, 0].tolist()
    assert [name for name in split.components if name.startswith("L0F")] == [f"L0F{i}" for i in active]
    for i in active[:3]:
        write = features[:, i, None] * (lower.W_dec[i] @ model.W_O(0).flatten(0, 1))
        found = split.terms[split.components.index(f"L0F{i}")].float()
        assert torch.allclose(found, by_hand(model, sae, ids, 5, 6, write), atol=1e-4)


@pytest.mark.parametrize("name", NORMS_WRITES)
def test_streams_that_are_no_plain_sum_of_writes_are_refused(name):
    with pytest.raises(UnsupportedError, match="norms what attention writes"):
        recursive_attribution(opened(name), random_sae(opened(name), 1), ids_of(), 0)


@pytest.mark.usefixtures("any_shape")
def test_wrong_questions_get_one_sentence():
    model, ids = opened("llama"), ids_of()
    sae = random_sae(model, 1)
    with pytest.raises(InputError, match="no feature 24"):
        attribute_feature(model, sae, ids, 24)
    with pytest.raises(InputError, match="no position 9 in row 0"):
        attribute_feature(model, sae, ids, 0, position=9)
    with pytest.raises(InputError, match="below layer 1"):
        recursive_attribution(model, sae, ids, 0, below=[sae])
    with pytest.raises(InputError, match="no layer 3"):
        train_sae(model, 3, random_batches, SMALL)
    with pytest.raises(InputError, match="1 or more"):
        train_sae(model, 1, random_batches, replace(SMALL, features=0))
    with pytest.raises(InputError, match="no token after the first 16"):
        train_sae(model, 1, random_batches, replace(SMALL, first=16))
    with pytest.raises(MismatchError, match="was trained on model"):
        sae.check(model.bake(Scale(["L0H0"], 0.5)))
    with pytest.raises(MismatchError, match="reads layer 1 of 4 heads"):
        attribute_feature(opened("qwen3"), sae, ids, 0)
    with pytest.raises(InputError, match="W_enc"):
        replace(sae, b_dec=sae.b_enc)
    for measure in (quality, feature_cards):
        with pytest.raises(InputError, match=r"one tensor of shape \[2, 9\] for batches"):
            measure(model, sae, ids)


# Splicing


@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma2", "falcon"])
def test_the_autoencoder_with_its_error_changes_no_logit(name):
    model, ids = opened(name), ids_of()
    sae = random_sae(model, 1)
    with model.editing(sae.splice()):
        spliced = model.logits(ids)
    assert torch.allclose(spliced, model.logits(ids), atol=1e-5)
    with model.editing(sae.splice(error=False)):
        assert not torch.allclose(model.logits(ids), spliced, atol=1e-3)


def test_ablating_a_feature_takes_exactly_its_decoder_row_out_of_z():
    model, ids = opened("llama"), ids_of()
    sae = random_sae(model, 1)
    with model.editing(sae.splice(ablate=[5])):
        without = model.read_z(ids)[1]
    lost = sae.read(model, ids)[..., 5, None] * sae.W_dec[5]
    assert lost.abs().max() > 0.1
    assert torch.allclose(model.read_z(ids)[1] - without, lost.unflatten(-1, (4, 8)), atol=1e-5)


def test_a_perfect_autoencoder_recovers_all_and_one_that_says_zero_nothing():
    model = opened("llama")
    eye, none = torch.eye(32), torch.zeros(64)
    exact = AttentionSae(1, 4, torch.cat([eye, -eye], 1), none, torch.cat([eye, -eye]), torch.zeros(32))
    held = [random_batches(1)]
    found = quality(model, exact, held)
    assert (found.recovered, found.explained) == pytest.approx((1, 1), abs=1e-4)
    assert (found.l0, found.dead) == (32, 0)
    nothing = quality(model, replace(exact, W_enc=0 * exact.W_enc), held)
    assert nothing.recovered == pytest.approx(0, abs=1e-4)
    assert (nothing.l0, nothing.dead) == (0, 1)
    with model.editing(Ablate([(1, h) for h in range(4)], "zero")):
        logits = model.logits(held[0])[:, :-1]
    assert nothing.ce_sae == pytest.approx(float(F.cross_entropy(logits.flatten(0, 1), held[0][:, 1:].flatten())))


# Training


@cache
def trained():
    return train_sae(opened("llama"), 1, random_batches, SMALL)


def test_trained_rows_are_of_unit_length_and_restore_more_than_the_mean():
    sae = trained()
    assert torch.allclose(sae.W_dec.norm(dim=-1), torch.ones(40), atol=1e-6)
    settings = replace(SMALL, sparsity=0.01, training=replace(SHORT, steps=400, rate=5e-3))
    found = quality(opened("llama"), train_sae(opened("llama"), 1, random_batches, settings), [random_batches(999)])
    assert found.explained > 0.5


def test_the_same_seed_trains_the_same_and_another_another():
    again = train_sae(opened("llama"), 1, random_batches, SMALL)
    other = train_sae(opened("llama"), 1, random_batches, replace(SMALL, training=replace(SHORT, seed=1)))
    assert torch.equal(again.W_enc, trained().W_enc)
    assert not torch.allclose(other.W_enc, trained().W_enc)


def test_an_interrupted_run_goes_on_to_the_same_autoencoder(tmp_path):
    stop = Stopping(37)  # after the resampling at 30

    often = replace(SMALL, training=replace(SHORT, save_minutes=0.0))
    with pytest.raises(Stopped):
        train_sae(opened("llama"), 1, random_batches, often, folder=tmp_path, bar=stop)
    resumed = train_sae(opened("llama"), 1, random_batches, SMALL, folder=tmp_path)
    for part in ("W_enc", "b_enc", "W_dec", "b_dec"):
        assert torch.equal(getattr(resumed, part), getattr(trained(), part))
    with pytest.raises(MismatchError, match="other settings"):
        train_sae(opened("llama"), 1, random_batches, replace(SMALL, sparsity=1.0), folder=tmp_path)


def run_of(how):
    activations = _Read(opened("llama"), 1, random_batches, how)
    return _Trained(32, how, activations)


def steps_of(run, steps, **hooks):
    fit(
        run,
        run.activations.batch,
        replace(run.settings.training, steps=steps),
        after_backward=run.after_backward,
        **hooks,
    )


def test_the_rate_rises_as_half_a_cosine_from_a_tenth_and_is_the_one_used():
    run = run_of(SMALL)
    rates = []
    for since in (0, 5, 10, 50):
        run.since.fill_(since)
        rates.append(run.rate() / TRAINING.rate)
    assert rates == pytest.approx([0.1, 0.55, 1.0, 1.0])
    run.since.fill_(5)
    before, used = run.b_enc.detach().clone(), []
    steps_of(run, 1, after_step=lambda _, optimizer: used.append(optimizer.param_groups[0]["lr"]))
    assert used == pytest.approx([0.55 * TRAINING.rate])
    moved = (run.b_enc.detach() - before).abs()
    torch.testing.assert_close(
        moved[moved > 0].max().item(), used[0], rtol=1e-3, atol=0
    )  # Adam's first step is its rate


def test_a_step_moves_decoder_rows_at_a_right_angle_to_themselves():
    run = run_of(replace(SMALL, training=replace(SHORT, rate=1e-4)))
    before = run.W_dec.detach().clone()
    steps_of(run, 1, after_step=run.after_step)
    moved = run.W_dec.detach() - before
    assert float((moved * before).sum(-1).abs().max()) < 1e-6 < 1e-5 < float(moved.norm(dim=-1).max())


def test_dead_features_start_anew_at_inputs_without_memory_and_live_ones_stay():
    run = run_of(replace(SMALL, resample_at=()))
    with torch.no_grad():
        run.b_enc[:5] = -100.0  # these never fire
    seen = {}

    def after_step(progress, optimizer):
        run.after_step(progress, optimizer)
        if progress.step == 9:
            seen["dead"], seen["live"] = ((run.fired == 0).nonzero()[:, 0], (run.fired > 0).nonzero()[:, 0])
            seen["kept"] = run.W_enc[:, seen["live"]].detach().clone()
            seen["inputs"] = F.normalize(run.activations.batch(9) - run.b_dec.detach(), dim=-1)
            run.resample(9, optimizer)
            seen["moments"] = optimizer.state[run.W_enc]["exp_avg_sq"].clone()

    steps_of(run, 9, after_step=after_step)
    dead, live, kept = seen["dead"], seen["live"], seen["kept"]
    assert set(range(5)) <= set(dead.tolist())
    W_enc, W_dec = run.W_enc.detach(), run.W_dec.detach()
    assert torch.equal(W_enc[:, live], kept)
    assert torch.allclose((W_dec[dead] @ seen["inputs"].T).max(-1).values, torch.ones(len(dead)), atol=1e-5)
    assert torch.allclose(W_enc[:, dead], 0.2 * kept.norm(dim=0).mean() * W_dec[dead].T, atol=1e-6)
    assert not run.b_enc[dead].any()
    assert not seen["moments"][:, dead].any() and seen["moments"][:, live].any()
    assert run.rate() == pytest.approx(0.1 * TRAINING.rate)  # the warm-up starts again


def test_planted_features_are_recovered_one_to_one_where_principal_components_find_none_of_them():
    """#10: 48 directions in 32 dimensions, four of them active at once. Without training there is nothing to see either."""
    model, planted = superposed()
    x = head_outputs(model, 0, superposed_texts(10**6))

    def explained(sae):
        return float(1 - (sae.decode(sae.encode(x)) - x).square().sum() / (x - x.mean(0)).square().sum())

    def nearest(sae):
        return (F.normalize(sae.W_dec, dim=-1) @ planted.T).max(0)

    training = replace(TRAINING, steps=1200, rows=256, rate=5e-3, warmup=50)
    settings = SaeSettings(features=64, sparsity=0.5, buffer=4, resample_at=(300, 600), training=training)
    sae = train_sae(model, 0, superposed_texts, settings)
    fresh = train_sae(model, 0, superposed_texts, replace(settings, training=replace(training, steps=1)))
    l0 = float((sae.encode(x) > 0).float().sum(-1).mean())
    as_many, all_of_them = (pca_sae(model, 0, superposed_texts(5), rank) for rank in (round(l0), 32))
    cosine, feature = nearest(sae)
    others = [float(nearest(other).values.mean()) for other in (as_many, all_of_them, fresh)]
    print(f"L0 {l0:.2f}, explained {explained(sae):.3f}, by as many components {explained(as_many):.3f}")
    print(f"cosine with the planted {cosine.mean():.3f}; components, all components, untrained {others}")
    assert l0 <= 7 and explained(sae) > 0.9 > 0.5 > explained(as_many)
    assert cosine.mean() > 0.95 and len(set(feature.tolist())) >= 46
    assert max(others) < 0.65


def test_a_decoder_solved_again_restores_best_and_leaves_every_gate_as_it_was():
    sae = random_sae(opened("llama"), 1, 24)
    width = len(sae.b_dec)
    x, fresh = torch.randn(2, 3000, width, generator=torch.Generator().manual_seed(3)).double()
    sae = replace(sae, **{n: getattr(sae, n).double() for n in ("W_enc", "b_enc", "W_dec", "b_dec")})
    sae.b_enc[5] = -1e3  # never fires
    again = refitted(sae, x, ridge=1e-9)
    assert torch.equal(again.encode(fresh) > 0, sae.encode(fresh) > 0)
    assert torch.allclose(again.W_dec.norm(dim=-1), torch.ones(24, dtype=torch.double), atol=1e-5)
    f = torch.cat([sae.encode(x), torch.ones(len(x), 1).double()], 1)
    best = f @ torch.linalg.lstsq(f, x, driver="gelsd").solution
    assert torch.allclose(again.decode(again.encode(x)), best, atol=1e-5)
    assert (best - x).square().sum() < 0.9 * (sae.decode(sae.encode(x)) - x).square().sum()
    assert torch.allclose(again.W_dec[5], F.normalize(sae.W_dec[5], dim=-1).to(again.W_dec), atol=1e-5)


def test_activations_in_memory_come_once_a_pass_in_another_order_each_time():
    x = torch.arange(20.0)[:, None].expand(20, 2)
    kept = _Kept(x, SaeSettings(training=replace(TRAINING, rows=5)))
    passes = [torch.cat([kept.batch(4 * number + i) for i in range(4)])[:, 0] for number in range(2)]
    assert all(torch.equal(one.sort().values, x[:, 0]) for one in passes) and not torch.equal(*passes)
    model, width = opened("llama"), 32
    x = torch.randn(128, model.n_heads * model.head_dim, generator=torch.Generator().manual_seed(0))
    settings = SaeSettings(features=width, refit=8, training=replace(TRAINING, steps=8, rows=16, warmup=2))
    a, b = (train_sae(model, 1, x, settings) for _ in range(2))
    assert torch.equal(a.W_dec, b.W_dec) and a.fingerprint == model.fingerprint
    plain = train_sae(model, 1, x, replace(settings, refit=0))
    assert torch.equal(plain.encode(x) > 0, a.encode(x) > 0)
    assert (a.decode(a.encode(x)) - x).square().sum() < (plain.decode(plain.encode(x)) - x).square().sum()
    with pytest.raises(InputError, match="make no batch of 129"):
        train_sae(model, 1, x, replace(settings, training=replace(TRAINING, rows=129)))
    with pytest.raises(InputError, match="7 batches of 16 cannot solve 32"):
        train_sae(model, 1, x, replace(settings, refit=7))


# Files


def test_autoencoders_come_back_from_disk_as_they_were(tmp_path):
    sae = trained()
    save_sae(sae, tmp_path / "sae")
    back = load_sae(tmp_path / "sae")
    x = head_outputs(opened("llama"), 1, ids_of())
    assert torch.allclose(back.encode(x), sae.encode(x), atol=1e-6)
    assert (back.layer, back.n_heads, back.fingerprint) == (1, 4, sae.fingerprint)
    assert back.meta["settings"]["features"] == 40
    assert torch.allclose(load_file(tmp_path / "sae" / "sae.safetensors")["W_dec"].norm(dim=-1), torch.ones(40))
    with pytest.raises(InputError, match="already exists"):
        save_sae(sae, tmp_path / "sae")
    with pytest.raises(InputError, match="no autoencoder at"):
        load_sae(tmp_path)


def test_rows_made_unit_leave_the_reconstruction_as_it_was():
    model = opened("llama")
    sae, x = random_sae(model, 1), head_outputs(model, 1, ids_of())
    unit = with_unit_rows(sae)
    assert torch.allclose(unit.W_dec.norm(dim=-1), torch.ones(24))
    assert torch.allclose(unit.decode(unit.encode(x)), sae.decode(sae.encode(x)), atol=1e-4)


def test_the_folder_for_sae_lens_comes_back_and_others_of_its_kind_are_read_by_their_config(tmp_path):
    model = opened("llama")
    sae, x = with_unit_rows(random_sae(model, 2)), head_outputs(model, 2, ids_of())
    export_sae_lens(sae, tmp_path / "theirs", model_name="tiny")
    about = json.loads((tmp_path / "theirs" / "cfg.json").read_text())
    assert (about["d_in"], about["d_sae"], about["architecture"]) == (32, 24, "standard")
    assert about["metadata"]["hook_name"] == "blocks.2.attn.hook_z"
    back = import_sae_lens(tmp_path / "theirs", model)
    assert torch.allclose(back.encode(x), sae.encode(x), atol=1e-4)
    assert back.fingerprint == sae.fingerprint

    def change(**new):
        (tmp_path / "theirs" / "cfg.json").write_text(json.dumps(about | new))
        return import_sae_lens(tmp_path / "theirs", model)

    plain = change(apply_b_dec_to_input=False)
    assert torch.allclose(plain.encode(x), torch.relu(x @ sae.W_enc + sae.b_enc), atol=1e-4)
    old = {k: v for k, v in about.items() if k != "metadata"} | {"hook_name": "blocks.2.attn.hook_z"}
    (tmp_path / "theirs" / "cfg.json").write_text(json.dumps(old))
    assert import_sae_lens(tmp_path / "theirs", model).layer == 2
    with pytest.raises(UnsupportedError, match="standard ones"):
        change(architecture="gated")
    with pytest.raises(UnsupportedError, match="not of heads' outputs"):
        change(metadata={"hook_name": "blocks.2.hook_resid_pre"})
    with pytest.raises(InputError, match="reads 32 numbers"):
        (tmp_path / "theirs" / "cfg.json").write_text(json.dumps(about))
        import_sae_lens(tmp_path / "theirs", opened("qwen3"))


# Features


def test_head_shares_say_which_head_a_decoder_row_is_of():
    model = opened("llama")
    sae = random_sae(model, 1)
    rows = torch.zeros(24, 4, 8)
    rows[torch.arange(24), torch.arange(24) % 4] = 1
    shares = replace(sae, W_dec=rows.flatten(1)).head_shares()
    assert torch.equal(shares, F.one_hot(torch.arange(24) % 4, 4).float())
    assert torch.allclose(sae.head_shares().sum(-1), torch.ones(24))


def test_logit_effects_are_what_a_decoder_row_adds_before_the_denominator():
    model, ids = opened("gpt2"), ids_of()
    sae = with_unit_rows(random_sae(model, 2))
    z = sae.W_dec[7].unflatten(0, (4, 8))
    write = torch.einsum("hd,hde->e", z, model.W_O(2)).detach()
    norm = model.layout.final_norm
    readout = (write - write.mean()) * norm.weight @ model.layout.unembedding.weight.T
    assert torch.allclose(logit_effects(model, sae, [7])[0], (readout - readout.mean()).detach(), atol=1e-5)
    assert ids.shape == (2, 9)


def test_a_card_shows_the_strongest_rows_and_their_attribution():
    model = opened("llama")
    sae, batches = random_sae(model, 1), [ids_of(8, 12, seed=s) for s in range(3)]
    cards = feature_cards(model, sae, batches, examples=4)
    rows = torch.cat(batches)
    features = sae.read(model, rows)
    for card in cards:
        best = features[..., card.feature].max(1).values.sort(descending=True).values[:4]
        assert [e.activation for e in card.examples] == pytest.approx(best[best > 0].tolist(), abs=1e-5)
        assert card.density == pytest.approx(float((features[..., card.feature] > 0).float().mean()))
        for example in card.examples:
            direct = attribute_feature(
                model, sae, torch.from_numpy(example.ids)[None], card.feature, position=example.position
            )
            assert np.allclose(example.sources, direct.terms.sum(0), atol=1e-5)
            assert np.allclose(example.heads, direct.terms.sum(1), atol=1e-5)
    assert [card.feature for card in cards] == (features > 0).any(0).any(0).nonzero()[:, 0].tolist()


def one_head_sae(model, head, ids, features=3):
    """Features that read one head alone: along what it says at some tokens of `ids`."""
    z = model.read_z(ids)[head.layer, 0, :, head.index]
    W_enc = torch.zeros(model.n_heads, model.head_dim, features)
    W_enc[head.index] = F.normalize(z[-features:], dim=-1).T
    W_enc = W_enc.flatten(0, 1)
    zero = torch.zeros(features), torch.zeros(len(W_enc))
    return AttentionSae(head.layer, model.n_heads, W_enc, zero[0], W_enc.T.contiguous(), zero[1])


@pytest.mark.parametrize("shape", ["llama", "gpt2"])
def test_features_of_a_planted_induction_head_are_induction_features_that_need_their_context(shape):
    made = constructed(shape, seed=1)
    model = mh.open_model(made.module, tokenizer=made.tokenizer)
    bos = torch.full((8, 1), made.tokenizer.bos_token_id)
    ids = torch.cat([bos, repeated_tokens(range(40, 200), 8, 12, seed=2)], 1)

    def cards_of(kind):
        (head,) = made.known[kind]
        sae = one_head_sae(model, head, ids)
        return feature_cards(model, sae, [ids], examples=3), head

    inducing, head = cards_of("induction")
    for card in inducing:
        assert card.families == ["long context", "induction"]
        assert card.induction > 0.9
        assert card.head_shares.argmax() == head.index
    looking_back, _ = cards_of("previous_token")
    for card in looking_back:
        assert card.families == ["short context"]
        assert card.induction < 0.1


def card_of(feature, *, current, source, top, shares, induction=0.0):
    example = FeatureExample(
        np.array([current, source, current]), 2, np.ones(3), np.array([0.0, 1.0, 0.0]), np.ones(2), 1.0, induction
    )
    promoted = [(token, 1.0) for token in top]
    return FeatureCard(feature, 0.1, np.array(shares), promoted, [], [example])


def test_a_head_whose_features_share_what_they_promote_has_one_concept_and_a_mixed_one_several():
    alike = [card_of(i, current=i, source=100 + i, top=[1, 2, 3], shares=[0.9, 0.1]) for i in range(4)]
    mixed = [
        card_of(10 + i, current=50 + i, source=200 + i, top=[10 * i + 300, 10 * i + 301], shares=[0.1, 0.9])
        for i in range(4)
    ]
    found = polysemanticity([*alike, *mixed], 3, top=4)
    assert found.features == [[0, 1, 2, 3], [10, 11, 12, 13]]
    assert found.concepts.tolist() == [1, 4]
    assert found.share == 0.5
    assert len(found.random) == 20
    assert found.random_share > 0.8
    assert alike[0].shares_concept(alike[1])
    assert not alike[0].shares_concept(mixed[0])
    chain = [
        card_of(0, current=1, source=2, top=[5], shares=[1, 0]),
        card_of(1, current=1, source=3, top=[6], shares=[1, 0]),
    ]
    chain.append(card_of(2, current=4, source=3, top=[7], shares=[1, 0]))  # by the source, through the second
    assert polysemanticity(chain, 0, top=3).concepts.tolist() == [1, 1]
    inducing = [card_of(i, current=i, source=9 + i, top=[90 + i], shares=[1, 0], induction=0.8) for i in range(2)]
    assert inducing[0].shares_concept(inducing[1])
    with pytest.raises(InputError, match="as many active ones"):
        polysemanticity(chain, 0)


def test_the_page_names_features_heads_and_tokens_and_nothing_in_a_token_can_break_it(tmp_path):
    model = opened("llama")
    sae = random_sae(model, 1)
    cards = feature_cards(model, sae, [ids_of(8, 40)], examples=3)
    heads = polysemanticity(cards, 1)
    text = FeatureReport(cards[:2], sae, model, heads).report(tmp_path / "page.html").read_text()
    assert f"Feature {cards[0].feature}" in text
    assert "L1H3" in text
    assert "Lowers" in text
    assert str(cards[0].top[0][0]) in text
    with pytest.raises(InputError, match="already exists"):
        FeatureReport(cards, sae, model).report(tmp_path / "page.html")

    class Names:
        def decode(self, ids):
            return "<script>alert(1)</script>"

    named = HeadModel(model.plain, Names(), model.layout)
    assert "<script>alert" not in FeatureReport(cards[:1], sae, named).report(tmp_path / "b.html").read_text()


# Trained models


def toy_ids(n, seed):
    given = permutation_prompts(n, seed=seed)
    return torch.cat([given.tokens, given.answers[:, None]], 1)


def after_cue(ids):
    counts = torch.zeros_like(ids, dtype=torch.bool)
    counts[:, 1:] = ids[:, :-1] == CUE
    return counts


@cache
def toy_sae(sparsity, seed=0):
    settings = SaeSettings(sparsity=sparsity, training=replace(TRAINING, seed=seed))
    return train_sae(permutation_toy(), 1, lambda i: toy_ids(1024, 1000 + i), settings)


HELD = [toy_ids(1024, 500), toy_ids(1024, 501)]


def lost(sae):
    return quality(permutation_toy(), sae, HELD, scored=after_cue)


@pytest.mark.slow
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_on_the_toy_one_autoencoder_of_five_features_recovers_nine_tenths_and_beats_as_many_components(seed):
    """L1 alone makes features too small: before the decoder is solved again it loses more than the claim allows."""
    model, sae = permutation_toy(), toy_sae(1.25, seed)
    x = torch.cat([head_outputs(model, 1, toy_ids(1024, 4000 + i)) for i in range(2)])
    found, small = lost(refitted(sae, x)), lost(sae)
    pca = {k: lost(pca_sae(model, 1, toy_ids(1024, 502), k)) for k in (3, 4, 5)}
    print("refitted:", found, found.recovered, "by L1:", small.recovered, {k: one.recovered for k, one in pca.items()})
    rank = round(found.l0)
    assert found.l0 == pytest.approx(small.l0, abs=0.01) and found.l0 <= 5
    assert pca[rank].l0 == pytest.approx(rank, abs=1e-6)
    assert found.recovered >= 0.90
    assert 1 - found.recovered <= 0.6 * (1 - pca[rank].recovered)
    assert 1 - found.recovered <= 0.7 * (1 - small.recovered)
    norms = sae.W_dec.double().norm(dim=-1)
    assert torch.allclose(norms, torch.ones_like(norms), atol=1e-6)


@pytest.mark.slow
def test_on_the_toy_terms_sum_and_the_splice_with_its_error_changes_nothing():
    model, sae, ids = permutation_toy(), toy_sae(1.25), toy_ids(16, 7)
    features = sae.read(model, ids)
    active = (features[0, -2] > 0).nonzero()[:, 0].tolist()
    assert active
    for feature in active:
        direct = attribute_feature(model, sae, ids, feature, position=-2)
        split = recursive_attribution(model, sae, ids, feature, position=-2)
        assert direct.pre == pytest.approx(float(features[0, -2, feature]), abs=1e-4)
        assert torch.allclose(split.terms.sum(0), direct.terms, atol=1e-4)
    with model.editing(sae.splice()):
        spliced = model.logits(ids)
    assert torch.allclose(spliced, model.logits(ids), atol=1e-5)


@pytest.mark.slow
def test_features_of_ladons_middle_layer_beat_principal_components_sum_and_carry_induction():
    model = mh.open_model()
    text, held = (task_text(model, n, 64, seed=i, split=s) for i, (n, s) in enumerate(((1024, "train"), (64, "test"))))
    settings = SaeSettings(
        sparsity=3.0, resample_at=(300, 500), first=1, training=replace(TRAINING, steps=1000, rows=512, warmup=100)
    )
    start = time.perf_counter()
    sae = train_sae(model, 3, lambda i: text[(64 * i) % 1024 :][:64], settings)
    seconds = time.perf_counter() - start
    found = quality(model, sae, [held])
    pca = quality(model, pca_sae(model, 3, text[:128], round(found.l0)), [held])
    print(f"ladon: {seconds:.0f} s", found, found.recovered, "PCA of equal rank", pca.recovered)
    assert found.l0 <= 20
    assert found.recovered >= 0.7
    assert 1 - found.recovered <= 0.6 * (1 - pca.recovered)
    features = sae.read(model, held[:8])
    for feature in features[:, -1].max(0).values.topk(5).indices.tolist():
        row = int(features[:8, -1, feature].argmax())
        direct = attribute_feature(model, sae, held[:8], feature, row=row)
        split = recursive_attribution(model, sae, held[:8], feature, row=row)
        assert direct.pre == pytest.approx(float(features[row, -1, feature]), abs=1e-4)
        assert torch.allclose(split.terms.sum(0), direct.terms, atol=1e-4)
    cards = feature_cards(model, sae, [held], examples=8)
    heads = polysemanticity(cards, 3)
    families = Counter(family for card in cards for family in card.families or ["none"])
    print(len(cards), families, heads.concepts, heads.share, heads.random, heads.random_share)
    repeats = repeated_tokens(range(50, 1000), 16, 24, seed=3)

    def loss_without(gone):
        with model.editing(sae.splice(ablate=gone)):
            logits = model.logits(repeats)[:, 24:-1]
        return float(F.cross_entropy(logits.flatten(0, 1), repeats[:, 25:].flatten()))

    family = [card.feature for card in cards if "induction" in card.families]
    rest = [card.feature for card in cards if "induction" not in card.families]
    rng = np.random.default_rng(0)
    plain, inducing = loss_without([]), loss_without(family)
    others = [loss_without(rng.choice(rest, len(family), replace=False).tolist()) for _ in range(20)]
    print(
        f"{len(family)} induction features: {plain:.3f} -> {inducing:.3f}; random {np.mean(others):.3f}, {max(others):.3f}"
    )
    assert inducing > max(others)


@pytest.mark.parametrize(
    "change",
    [
        {"n_heads": 0},
        {"n_heads": 3},
        {"layer": "x"},
        {"layer": -1},
        {"layer": None},
        {"meta": 3},
        {"fingerprint": None},
    ],
    ids=str,
)
def test_an_autoencoder_with_a_wrong_field_is_refused_in_one_sentence(change, tmp_path):
    sae = random_sae(opened("llama"), 1, 8)
    folder = save_sae(sae, tmp_path / "sae")
    about = json.loads((folder / "sae.json").read_text())
    (folder / "sae.json").write_text(json.dumps(about | change))
    with pytest.raises(InputError, match="is not an autoencoder") as caught:
        load_sae(folder)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("part", ["W_enc", "b_enc", "W_dec", "b_dec"])
def test_an_autoencoder_with_a_number_that_is_none_is_refused_when_made_and_when_loaded(part, tmp_path):
    sae = random_sae(opened("llama"), 1, 8)
    spoiled = getattr(sae, part).clone()
    spoiled.view(-1)[-1] = float("nan")
    with pytest.raises(InputError, match="finite"):
        replace(sae, **{part: spoiled})
    for folder, file, load in (
        (save_sae(sae, tmp_path / "ours"), "sae.safetensors", load_sae),
        (
            export_sae_lens(sae, tmp_path / "lens"),
            "sae_weights.safetensors",
            lambda f: import_sae_lens(f, opened("llama")),
        ),
    ):
        tensors = load_file(folder / file)
        tensors[part].view(-1)[-1] = float("inf")
        save_file(tensors, folder / file)
        with pytest.raises(InputError, match=f"{part}.* holds NaN or infinity"):
            load(folder)
