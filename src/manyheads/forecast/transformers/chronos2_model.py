"""The network of Chronos-2 (#52), as a Transformers model: `open_model` reads its heads, and the published weights fit.

Ansari et al., arXiv:2510.15821. A series of C channels (targets, past-only covariates, covariates known ahead) is a group. Its
tokens are C x n: for each channel patches of P steps of the past, one token REG, and m patches of the future, in which only
covariates that are known ahead have values.

    token        E [time / S, value, observed] of P steps; time ends at -1 before the cut, S is a constant; missing values are 0
    E            W_2 ReLU(W_1 x) + W_3 x                                                            [3 P] -> [D]
    time         x + softmax(q k^T) v W_O over the patches of one channel, rotary angles 1e4; patches without a value are no keys
    group        x + softmax(q k^T) v W_O over the channels at one place; then x + W_2 ReLU(W_1 x)
    quantiles    the same kind of map as E, [D] -> [Q P], of the future patches after the last norm

No score is divided by the root of the head's width. Norms (RMS) stand before each part. The loss is summed over levels:

    L = mean over channels of sum_tau mean_steps 2 |(y - q_tau) (1[y <= q_tau] - tau)| m        m: 1 where y counts

`layers` holds time and group attention in turn, so that `L0H3` is a head over time and `L1H3` one over channels, and a position
is channel c's place p: c n + p. The released code keeps [rows, n, D] of all groups; ours keeps a group's tokens in one row. So
the cost of group attention does not grow with the number of groups, and a pattern [C n, C n] says which channel and patch was
read. It is made only where somebody looks; without readers attention goes channel by channel and place by place.
"""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any, Literal

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PretrainedConfig, PreTrainedModel
from transformers.modeling_outputs import BaseModelOutput
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.utils.generic import ModelOutput

from manyheads.errors import InputError, UnsupportedError
from manyheads.forecast.core.heads import Target, pinball
from manyheads.forecast.transformers.chronos2_files import released_settings, released_tensors, write_released
from manyheads.learning import Head

QUANTILES_21 = (0.01, *(round(0.05 * i, 2) for i in range(1, 20)), 0.99)
REG = 1  # the row of the table of special tokens; row 0 is not used
Axis = Literal["time", "group"]


class Chronos2Config(PretrainedConfig):
    """The sizes of the network. `blocks` pairs of layers; the defaults are the published ones (120M).

    `longest_context` and `longest_horizon` are in steps, `time_scale` is S. `prediction_length` is the horizon where a batch does
    not say it, and `num_input_channels` that of the series on which a model is tried when it is opened: it takes any number.
    """

    model_type = "chronos2"

    def __init__(
        self,
        hidden_size: int = 768,
        head_dim: int = 64,
        num_attention_heads: int = 12,
        intermediate_size: int = 3072,
        blocks: int = 12,
        patch: int = 16,
        levels: tuple[float, ...] = QUANTILES_21,
        longest_context: int = 8192,
        longest_horizon: int = 1024,
        time_scale: int = 8192,
        prediction_length: int = 64,
        dropout: float = 0.1,
        norm_epsilon: float = 1e-6,
        initializer_factor: float = 0.05,
        rope_theta: float = 10000.0,
        mixes: bool = True,
        num_input_channels: int = 3,
        **kwargs: Any,
    ) -> None:
        self.hidden_size, self.head_dim, self.num_attention_heads = hidden_size, head_dim, num_attention_heads
        self.intermediate_size, self.blocks, self.patch, self.levels = intermediate_size, blocks, patch, list(levels)
        self.longest_context, self.longest_horizon, self.time_scale = longest_context, longest_horizon, time_scale
        self.prediction_length, self.num_input_channels, self.mixes = prediction_length, num_input_channels, mixes
        self.dropout, self.norm_epsilon, self.initializer_factor = dropout, norm_epsilon, initializer_factor
        self.rope_theta = rope_theta
        super().__init__(**kwargs)

    def sizes(self) -> dict[str, Any]:
        """What makes the same config again."""
        taken = inspect.signature(Chronos2Config.__init__).parameters
        return {name: getattr(self, name) for name in taken if name not in ("self", "kwargs")}


