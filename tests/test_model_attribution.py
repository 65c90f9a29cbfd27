"""Direct attribution is exact: its parts sum to the logit difference, and each part is what removing it would take away."""

import numpy as np
import pytest
import torch
from architectures import DECODERS, EXTRA, inputs_for, opened, padded

import manyheads as mh
from manyheads.errors import InputError, UnsupportedError
from manyheads.lab.constructed import constructed
from manyheads.model.norms import FoldedNorm
from manyheads.model.reading.attribution import attribute, logit_attribution, source_attribution

ANSWERS, FOILS = torch.tensor([3, 4, 5]), torch.tensor([6, 7, 8])


def difference(name, logits):
    cap = getattr(opened(name).config, "final_logit_softcapping", None)
    logits = logits.double()
    logits = torch.atanh(logits / cap) * cap if cap else logits
    rows = torch.arange(3)
    return logits[rows, ANSWERS] - logits[rows, FOILS]


@pytest.mark.parametrize("name", [*DECODERS, *EXTRA])
def test_parts_sum_to_the_logit_difference(name):
    inputs = inputs_for(name)
    parts = logit_attribution(opened(name), inputs, ANSWERS, FOILS)
    assert parts.heads.shape == (3, 3, 4)
    assert (parts.total - difference(name, opened(name).logits(inputs)[:, -1])).abs().max() <= 1e-4


@pytest.mark.parametrize("name", ["llama", "gpt2", "opt", "gemma2", "granite"])
def test_parts_sum_at_a_position_of_each_row_and_in_padded_batches(name):
    inputs = opened(name).inputs(padded(name, "right"))
    position = inputs["attention_mask"].sum(1) - 1
    parts = logit_attribution(opened(name), inputs, ANSWERS, FOILS, position=position)
    logits = opened(name).logits(inputs)[torch.arange(3), position]
    assert (parts.total - difference(name, logits)).abs().max() <= 1e-4


@pytest.mark.parametrize("name", ["gpt_neox", "falcon"])
def test_a_heads_share_is_what_ablating_it_takes_from_the_readout(name):
    """Where attention and MLP run in parallel, a last-layer head's write reaches the final state by itself."""
    model, inputs = opened(name), inputs_for(name)
    direction = torch.randn(3, model.layout.hidden_size, generator=torch.Generator().manual_seed(1))
    plain = model.read_site(inputs, "resid")[-1][:, -1]
    folded = FoldedNorm.of(model.layout.final_norm, model.layout.hidden_size).fold(direction, plain)
    parts = attribute(model, inputs, direction)
    for h in range(model.n_heads):
        with model.editing(mh.Ablate([(2, h)])):
            ablated = model.read_site(inputs, "resid")[-1][:, -1]
        assert torch.allclose(((plain - ablated) * folded).sum(-1), parts.heads[:, 2, h], atol=1e-4)
        assert parts.heads[:, 2, h].abs().max() > 1e-3


@pytest.mark.parametrize("name", ["bert", "roberta", "modernbert", "dinov2", "vit"])
def test_encoders_attribute_a_readout_of_the_final_state_exactly(name):
    model, inputs = opened(name), inputs_for(name)
    direction = torch.randn(3, 32, generator=torch.Generator().manual_seed(1))
    parts = attribute(model, inputs, direction, position=2)
    with torch.no_grad():
        final = model.plain.base_model(**inputs).last_hidden_state[:, 2]
    assert (parts.total - (final * direction).sum(-1)).abs().max() <= 1e-4


def test_a_head_that_writes_along_the_readout_is_credited_with_it():
    model, inputs = opened("llama"), inputs_for("llama")
    plain = logit_attribution(model, inputs, ANSWERS, FOILS)
    doubled = model.bake(mh.Scale(["L2H3"], 2.0))
    more = logit_attribution(doubled, inputs, ANSWERS, FOILS)
    others = [(layer, h) for layer in range(2) for h in range(4)]
    scale = (more.embedding / plain.embedding)[:, None]  # the final norm's denominator has changed, for all parts alike
    assert torch.allclose(more.heads[:, 2, 3], 2 * plain.heads[:, 2, 3] * scale[:, 0], atol=1e-4)
    for layer, h in others:
        assert torch.allclose(more.heads[:, layer, h], plain.heads[:, layer, h] * scale[:, 0], atol=1e-4)


@pytest.mark.parametrize("name", ["bert", "roberta"])
def test_a_head_that_is_no_linear_readout_is_refused(name):
    with pytest.raises(UnsupportedError, match=r"no linear readout|no unembedding"):
        logit_attribution(opened(name), inputs_for(name), ANSWERS, FOILS)


def test_a_readout_of_the_wrong_shape_is_refused():
    with pytest.raises(InputError, match=r"\[3, 31\], this pass needs \[3, 32\]"):
        attribute(opened("llama"), inputs_for("llama"), torch.zeros(3, 31))


@pytest.mark.parametrize("name", [*DECODERS, *EXTRA])
@pytest.mark.parametrize("position", [-1, 4])
def test_a_heads_share_splits_by_the_tokens_it_reads_and_none_of_it_comes_from_ahead(name, position):
    model, inputs = opened(name), inputs_for(name)
    heads = logit_attribution(model, inputs, ANSWERS, FOILS, position=position).heads
    by_source = source_attribution(model, inputs, ANSWERS, FOILS, position=position)
    assert by_source.shape == (3, 3, 4, 11)
    assert (by_source.sum(-1) - heads).abs().max() <= 1e-4
    assert position == -1 or not by_source[..., position + 1 :].any()


def test_a_planted_induction_head_writes_the_answer_from_where_it_stands_in_the_prompt():
    given = constructed(seed=0)
    model = mh.open_model(given.module)
    ids = torch.from_numpy(np.random.default_rng(0).permutation(np.arange(5, 45))[None, :12])
    prompt = torch.cat([ids, ids[:, 3:4]], 1)
    by_source = source_attribution(model, prompt, ids[:, 4], ids[:, 8])[0]
    (head,) = given.known["induction"]
    assert by_source[head].argmax() == 4
    assert by_source[head][4] > 0.95 * by_source[head].abs().sum()
