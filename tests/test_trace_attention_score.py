"""Why a head looks there: sums on every architecture, ablation where it must agree, and heads whose reason was built in."""

import copy

import numpy as np
import pytest
import torch
from architectures import DECODERS, ENCODERS, EXTRA, VISION, build, inputs_for, opened
from torch import nn
from typer.testing import CliRunner

import manyheads as mh
from manyheads.cli import app
from manyheads.errors import InputError, UnsupportedError
from manyheads.lab.constructed import constructed
from manyheads.model.reading.readers import ReadAttention
from manyheads.model.reading.writes import stream_parts
from manyheads.trace.positions.attention_score import attention_score

BIASED = {"bloom", "mpt", "falcon_alibi"}


def pattern_row(model, inputs, head, at):
    """The model's own pattern, and which keys it may see."""
    kept = []
    model.look(inputs, ReadAttention(lambda call: kept.append((call.pattern, call.allowed)), layers=[head[0]]))
    return kept[0][0][0, head[1], at].double().numpy(), kept[0][1][0, head[1], at].numpy()


@pytest.mark.parametrize("name", [*DECODERS, *ENCODERS, *EXTRA, *VISION])
def test_shares_sum_to_the_score_that_the_softmax_got(name):
    model, inputs = opened(name), inputs_for(name, 1)
    head, at = (2, 1), 6
    row, allowed = pattern_row(model, inputs, head, at)
    scores, keys = [], np.flatnonzero(allowed)[[0, 2, -1]]
    for key in keys:
        found = attention_score(model, inputs, head, at, int(key), max_tokens=60)
        assert found.values.sum() + found.bias == pytest.approx(found.score, abs=2e-4)
        assert found.weight == pytest.approx(row[key], abs=1e-6)
        assert (found.softcap is not None) == (name == "gemma2")
        scores.append(found.score if found.softcap is None else found.softcap * np.tanh(found.score / found.softcap))
        assert (found.bias != 0) == (name in BIASED and key < at)
    # A sink (GPT-OSS) takes a share of the row, so weights are compared with each other.
    weights = np.exp(scores) / np.exp(scores).sum()
    assert np.allclose(weights, row[keys] / row[keys].sum(), atol=2e-4)


@pytest.mark.parametrize("name", ["llama", "gemma2", "bert", "granite", "dinov2"])
def test_the_stream_is_the_sum_of_what_was_written(name):
    model, inputs = opened(name), inputs_for(name, 1)
    for layer in range(3):
        found = stream_parts(model, inputs, layer, [2, 9])
        assert found.names[0] == "embedding" and len(found.names) == 2 + layer * (model.n_heads + 1)
        stream = model.read_site(inputs, "resid")[layer, 0, [2, 9]]
        assert torch.allclose(found.values.sum(0).float(), stream, atol=1e-4)


def test_without_norms_and_mlps_a_share_is_what_the_score_loses_when_the_head_is_ablated():
    plain = build("llama")
    for layer in plain.model.layers:
        layer.input_layernorm = layer.post_attention_layernorm = nn.Identity()
        layer.mlp.down_proj.weight.data.zero_()
    plain.model.embed_tokens.weight.data.mul_(5)
    model, inputs = mh.open_model(plain), inputs_for("llama", 1)
    found = attention_score(model, inputs, "L1H2", 8, 3)
    for at, shares in ((8, found.by_query), (3, found.by_key)):
        assert max(abs(share) for name, share in shares.items() if name.startswith("L")) > 0.02
        for index in range(4):
            with model.editing(mh.Ablate([(0, index)], positions=[at])):
                without = attention_score(model, inputs, "L1H2", 8, 3)
            assert found.score - without.score == pytest.approx(shares[f"L0H{index}"], abs=1e-4)


@pytest.mark.parametrize("shape", ["llama", "gpt2"])
def test_an_induction_head_looks_because_of_what_the_previous_token_head_wrote_at_the_key(shape):
    made = constructed(shape, seed=3)
    (previous,), (induction,) = made.known["previous_token"], made.known["induction"]
    ids = torch.tensor([[7, 12, 20, 9, 15, 7, 12, 20]])
    found = attention_score(mh.open_model(made.module), ids, induction, -1)
    assert found.key == 3, "the token after the last 20"
    rows = {name: share for name, share in found.by_key.items() if name.startswith("L")}
    assert max(rows, key=rows.get) == str(previous)
    assert rows[str(previous)] > 0.6 * (found.score - found.bias)
    others = [share for name, share in rows.items() if name != str(previous)]
    assert max(map(abs, others)) < 0.1 * rows[str(previous)]


def test_wrong_positions_heads_and_batches_are_refused():
    model, inputs = opened("llama"), inputs_for("llama", 1)
    for bad in (dict(query=11), dict(query=-12), dict(query=3, key=99)):
        with pytest.raises(InputError, match="this prompt has 11 tokens"):
            attention_score(model, inputs, "L0H0", **bad)
    with pytest.raises(InputError, match="masked"):
        attention_score(model, inputs, "L0H0", 3, 7)
    with pytest.raises(InputError, match="out of range"):
        attention_score(model, inputs, "L0H9")
    with pytest.raises(InputError, match="one prompt; got 2"):
        attention_score(model, inputs_for("llama", 2), "L0H0")


def test_a_query_that_is_no_function_of_the_stream_alone_is_refused():
    plain = copy.deepcopy(build("llama"))
    extra = torch.randn(32, generator=torch.Generator().manual_seed(0))
    plain.model.layers[2].self_attn.q_proj.register_forward_hook(lambda _, __, out: out * out.abs() + extra)
    with pytest.raises(UnsupportedError, match="cannot be split"):
        attention_score(mh.open_model(plain), inputs_for("llama", 1), "L2H0")


def test_the_command_names_the_previous_token_heads_writers(tmp_path):
    text, table = "red cat seven lamp Paris red cat seven lamp", tmp_path / "pairs.parquet"
    found = CliRunner().invoke(app, ["why", "ladon", text, "L3H4", "--table", str(table)])
    assert found.exit_code == 0, found.output
    assert "L3H4 at ·lamp (8) gives ·Paris (4)" in found.output and table.exists()
    frame = attention_score(mh.open_model(), text, "L3H4").to_frame()
    assert frame.share.sum() == pytest.approx(16.447, abs=0.01)
    assert {"M0", "L1H4"} == set(frame.iloc[0][["query", "key"]])