@dataclass(frozen=True)
class SeriesTokens:
    """The tokens of a pass: of C channels n places each, channel by channel. `there` says which may be read (None: all).

    `mixes`: whether channels of a row see each other. `across`: whether those of all rows do, as if the batch were one series.
    """

    channels: int
    cos: Float[Tensor, "n Dh"]
    sin: Float[Tensor, "n Dh"]
    there: Bool[Tensor, "B C n"] | None
    mixes: bool = True
    across: bool = False

    def of(self, x: Float[Tensor, "B N D"]) -> SeriesTokens:
        """These tokens; where weights are probed by a single token, that one alone."""
        fits = x.shape[1] == self.channels * len(self.cos)
        return self if fits else SeriesTokens(1, self.cos[: x.shape[1]], self.sin[: x.shape[1]], None)

    def rotated(self, x: Float[Tensor, "B N H Dh"]) -> Float[Tensor, "B N H Dh"]:
        """Queries or keys at their places' rotary angles."""
        x = x.unflatten(1, (self.channels, -1))
        low, high = x.chunk(2, -1)
        turned = x * self.cos[:, None] + torch.cat([-high, low], -1) * self.sin[:, None]
        return turned.flatten(1, 2)

    def folded(self, x: Float[Tensor, "B N H Dh"], axis: Axis) -> Float[Tensor, "R H S Dh"]:
        """Tokens that may see each other as rows: [B C, H, n, Dh] over time, [B n, H, C, Dh] over channels."""
        x = x.unflatten(1, (self.channels, -1))
        if axis == "time":
            return x.transpose(2, 3).flatten(0, 1)
        if self.across:
            return x.flatten(0, 1).permute(1, 2, 0, 3)
        return x.permute(0, 2, 3, 1, 4).flatten(0, 1)

    def unfolded(self, z: Float[Tensor, "R H S Dh"], axis: Axis) -> Float[Tensor, "B N H Dh"]:
        """`folded`, undone."""
        if axis == "time":
            x = z.unflatten(0, (-1, self.channels)).transpose(2, 3)
        elif self.across:
            x = z.permute(2, 0, 1, 3).unflatten(0, (-1, self.channels))
        else:
            x = z.unflatten(0, (-1, len(self.cos))).permute(0, 3, 1, 2, 4)
        return x.flatten(1, 2)

    def mask(self, axis: Axis) -> Bool[Tensor, "R 1 S S"] | None:
        """Which keys a folded query may read; None for all. A token that may not be read reads itself alone."""
        return self._over_time if axis == "time" else self._over_channels

    @cached_property
    def _over_time(self) -> Tensor | None:
        return None if self.there is None else _keys(self.there.flatten(0, 1))

    @cached_property
    def _over_channels(self) -> Tensor | None:
        if not self.mixes and not self.across:
            return torch.eye(self.channels, dtype=torch.bool, device=self.cos.device)[None, None]
        if self.there is None:
            return None
        there = self.there.flatten(0, 1).T if self.across else self.there.transpose(1, 2).flatten(0, 1)
        return _keys(there)

    def dense(self, axis: Axis, dtype: torch.dtype) -> Float[Tensor, "B 1 N N"]:
        """The same as what is added to the scores of all tokens of a row. `UnsupportedError` where rows see each other."""
        if self.across:
            raise UnsupportedError(
                "heads that attend across the series of a batch cannot be watched; set across=False."
            )
        n, device = len(self.cos), self.cos.device
        token = torch.arange(self.channels * n, device=device)
        at = token // n if axis == "time" else token % n
        seen = (
            (at[:, None] == at) if axis == "time" or self.mixes else torch.eye(len(at), dtype=torch.bool, device=device)
        )
        if self.there is not None:
            seen = seen & self.there.flatten(1)[:, None, :] | torch.eye(len(at), dtype=torch.bool, device=device)
        low = torch.finfo(dtype).min
        return torch.zeros(seen.shape, dtype=dtype, device=device).masked_fill(~seen, low).view(-1, 1, *seen.shape[-2:])


