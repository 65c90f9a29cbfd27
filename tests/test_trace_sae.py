import math
from functools import lru_cache

import numpy as np
import pytest
import torch
from architectures import inputs_for, opened
from toys import permutation_toy

import manyheads as mh
from manyheads.errors import InputError, MismatchError, UnsupportedError
from manyheads.lab.constructed import constructed
from manyheads.lab.permutations import CUE, permutation_prompts
from manyheads.tasks import encode, get_task
from manyheads.trace.attention_sae import AttentionSae, quality, with_unit_rows
from manyheads.trace.sae_attribution import attribute_feature, attribute_source
from manyheads.trace.sae_features import Example, dashboards, features_frame, head_meanings, write_dashboards
from manyheads.trace.sae_files import export_sae_lens, import_sae_lens, load_sae, save_sae
from manyheads.trace.sae_training import SaeSettings, _Run, train_sae

SPLIT = ["llama", "qwen3", "mistral", "gemma2", "gpt2", "gpt_neox", "opt", "phi3", "granite"]


def random_sae(model, layer=2, features=6, seed=0):
    width = model.n_heads * model.head_dim
    generator = torch.Generator().manual_seed(seed)
    W_enc, W_dec = torch.randn(width, features, generator=generator), torch.randn(features, width, generator=generator)
    b_enc, b_dec = torch.randn(features, generator=generator), torch.randn(width, generator=generator) * 0.1
    return with_unit_rows(AttentionSae(layer, model.n_heads, W_enc, b_enc, W_dec, b_dec, model.fingerprint))


def identity_sae(model, layer=1):
    """Restores everything: each number has a feature for its positive and one for its negative part."""
    eye = torch.eye(model.n_heads * model.head_dim)
    W = torch.cat([eye, -eye])
    return AttentionSae(layer, model.n_heads, W.T, torch.zeros(len(W)), W, torch.zeros(len(eye)), model.fingerprint)


# In the model


@pytest.mark.parametrize("name", ["llama", "gpt2", "falcon", "bert"])
def test_spliced_in_with_its_error_it_changes_nothing(name):
    model, inputs = opened(name), inputs_for(name)
    plain = model.logits(inputs)
    with model.editing(random_sae(model).splice()):
        assert (model.logits(inputs) - plain).abs().max() < 1e-5
    with model.editing(random_sae(model).splice(error=False)):
        assert (model.logits(inputs) - plain).abs().max() > 1e-3


def test_ablating_a_feature_takes_its_decoder_row_out_of_z():
    model, inputs = opened("llama"), inputs_for("llama")
    sae = random_sae(model)
    z, features = model.read_z(inputs)[2].flatten(-2), sae.read(model, inputs)
    with model.editing(sae.splice(ablate=[1, 4])):
        edited = model.read_z(inputs)[2].flatten(-2)
    gone = features[..., [1, 4]] @ sae.W_dec[[1, 4]]
    assert gone.abs().max() > 0.1 and torch.allclose(edited, z - gone, atol=1e-5)


def test_quality_is_one_for_the_identity_and_nothing_for_zero():
    model = opened("llama")
    batches = [torch.randint(3, 58, (4, 9), generator=torch.Generator().manual_seed(i)) for i in range(2)]
    whole = quality(identity_sae(model), model, batches)
    assert whole.recovered == pytest.approx(1, abs=1e-3) and whole.explained == pytest.approx(1, abs=1e-5)
    assert whole.l0 == pytest.approx(model.n_heads * model.head_dim, rel=0.01)
    width = model.n_heads * model.head_dim
    zero = AttentionSae(
        1, model.n_heads, torch.zeros(width, 3), torch.zeros(3), torch.zeros(3, width), torch.zeros(width)
    )
    nothing = quality(zero, model, batches)
    assert nothing.recovered == pytest.approx(0, abs=1e-6) and nothing.dead == 1 and nothing.l0 == 0
    ids = torch.cat(batches)
    log_p = model.logits(ids)[:, :-1].log_softmax(-1).gather(-1, ids[:, 1:, None])
    assert nothing.ce == pytest.approx(-float(log_p.mean()), abs=1e-4)


