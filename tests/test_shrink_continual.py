"""Continual inference: step by step, the outputs are those of the whole window."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn.functional import scaled_dot_product_attention
from torch.utils.flop_counter import FlopCounterMode

from manyheads.errors import InputError, UnsupportedError
from manyheads.shrink.online.continual import ContinualEncoder, RetroactiveAttention, SingleOutputAttention


def encoder(layers: int, *, norm_first: bool = False, activation: str = "relu") -> nn.TransformerEncoder:
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(
        16, 4, 32, dropout=0.1, activation=activation, batch_first=True, norm_first=norm_first
    )
    made = nn.TransformerEncoder(layer, layers, nn.LayerNorm(16), enable_nested_tensor=False).eval()
    for parameter in made.parameters():
        nn.init.normal_(parameter, std=0.3)
    return made


@pytest.mark.parametrize("layers", [1, 2])
@pytest.mark.parametrize("norm_first", [False, True])
def test_steps_give_the_outputs_of_the_whole_window(layers: int, norm_first: bool) -> None:
    window = 9
    positions = torch.randn(2 * window - 1, 16)
    model = ContinualEncoder(encoder(layers, norm_first=norm_first, activation="gelu"), window, positions).eval()
    x = torch.randn(2, 60, 16)
    for t in range(60):
        found = model.forward_step(x[:, t])
        if t < window - 1:
            assert found is None
            continue
        start = t - window + 1
        with torch.no_grad():
            torch.testing.assert_close(found, model(x[:, start : t + 1], start), atol=1e-5, rtol=1e-4)


def test_two_thousand_steps_do_not_drift() -> None:
    window = 16
    retroactive, single = RetroactiveAttention(window), SingleOutputAttention(window)
    q, k, v = torch.randn(3, 2000, 1, 2, 8)
    for t in range(2000):
        rows, newest = retroactive.step(q[t], k[t], v[t]), single.step(q[t], k[t], v[t])
    last = slice(2000 - window, 2000)
    wanted = scaled_dot_product_attention(*(x[last].permute(1, 2, 0, 3) for x in (q, k, v)))
    torch.testing.assert_close(rows, wanted, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(newest, wanted[:, :, -1], atol=1e-5, rtol=1e-5)


@settings(max_examples=25, deadline=None)
@given(st.floats(0.0, 40.0), st.integers(1, 7), st.integers(0, 1000))
def test_large_scores_that_leave_the_window_take_no_digits_with_them(size: float, window: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    q, k, v = torch.randn(3, 3 * window + 2, 1, 1, 4, generator=generator, dtype=torch.float64)
    k[window // 2] *= size  # one key that may hold all of every row's attention, and then is gone
    attention = RetroactiveAttention(window)
    for t in range(len(q)):
        rows = attention.step(q[t], k[t], v[t])
        if t >= window - 1:
            last = slice(t - window + 1, t + 1)
            wanted = scaled_dot_product_attention(*(x[last].permute(1, 2, 0, 3) for x in (q, k, v)))
            torch.testing.assert_close(rows, wanted, atol=1e-6, rtol=1e-6)


def test_a_step_of_attention_costs_a_share_of_the_window() -> None:
    window, heads, width = 64, 4, 16
    attention = RetroactiveAttention(window)
    q, k, v = torch.randn(3, window + 1, 1, heads, width)
    for t in range(window):
        attention.step(q[t], k[t], v[t])
    with FlopCounterMode(display=False) as step:
        attention.step(q[-1], k[-1], v[-1])
    whole = 2 * 2 * heads * window * window * width  # q k^T and pattern v, a multiplication and an addition each
    assert 0 < step.get_total_flops() <= 5 / window * whole


def test_what_cannot_be_exact_is_refused() -> None:
    with pytest.raises(UnsupportedError, match="3 layers"):
        ContinualEncoder(encoder(3), 8)
    with pytest.raises(InputError, match="15 positions"):
        ContinualEncoder(encoder(2), 8, torch.randn(14, 16))
    with pytest.raises(InputError, match="eval"):
        ContinualEncoder(encoder(1), 8).train().forward_step(torch.randn(1, 16))
    sideways = nn.TransformerEncoder(nn.TransformerEncoderLayer(16, 4, 32), 1, enable_nested_tensor=False)
    with pytest.raises(UnsupportedError, match="batch_first"):
        ContinualEncoder(sideways, 8)