def _keys(there: Bool[Tensor, "R S"]) -> Bool[Tensor, "R 1 S S"]:
    own = torch.eye(there.shape[1], dtype=torch.bool, device=there.device)
    return (there[:, None, :] | own)[:, None]


def eager_attention_forward(
    module: nn.Module,
    query: Float[Tensor, "B H N Dh"],
    key: Float[Tensor, "B H N Dh"],
    value: Float[Tensor, "B H N Dh"],
    attention_mask: Float[Tensor, "#B 1 N N"] | None,
    scaling: float = 1.0,
    dropout: float = 0.0,
    **_: Any,
) -> tuple[Float[Tensor, "B N H Dh"], Float[Tensor, "B H N N"]]:
    """softmax(q k^T + mask) v and the pattern, as readers of a Transformers model ask for it."""
    scores = query @ key.transpose(-1, -2) * scaling
    pattern = (scores if attention_mask is None else scores + attention_mask).softmax(-1)
    z = F.dropout(pattern, dropout, module.training) @ value
    return z.transpose(1, 2).contiguous(), pattern


class RMSScale(nn.Module):
    """x / sqrt(mean x^2 + epsilon), times a gain."""

    def __init__(self, width: int, epsilon: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.variance_epsilon = epsilon

    def forward(self, x: Float[Tensor, "*B D"]) -> Float[Tensor, "*B D"]:
        """The scaled states."""
        return self.weight * (x * torch.rsqrt(x.float().square().mean(-1, keepdim=True) + self.variance_epsilon)).to(x)


class AxisAttention(nn.Module):
    """Attention over time or over the channels of a group, without biases and without 1 / sqrt(Dh)."""

    def __init__(self, config: Chronos2Config, axis: Axis) -> None:
        super().__init__()
        inner = config.num_attention_heads * config.head_dim
        self.config, self.axis, self.n_heads = config, axis, config.num_attention_heads
        self.q, self.k, self.v = (nn.Linear(config.hidden_size, inner, bias=False) for _ in range(3))
        self.o = nn.Linear(inner, config.hidden_size, bias=False)

    def forward(self, x: Float[Tensor, "B N D"], tokens: SeriesTokens) -> Float[Tensor, "B N D"]:
        """What the heads write."""
        tokens = tokens.of(x)
        q, k, v = (part(x).unflatten(-1, (self.n_heads, -1)) for part in (self.q, self.k, self.v))
        if self.axis == "time":
            q, k = tokens.rotated(q), tokens.rotated(k)
        dropout = self.config.dropout if self.training else 0.0
        kind = self.config._attn_implementation
        if kind in ("sdpa", "eager"):
            q, k, v = (tokens.folded(part, self.axis) for part in (q, k, v))
            z = F.scaled_dot_product_attention(q, k, v, tokens.mask(self.axis), dropout, scale=1.0)
            z = tokens.unfolded(z, self.axis)
        else:  # somebody watches: all tokens of a row in one pattern
            q, k, v = (part.transpose(1, 2) for part in (q, k, v))
            attend = ALL_ATTENTION_FUNCTIONS[kind]
            z, _ = attend(self, q, k, v, tokens.dense(self.axis, q.dtype), scaling=1.0, dropout=dropout)
        out: Tensor = self.o(z.flatten(-2))
        return out


class Feed(nn.Module):
    """W_o ReLU(W_i x), without biases."""

    def __init__(self, config: Chronos2Config) -> None:
        super().__init__()
        self.wi = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.wo = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x: Float[Tensor, "*B D"]) -> Float[Tensor, "*B D"]:
        """What is added to the stream."""
        out: Tensor = self.wo(self.dropout(self.wi(x).relu()))
        return out