def test_unit_rows_are_the_same_function():
    model = opened("llama")
    generator = torch.Generator().manual_seed(0)
    width = model.n_heads * model.head_dim
    parts = [torch.randn(*shape, generator=generator) for shape in ((width, 5), (5,), (5, width), (width,))]
    plain = AttentionSae(0, model.n_heads, *parts)
    x = torch.randn(7, width, generator=generator)
    unit = with_unit_rows(plain)
    assert torch.allclose(unit.decode(unit.encode(x)), plain.decode(plain.encode(x)), atol=1e-4)
    assert torch.allclose(unit.W_dec.norm(dim=-1), torch.ones(5), atol=1e-6)
    assert torch.allclose(unit.head_shares().sum(-1), torch.ones(5), atol=1e-6)


def test_another_models_autoencoder_is_refused():
    sae = random_sae(opened("llama"))
    with pytest.raises(MismatchError, match="6 layers"):
        sae.check(mh.open_model())
    with pytest.raises(MismatchError, match="was trained on model"):
        sae.check(opened("llama").bake(mh.Scale(["L0H0"], 0.5)))
    with pytest.raises(InputError, match="has W_enc"):
        AttentionSae(0, 4, torch.zeros(32, 5), torch.zeros(4), torch.zeros(5, 32), torch.zeros(32))


# Attribution


@pytest.mark.parametrize("name", [*SPLIT, "falcon", "bert"])
@pytest.mark.parametrize("position", [-1, 5])
def test_direct_attribution_sums_to_the_feature_before_its_relu(name, position):
    model, inputs = opened(name), inputs_for(name)
    sae = random_sae(model)
    z = model.read_z(inputs)[2][1, position].flatten()
    for feature in (0, 3):
        found = attribute_feature(model, sae, inputs, feature, position=position, row=1)
        assert found.pre == pytest.approx(float(sae.pre(z)[feature]), abs=1e-4)
        assert found.terms.shape == (4, 11)


def test_a_term_is_what_masking_that_source_would_take_from_an_unnormalised_sum():
    model, inputs = opened("llama"), inputs_for("llama")
    sae = random_sae(model, layer=0)
    terms = attribute_feature(model, sae, inputs, 2).terms
    call = {}
    model.look(
        inputs, mh.model.reading.ReadAttention(lambda c: call.update(p=c.pattern, v=c.values_of([0, 1, 2, 3])), [0])
    )
    w = sae.W_enc[:, 2].unflatten(0, (4, -1))
    wanted = call["p"][0, :, -1] * torch.einsum("hsd,hd->hs", call["v"][0], w)
    assert torch.allclose(terms.float(), wanted, atol=1e-5)


@pytest.mark.parametrize("name", SPLIT)
@pytest.mark.parametrize("layer", [0, 2])
def test_recursive_attribution_sums_to_the_direct_term(name, layer):
    model, inputs = opened(name), inputs_for(name)
    sae = random_sae(model, layer=layer)
    direct = attribute_feature(model, sae, inputs, 1, position=6)
    for head, source in ((0, 2), (3, 6)):
        if name == "gemma2" and layer:
            with pytest.raises(UnsupportedError, match="norms what attention writes"):
                attribute_source(model, sae, inputs, 1, head, source, position=6)
            continue
        found = attribute_source(model, sae, inputs, 1, head, source, position=6)
        assert found.total == pytest.approx(float(direct.terms[head, source]), abs=1e-4)
        assert len(found.terms) == 2 + layer * (model.n_heads + 1)


def test_recursive_terms_are_those_worked_out_by_hand_for_a_gpt2():
    model, inputs = opened("gpt2"), inputs_for("gpt2")
    sae = random_sae(model, layer=1)
    found = attribute_source(model, sae, inputs, 4, 2, 3, position=6)
    block = model.plain.transformer.h[1]
    call = {}
    model.look(inputs, mh.model.reading.ReadAttention(lambda c: call.update(p=c.pattern), [1]))
    resid, z = model.read_site(inputs, "resid"), model.read_z(inputs)
    x = resid[1][0, 3]
    sigma = (x.var(unbiased=False) + block.ln_1.eps).sqrt()
    W_V = block.attn.c_attn.weight[:, 2 * 32 + 2 * 8 : 2 * 32 + 3 * 8]
    w = sae.W_enc[:, 4].unflatten(0, (4, -1))[2]
    for name, write in (
        ("embedding", resid[0][0, 3]),
        ("L0H1", z[0][0, 3, 1] @ model.W_O(0)[1]),
        ("M0", model.read_site(inputs, "mlp_write")[0][0, 3]),
    ):
        normed = (write - write.mean()) / sigma * block.ln_1.weight
        assert found.terms[name] == pytest.approx(float(call["p"][0, 2, 6, 3] * (normed @ W_V @ w)), abs=1e-5)