class SkipMap(nn.Module):
    """W_2 ReLU(W_1 x) + W_3 x, with biases: from patches to states, and from states to quantiles."""

    def __init__(self, inputs: int, hidden: int, outputs: int, dropout: float) -> None:
        super().__init__()
        self.hidden_layer, self.output_layer = nn.Linear(inputs, hidden), nn.Linear(hidden, outputs)
        self.residual_layer = nn.Linear(inputs, outputs)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Float[Tensor, "*B I"]) -> Float[Tensor, "*B O"]:
        """The mapped rows."""
        out: Tensor = self.dropout(self.output_layer(self.hidden_layer(x).relu())) + self.residual_layer(x)
        return out


class TimeLayer(nn.Module):
    """x + attention over time."""

    def __init__(self, config: Chronos2Config) -> None:
        super().__init__()
        self.attention = AxisAttention(config, "time")
        self.norm = RMSScale(config.hidden_size, config.norm_epsilon)
        self.p = config.dropout

    def forward(self, x: Float[Tensor, "B N D"], tokens: SeriesTokens) -> Float[Tensor, "B N D"]:
        """The stream after it."""
        # No module of its own drops: in the stream the attention's output is the only thing that is added.
        return x + F.dropout(self.attention(self.norm(x), tokens), self.p, self.training)


class GroupLayer(nn.Module):
    """x + attention over the channels of a group, then x + feed-forward."""

    def __init__(self, config: Chronos2Config) -> None:
        super().__init__()
        self.attention = AxisAttention(config, "group")
        self.norm = RMSScale(config.hidden_size, config.norm_epsilon)
        self.mlp = Feed(config)
        self.mlp_norm = RMSScale(config.hidden_size, config.norm_epsilon)
        self.p = config.dropout

    def forward(self, x: Float[Tensor, "B N D"], tokens: SeriesTokens) -> Float[Tensor, "B N D"]:
        """The stream after both."""
        x = x + F.dropout(self.attention(self.norm(x), tokens), self.p, self.training)
        return x + F.dropout(self.mlp(self.mlp_norm(x)), self.p, self.training)


class _Chronos2(PreTrainedModel):
    config_class = Chronos2Config
    main_input_name = "past_values"
    _supports_sdpa = True

    def _init_weights(self, module: nn.Module) -> None:
        """Nothing: Transformers would pass over modules whose parts hold the weights. `_draw` is called where they are made."""