def test_bert_has_no_recursive_attribution_and_says_why():
    model = opened("bert")
    with pytest.raises(UnsupportedError, match="after each addition"):
        attribute_source(model, random_sae(model), inputs_for("bert"), 0, 0, 0)
    with pytest.raises(InputError, match="no feature 99"):
        attribute_feature(model, random_sae(model), inputs_for("bert"), 99)


# Training


def tokens_of(i):
    return torch.randint(3, 58, (8, 10), generator=torch.Generator().manual_seed(i))


QUICK = SaeSettings(features=12, sparsity=0.05, steps=40, batch=32, warmup=5, buffer=4, resample_at=(15,), rate=5e-3)


def test_training_restores_more_and_leaves_unit_rows():
    model = opened("llama")
    before = quality(train_sae(model, 1, tokens_of, SaeSettings(**{**vars(QUICK), "steps": 1})), model, [tokens_of(99)])
    trained = train_sae(model, 1, tokens_of, SaeSettings(**{**vars(QUICK), "steps": 300}))
    assert quality(trained, model, [tokens_of(99)]).explained > before.explained + 0.2
    assert torch.allclose(trained.W_dec.norm(dim=-1), torch.ones(12), atol=1e-6)
    assert trained.fingerprint == model.fingerprint


def test_an_interrupted_run_ends_where_an_uninterrupted_one_does(tmp_path):
    model = opened("llama")
    whole = train_sae(model, 1, tokens_of, QUICK)
    train_sae(model, 1, tokens_of, SaeSettings(**{**vars(QUICK), "steps": 22}), folder=tmp_path, save_every=10)
    parted = train_sae(model, 1, tokens_of, QUICK, folder=tmp_path)
    for name in ("W_enc", "b_enc", "W_dec", "b_dec"):
        assert torch.equal(getattr(whole, name), getattr(parted, name))
    with pytest.raises(MismatchError, match="other settings"):
        train_sae(model, 1, tokens_of, SaeSettings(**{**vars(QUICK), "sparsity": 9.0}), folder=tmp_path)


def test_the_optimiser_is_adam():
    run = _Run(opened("llama"), 1, tokens_of, SaeSettings(**{**vars(QUICK), "betas": (0.3, 0.99)}))
    run.since = 100
    other = {name: run[name].clone().requires_grad_() for name in ("W_enc", "b_enc")}
    adam = torch.optim.Adam(other.values(), lr=QUICK.rate, betas=(0.3, 0.99))
    generator = torch.Generator().manual_seed(0)
    for _ in range(5):
        gradients = {name: torch.randn(value.shape, generator=generator) for name, value in other.items()}
        run._adam(gradients)
        for name, value in other.items():
            value.grad = gradients[name]
        adam.step()
    for name, value in other.items():
        assert torch.allclose(run[name], value.detach(), atol=1e-6)


def test_the_rate_rises_as_half_a_cosine_from_a_tenth():
    run = _Run(opened("llama"), 1, tokens_of, QUICK)
    rates = []
    for run.since in (0, 2.5, 5, 50):
        rates.append(run._rate() / QUICK.rate)
    assert rates == pytest.approx([0.1, 0.1 + 0.9 * 0.5 * (1 - math.cos(math.pi / 2)), 1.0, 1.0])


def test_dead_features_start_anew_at_inputs_and_live_ones_go_on():
    run = _Run(opened("llama"), 1, tokens_of, QUICK)
    run.b_enc[:5] = -1e3
    for _ in range(14):
        run.one_step()
    live, moments = run.W_dec[5:].clone(), run.moments["W_enc"][1][:, :5].clone()
    fired = run.fired.clone()
    assert (fired[:5] == 0).all() and moments.abs().sum() == 0
    run._resample()
    x = run.activations.batch(run.step)
    directions = torch.nn.functional.normalize(x - run.b_dec, dim=-1)
    assert torch.allclose((run.W_dec[:5] @ directions.T).max(-1).values, torch.ones(5), atol=1e-5)
    assert (run.b_enc[:5] == 0).all() and torch.equal(run.W_dec[5:], live) == bool((fired[5:] > 0).all())
    norm = run.W_enc[:, 5:].norm(dim=0).mean()
    assert torch.allclose(run.W_enc[:, :5].norm(dim=0), 0.2 * norm.expand(5), rtol=1e-4)
    assert run.since == 0


def test_wrong_layers_and_empty_settings_are_refused():
    with pytest.raises(InputError, match="no layer 7"):
        train_sae(opened("llama"), 7, tokens_of)
    with pytest.raises(InputError, match="1 or more"):
        train_sae(opened("llama"), 0, tokens_of, SaeSettings(steps=0))
    with pytest.raises(InputError, match="no token after the first 10"):
        train_sae(opened("llama"), 0, tokens_of, SaeSettings(first=10))


# Files


def test_an_autoencoder_is_the_same_after_saving(tmp_path):
    sae = random_sae(opened("llama"))
    again = load_sae(save_sae(sae, tmp_path / "a"))
    assert all(torch.equal(getattr(sae, n), getattr(again, n)) for n in ("W_enc", "b_enc", "W_dec", "b_dec"))
    assert (again.layer, again.n_heads, again.fingerprint) == (sae.layer, sae.n_heads, sae.fingerprint)
    with pytest.raises(InputError, match="already exists"):
        save_sae(sae, tmp_path / "a")
    with pytest.raises(InputError, match="no autoencoder at"):
        load_sae(tmp_path)


def test_through_the_format_of_sae_lens_and_back(tmp_path):
    model = opened("llama")
    sae = random_sae(model)
    again = import_sae_lens(export_sae_lens(sae, tmp_path / "theirs"), model)
    x = torch.randn(5, 32, generator=torch.Generator().manual_seed(0))
    assert torch.allclose(again.encode(x), sae.encode(x), atol=1e-6) and again.layer == 2
    config = (tmp_path / "theirs" / "cfg.json").read_text()
    for old, new, message in (
        ("hook_z", "hook_q", "not of heads' outputs"),
        ('"standard"', '"gated"', "gated autoencoder"),
        ('"none"', '"layer_norm"', "normalised by"),
    ):
        (tmp_path / "theirs" / "cfg.json").write_text(config.replace(old, new))
        with pytest.raises(UnsupportedError, match=message):
            import_sae_lens(tmp_path / "theirs", model)
    (tmp_path / "theirs" / "cfg.json").write_text(config)
    with pytest.raises(InputError, match="this model's heads give"):
        import_sae_lens(tmp_path / "theirs", mh.open_model())


# Features


@pytest.mark.parametrize(
    ("source", "family"),
    [
        (7, "previous token"),
        (3, "induction"),
        (2, "same token"),
        (0, "first token"),
        (5, "short context"),
        (1, "long context"),
    ],
)
def test_families_are_told_by_the_token_a_feature_is_read_from(source, family):
    tokens = torch.tensor([1, 5, 9, 6, 7, 4, 3, 2, 9])
    sources = torch.zeros(9)
    sources[source] = 1.0
    assert Example(tokens, torch.zeros(9), 8, sources).family == family


@lru_cache
def planted():
    """A constructed induction model and one feature: the induction head's write of one token."""
    given = constructed(seed=0, plant=["previous_token", "induction", "copying", "retrieval"])
    model = mh.open_model(given.module, tokenizer=given.tokenizer)
    (head,) = given.known["induction"]
    rng = np.random.default_rng(0)
    half = torch.from_numpy(np.stack([rng.permutation(np.arange(5, 60))[:10] for _ in range(8)]))
    prompts = torch.cat([half, half], 1)
    z = model.read_z(prompts)[head.layer][:, 12:, head.index]
    direction = torch.zeros(model.n_heads, model.head_dim)
    direction[head.index] = torch.nn.functional.normalize(z.flatten(0, 1).mean(0), dim=0)
    row = direction.flatten()[None]
    threshold = 0.5 * float((z @ direction[head.index]).mean())
    sae = AttentionSae(head.layer, model.n_heads, row.T, torch.tensor([-threshold]), row, torch.zeros(row.shape[1]))
    return model, head, sae, prompts