@torch.no_grad()
def _draw(module: nn.Module, factor: float) -> None:
    """The paper's weights: scores begin small, though nothing divides them by the root of the head's width."""
    sizes: dict[nn.Module, int] = {}
    if isinstance(module, RMSScale):
        module.weight.fill_(factor)
    elif isinstance(module, nn.Embedding):
        module.weight.normal_(std=factor)
    elif isinstance(module, AxisAttention):
        width, inner = module.q.in_features, module.q.out_features
        sizes = {module.q: width * inner // module.n_heads, module.k: width, module.v: width, module.o: inner}
    elif isinstance(module, Feed | SkipMap):
        sizes = {part: part.in_features for part in module.children() if isinstance(part, nn.Linear)}
    for linear, size in sizes.items():
        linear.weight.normal_(std=factor * size**-0.5)  # type: ignore[operator, union-attr]
        if linear.bias is not None:
            linear.bias.zero_()  # type: ignore[operator]


class Chronos2Trunk(_Chronos2):
    """From a scaled window to the states of its future patches."""

    def __init__(self, config: Chronos2Config) -> None:
        super().__init__(config)
        self.across = False
        self.shared = nn.Embedding(2, config.hidden_size)
        self.embed = SkipMap(3 * config.patch, config.intermediate_size, config.hidden_size, config.dropout)
        kinds = (TimeLayer, GroupLayer)
        self.layers = nn.ModuleList([kind(config) for _ in range(config.blocks) for kind in kinds])
        self.norm = RMSScale(config.hidden_size, config.norm_epsilon)
        self.dropout = nn.Dropout(config.dropout)
        self.post_init()
        self.apply(partial(_draw, factor=config.initializer_factor))

    def get_input_embeddings(self) -> nn.Module:
        """The first map of patches."""
        return self.embed.hidden_layer

    def forward(
        self,
        past_values: Float[Tensor, "B T C"],
        past_observed_mask: Float[Tensor, "B T C"] | None = None,
        future_covariates: Float[Tensor, "B H K"] | None = None,
        future_covariates_mask: Float[Tensor, "B H K"] | None = None,
        channel_mask: Bool[Tensor, "B C"] | None = None,
    ) -> BaseModelOutput:
        """States [B, C, m, D] of the m = ceil(H / P) future patches of every channel, as `last_hidden_state`.

        Values are scaled already. The last K channels are those known ahead. Without masks NaN is what is missing. Where
        `channel_mask` is false a row has no such channel.
        """
        past, seen = _given(past_values, past_observed_mask)
        first = max(past.shape[1] - self.config.longest_context, int(seen.any(2).any(0).int().argmax()))
        past, seen = past[:, first:], seen[:, first:]  # without what no row of the batch has
        ahead, known = self._ahead(past, future_covariates, future_covariates_mask)
        patch, embed = self.config.patch, self.embed
        before = _patches(
            F.pad(past.mT, (-past.shape[1] % patch, 0)), F.pad(seen.mT, (-past.shape[1] % patch, 0)), patch
        )
        after = _patches(
            F.pad(ahead.mT, (0, -ahead.shape[1] % patch)), F.pad(known.mT, (0, -ahead.shape[1] % patch)), patch
        )
        m = after.shape[2]
        reg = self.shared.weight[REG].expand(*before.shape[:2], 1, -1)
        scale = self.config.time_scale
        x = torch.cat([embed(_timed(before, -before.shape[2], scale)), reg, embed(_timed(after, 0, scale))], 2)
        tokens = self._tokens(x, before[..., patch:].any(-1), channel_mask)
        x = self.dropout(x.flatten(1, 2))
        for layer in self.layers:
            x = layer(x, tokens)
        states = self.dropout(self.norm(x)).unflatten(1, (tokens.channels, -1))[:, :, -m:]
        return BaseModelOutput(last_hidden_state=states)

    def _ahead(self, past: Tensor, covariates: Tensor | None, mask: Tensor | None) -> tuple[Tensor, Tensor]:
        """Values [B, H, C] of the future and which are known: of the last K channels alone."""
        batch, _, channels = past.shape
        if covariates is None:
            nothing = past.new_zeros(batch, self.config.prediction_length, channels)
            return nothing, nothing.bool()
        if covariates.shape[-1] > channels:
            raise InputError(
                f"{covariates.shape[-1]} covariates are known ahead of {channels} channels; they are the last of them."
            )
        values, known = _given(covariates, mask)
        others = (channels - covariates.shape[-1], 0)
        return F.pad(values, others), F.pad(known, others)

    def _tokens(self, x: Tensor, past: Bool[Tensor, "B C n"], channels: Tensor | None) -> SeriesTokens:
        there = F.pad(past, (0, x.shape[2] - past.shape[2]), value=True)  # REG and the future may always be read
        there = there if channels is None else there & channels[..., None]
        half = torch.arange(0, self.config.head_dim, 2, device=x.device).float() / self.config.head_dim
        angle = torch.arange(x.shape[2], device=x.device).float()[:, None] * self.config.rope_theta**-half
        angle = torch.cat([angle, angle], -1)
        return SeriesTokens(
            x.shape[1],
            angle.cos().to(x.dtype),
            angle.sin().to(x.dtype),
            None if bool(there.all()) else there,
            self.config.mixes,
            self.across,
        )


def _given(values: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor]:
    """Values with 0 where they are missing, and what is there."""
    seen = ~values.isnan() if mask is None else mask > 0
    return torch.where(seen, values, 0.0), seen


def _patches(values: Tensor, seen: Tensor, patch: int) -> Float[Tensor, "B C n P2"]:
    return torch.cat([part.unflatten(-1, (-1, patch)).to(values) for part in (values, seen)], -1)


def _timed(patches: Float[Tensor, "B C n P2"], first: int, scale: int) -> Float[Tensor, "B C n P3"]:
    """Patches with the time of each step in front; the first patch is so many after the cut."""
    patch, n = patches.shape[-1] // 2, patches.shape[2]
    time = torch.arange(first * patch, (first + n) * patch, device=patches.device, dtype=torch.float32) / scale
    time = time.view(n, patch).to(patches.dtype).expand(*patches.shape[:3], -1)
    return torch.cat([time, patches], -1)


@dataclass(frozen=True)
class Chronos2HeadSettings:
    """`width` of the states, `hidden` of the map, steps of a patch, levels; how many channels are targets (None: all)."""

    width: int
    hidden: int
    patch: int
    levels: tuple[float, ...] = QUANTILES_21
    targets: int | None = None
    dropout: float = 0.0


class Chronos2Head(Head):
    """Quantiles of the steps of each future patch, for the targets; covariates' are dropped."""

    Settings = Chronos2HeadSettings
    levels: Tensor

    def __init__(self, settings: Chronos2HeadSettings) -> None:
        super().__init__(settings)
        outputs = settings.patch * len(settings.levels)
        self.block = SkipMap(settings.width, settings.hidden, outputs, settings.dropout)
        self.register_buffer("levels", torch.tensor(settings.levels), persistent=False)

    def forward(self, states: Float[Tensor, "B C m D"]) -> Float[Tensor, "B V H Q"]:
        """Quantiles of the targets in the scale of the window; H = m P steps, of which a batch may count fewer."""
        return self.every(states[:, : self.settings.targets])

    def every(self, states: Float[Tensor, "B C m D"]) -> Float[Tensor, "B C H Q"]:
        """The same of all channels."""
        found = self.block(states).unflatten(-1, (len(self.settings.levels), -1))
        return found.transpose(-1, -2).flatten(2, 3)

    def loss(self, output: Float[Tensor, "B V M Q"], target: Target) -> Float[Tensor, ""]:
        """L of the formula above, in the scale of the window."""
        future, counted, _ = target
        steps = future.shape[-1]
        return (pinball(future, output[:, :, :steps], self.levels) * counted[..., None]).mean(2).sum(-1).mean()

    def metrics(self, output: Float[Tensor, "B V M Q"], target: Target) -> dict[str, float]:
        """How far the share of values below a quantile is off, at most."""
        future, counted, _ = target
        below = (future[..., None] <= output[:, :, : future.shape[-1]]).float() * counted[..., None]
        share = below.sum((0, 1, 2)) / counted.sum().clamp_min(1)
        return {"coverage_error": float((share - self.levels).abs().max())}


@dataclass
class Chronos2Output(ModelOutput):
    """`quantiles` [B, C, H, Q] of every channel in the scale of the window, and the states that they were made of."""

    quantiles: Tensor | None = None
    last_hidden_state: Tensor | None = None


class Chronos2Model(_Chronos2):
    """Trunk and head in one: what `open_model` opens, and what is read from and written to a folder of the released layout."""

    base_model_prefix = "trunk"

    def __init__(self, config: Chronos2Config) -> None:
        super().__init__(config)
        self.trunk = Chronos2Trunk(config)
        c, levels = config, tuple(config.levels)
        self.head = Chronos2Head(
            Chronos2HeadSettings(c.hidden_size, c.intermediate_size, c.patch, levels, dropout=c.dropout)
        )
        self.post_init()
        self.head.apply(partial(_draw, factor=config.initializer_factor))

    def get_input_embeddings(self) -> nn.Module:
        """The first map of patches."""
        return self.trunk.get_input_embeddings()

    def forward(
        self,
        past_values: Float[Tensor, "B T C"],
        past_observed_mask: Float[Tensor, "B T C"] | None = None,
        future_covariates: Float[Tensor, "B H K"] | None = None,
        future_covariates_mask: Float[Tensor, "B H K"] | None = None,
        channel_mask: Bool[Tensor, "B C"] | None = None,
    ) -> Chronos2Output:
        """Quantiles of every channel, covariates too, in the scale of the window (see `Chronos2Trunk.forward`)."""
        states = self.trunk(
            past_values, past_observed_mask, future_covariates, future_covariates_mask, channel_mask
        ).last_hidden_state
        return Chronos2Output(self.head.every(states), states)

    @torch.no_grad()
    def forecast_rows(
        self,
        context: Float[Tensor, "R T"],
        group_ids: Int[Tensor, "R"] | None = None,
        future_covariates: Float[Tensor, "R F"] | None = None,
        horizon: int | None = None,
    ) -> Float[Tensor, "R H Q"]:
        """Quantiles of single series in their own unit, as the released model takes them: rows of one number are a group.

        NaN is missing, or not known ahead. Without `group_ids` each row is its own group. Rows are scaled by the mean and
        standard deviation of what was observed (1e-5 for a constant one), then by asinh.
        """
        rows = len(context)
        steps = horizon or (self.config.prediction_length if future_covariates is None else future_covariates.shape[1])
        ahead = (
            context.new_full((rows, steps), torch.nan) if future_covariates is None else future_covariates[:, :steps]
        )
        ahead = F.pad(ahead, (0, steps - ahead.shape[1]), value=torch.nan)
        ids = torch.arange(rows) if group_ids is None else group_ids
        members = [(ids == one).nonzero()[:, 0] for one in ids.unique()]
        at = nn.utils.rnn.pad_sequence(members, batch_first=True, padding_value=-1)  # [G, C], rows of each group
        context = context[:, -self.config.longest_context :]
        mean, std = row_scale(context)
        values, known = (torch.asinh((x - mean) / std)[at].mT for x in (context, ahead))
        out = self(values, future_covariates=known, channel_mask=at >= 0).quantiles[:, :, :steps]
        found = out.new_zeros(rows, *out.shape[2:])
        found[at[at >= 0]] = out[at >= 0]
        return torch.sinh(found) * std[..., None] + mean[..., None]

    def save_pretrained(self, save_directory: str | Path, **_: Any) -> None:  # type: ignore[override]
        """Write the released layout into a folder; other programs read it, and `from_pretrained` here."""
        write_released(save_directory, self.config, self.state_dict())

    @classmethod
    def from_pretrained(cls, folder: str | Path) -> Chronos2Model:  # type: ignore[override]
        """A model from a folder of the released layout, in float32 and eval mode. Errors are those of `released_settings`."""
        model = cls(Chronos2Config(**released_settings(folder)))
        model.load_state_dict(released_tensors(folder, model.state_dict()))
        return model.eval()


def row_scale(context: Float[Tensor, "R T"]) -> tuple[Float[Tensor, "R 1"], Float[Tensor, "R 1"]]:
    """Mean and standard deviation of each row's observed values; 0 and 1 where there is none, 1e-5 where they are equal."""
    mean = context.nanmean(1, keepdim=True).nan_to_num(0.0)
    std = (context - mean).square().nanmean(1, keepdim=True).sqrt().nan_to_num(1.0)
    return mean, std.where(std > 0, 1e-5)