def test_a_feature_of_the_planted_induction_head_is_of_the_induction_family(tmp_path):
    model, head, sae, prompts = planted()
    (board,) = dashboards(sae, model, prompts, [0])
    assert board.family == "induction" and len(board.examples) == 8
    assert int(board.heads.argmax()) == head.index and float(board.heads.max()) == pytest.approx(1)
    frame = features_frame([board])
    assert frame.loc[0, "head"] == str(head)
    meanings = {meaning.head: meaning for meaning in head_meanings(sae, model, prompts)}
    assert meanings[head].families == {"induction": 1} and meanings[head].candidate
    page = write_dashboards([board], model, tmp_path / "f.html").read_text()
    assert "Feature 0" in page and "induction" in page
    with pytest.raises(InputError, match="no feature 3"):
        dashboards(sae, model, prompts, [3])


# The trained toy and the bundled model (slow)


def toy_tokens(i):
    given = permutation_prompts(1024, seed=1000 + i)
    return torch.cat([given.tokens, given.answers[:, None]], 1)


def after_cue(ids):
    scored = torch.zeros_like(ids, dtype=torch.bool)
    scored[:, 1:] = ids[:, :-1] == CUE
    return scored


def principal(model, layer, k, tokens):
    """As many principal components: the baseline of equal rank."""
    x = model.read_z(tokens)[layer].flatten(-2).flatten(0, 1)
    rows = torch.linalg.svd(x - x.mean(0), full_matrices=False).Vh[:k]
    both = torch.cat([rows, -rows])
    return AttentionSae(layer, model.n_heads, both.T, torch.zeros(2 * k), both, x.mean(0))


@pytest.mark.slow
def test_on_the_toy_five_features_a_token_keep_nine_tenths_of_what_the_layer_does():
    model = permutation_toy()
    sae = train_sae(model, 1, toy_tokens, SaeSettings(sparsity=1.2))
    held_out = [toy_tokens(500), toy_tokens(501)]
    found = quality(sae, model, held_out, scored=after_cue)
    rank = max(1, round(found.l0))
    baseline = quality(principal(model, 1, rank, toy_tokens(400)), model, held_out, scored=after_cue)
    print(f"L0 {found.l0:.1f}, recovered {found.recovered:.3f}, {rank} principal components {baseline.recovered:.3f}")
    assert found.l0 <= 5 and found.recovered >= 0.90
    assert 1 - found.recovered <= 0.6 * (1 - baseline.recovered)


@pytest.mark.slow
def test_on_ladon_features_restore_a_middle_layer_better_than_principal_components(tmp_path):
    model = mh.open_model()
    names = ("repeat", "successor", "needle", "ioi", "facts", "docstring", "greater_than", "coloured_objects")

    def texts(i):
        batches = [encode(get_task(name), model.tokenizer, 16, seed=100 * i, split="train") for name in names]
        length = min(batch.input_ids.shape[1] for batch in batches)
        return torch.cat([batch.input_ids[:, -length:] for batch in batches])

    settings = SaeSettings(
        features=512, sparsity=0.6, steps=600, batch=512, warmup=100, resample_at=(200, 400), first=1
    )
    sae = train_sae(model, 3, texts, settings)
    held_out = [texts(77)]
    found = quality(sae, model, held_out)
    baseline = quality(principal(model, 3, max(1, round(found.l0)), texts(78)), model, held_out)
    print(
        f"L0 {found.l0:.1f}, dead {found.dead:.2f}, explained {found.explained:.2f}, recovered {found.recovered:.2f}, "
        f"components {baseline.recovered:.2f}"
    )
    assert found.recovered > 0.5 and found.explained > 0.5
    kinds = [meaning.candidate for meaning in head_meanings(sae, model, held_out[0], top=5)]
    print(f"candidates for one meaning: {sum(kinds)} of {len(kinds)} heads")
