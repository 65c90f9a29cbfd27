"""The network of Prithvi WxC (#77) as a model of Transformers, whose heads `open_model` reads.

Schmude et al., "Prithvi WxC: Foundation Model for Weather and Climate", arXiv:2409.13598.

    tokens     patches of P x P cells, [D]; n windows of m tokens each, window after window         [B, n m, D]
    x          embed(values) + embed(static) + Fourier(lat, lon) + [cos a, cos b, sin a, sin b]     a, b: lead and gap, linear
    local      attention inside each window; every second time between windows shifted by half of their size
    global     attention across windows, among tokens at the same place of their window
    encoder    2 K_e + 1 layers local, global, ..., local; a masked token is nobody's key there
    decoder    2 K_d + 1 layers of the same kind; a masked token begins as a learned one, with its static, place and time
    out        W x + b of each token, back on the grid                                              [B, C, lat, lon]

A layer is x + attention(norm x), x + MLP(norm x). Transposing the axes of windows and tokens makes a local layer global. `layers`
holds encoder and decoder one after another.

Departures. The paper drops masked tokens from the encoder's sequence to save time; here nobody reads them, which computes the
same. Longitude wraps; tokens that a shift brings together across the poles do not see each other.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Any, Literal

import torch
from jaxtyping import Bool, Float, Int, Shaped
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PretrainedConfig, PreTrainedModel
from transformers.modeling_outputs import BaseModelOutput
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.utils.generic import ModelOutput

from manyheads.errors import InputError
from manyheads.forecast.transformers.chronos2_model import eager_attention_forward

__all__ = ["PrithviConfig", "PrithviModel", "eager_attention_forward"]  # the last: readers look for it in this file

Kind = Literal["local", "shifted", "global"]


class PrithviConfig(PretrainedConfig):
    """Sizes. `image_size` in cells, `patch_size` P, `window` in tokens, `num_channels` of the values read, `outputs` C.

    `statics` are the channels of the static input. `wraps`: whether longitude does. Without `mixes` global layers are local.
    """

    model_type = "prithvi_wxc"

    def __init__(
        self,
        image_size: tuple[int, int] = (16, 32),
        patch_size: int = 2,
        window: tuple[int, int] = (4, 4),
        num_channels: int = 2,
        outputs: int = 1,
        statics: int = 0,
        hidden_size: int = 64,
        num_attention_heads: int = 4,
        encoder_blocks: int = 1,
        decoder_blocks: int = 0,
        mlp_ratio: int = 4,
        wraps: bool = True,
        mixes: bool = True,
        **kwargs: Any,
    ) -> None:
        self.image_size, self.patch_size, self.window = list(image_size), patch_size, list(window)
        self.num_channels, self.outputs, self.statics = num_channels, outputs, statics
        self.hidden_size, self.num_attention_heads, self.mlp_ratio = hidden_size, num_attention_heads, mlp_ratio
        self.encoder_blocks, self.decoder_blocks, self.wraps, self.mixes = encoder_blocks, decoder_blocks, wraps, mixes
        super().__init__(**kwargs)
        if hidden_size % 4 or hidden_size % num_attention_heads:
            raise InputError(
                f"hidden_size is {hidden_size}; give a multiple of 4 and of the {num_attention_heads} heads."
            )
        unit = [patch_size * side for side in window]
        if any(cells % one for cells, one in zip(image_size, unit, strict=True)):
            raise InputError(
                f"a grid of {list(image_size)} cells is no whole number of windows of {unit} cells; pad it."
            )

    @property
    def tokens(self) -> tuple[int, int]:
        """Tokens of a column and of a row of the grid."""
        return self.image_size[0] // self.patch_size, self.image_size[1] // self.patch_size

    def kind(self, layer: int, masked: bool) -> Kind:
        """What a layer's attention is; no window is shifted where tokens are masked."""
        at = layer - (2 * self.encoder_blocks + 1)
        at = layer if at < 0 else at
        if at % 2 == 1 and self.mixes:
            return "global"
        return "shifted" if layer % 4 >= 2 and not masked else "local"


def partitioned(x: Shaped[Tensor, "B h w D"], window: tuple[int, int]) -> Shaped[Tensor, "B n m D"]:
    """A grid of tokens as windows of `window` tokens each: [B, windows, tokens of a window, D]."""
    batch, h, w, width = x.shape
    a, b = window
    return x.reshape(batch, h // a, a, w // b, b, width).transpose(2, 3).reshape(batch, -1, a * b, width)


def unpartitioned(
    x: Float[Tensor, "B n m D"], window: tuple[int, int], grid: tuple[int, int]
) -> Float[Tensor, "B h w D"]:
    """`partitioned`, undone."""
    (a, b), (h, w) = window, grid
    return x.reshape(len(x), h // a, w // b, a, b, -1).transpose(2, 3).reshape(len(x), h, w, -1)


@dataclass(frozen=True)
class TokenGroups:
    """Who sees whom in a layer: token `order[g, i]` is the i-th of group g; `barred` [g, i, j]: j is hidden from i."""

    order: Int[Tensor, "g s"]
    barred: Bool[Tensor, "g s s"] | None = None

    def folded(self, x: Float[Tensor, "B N H Dh"]) -> Float[Tensor, "R H s Dh"]:
        """Groups as rows."""
        return x[:, self.order].flatten(0, 1).transpose(1, 2)

    def unfolded(self, z: Float[Tensor, "R H s Dh"]) -> Float[Tensor, "B N H Dh"]:
        """`folded`, undone."""
        rows = z.transpose(1, 2).unflatten(0, (-1, len(self.order))).flatten(1, 2)
        return rows[:, self.order.flatten().argsort()]

    def mask(self, visible: Bool[Tensor, "B N"] | None, batch: int) -> Bool[Tensor, "R 1 s s"] | None:
        """Which keys a folded query may read; None for all. Every token reads itself."""
        if visible is None and self.barred is None:
            return None
        n, size = self.order.shape
        seen = torch.ones(batch, n, size, size, dtype=torch.bool)
        if visible is not None:
            seen = visible[:, self.order][:, :, None] | torch.eye(size, dtype=torch.bool)
        if self.barred is not None:
            seen = seen & ~self.barred
        return seen.view(-1, 1, size, size)

    def dense(self, visible: Bool[Tensor, "B N"] | None, dtype: torch.dtype) -> Float[Tensor, "B 1 N N"]:
        """The same as what is added to the scores of all tokens of a row."""
        n = self.order.numel()
        seen = torch.zeros(n, n, dtype=torch.bool)
        inside = torch.ones(*self.order.shape, self.order.shape[1], dtype=torch.bool)
        inside = inside if self.barred is None else ~self.barred
        seen[self.order[:, :, None], self.order[:, None, :]] = inside
        if visible is not None:
            seen = seen & visible[:, None, :] | torch.eye(n, dtype=torch.bool)
        low = torch.finfo(dtype).min
        return torch.zeros(seen.shape, dtype=dtype).masked_fill(~seen, low).view(-1, 1, n, n)


@cache
def token_groups(grid: tuple[int, int], window: tuple[int, int], kind: Kind, wraps: bool) -> TokenGroups:
    """The groups of a layer, for tokens that lie window after window."""
    h, w = grid
    raster = partitioned(torch.arange(h * w).view(1, h, w, 1), window)[0, ..., 0]
    if kind == "local":
        return TokenGroups(torch.arange(h * w).view_as(raster))
    if kind == "global":
        return TokenGroups(torch.arange(h * w).view_as(raster).T.contiguous())
    # A grid of a single window has no border to shift away.
    by = [side // 2 if cells > side else 0 for side, cells in zip(window, grid, strict=True)]
    rolled = torch.arange(h * w).view(h, w).roll((-by[0], -by[1]), (0, 1))
    shifted = partitioned(rolled.view(1, h, w, 1), window)[0, ..., 0]
    place = raster.flatten().argsort()  # where a token of the raster lies among the windows
    beyond = (shifted // w < by[0]).long()
    beyond = beyond if wraps else 2 * beyond + (shifted % w < by[1])
    barred = beyond[:, :, None] != beyond[:, None, :]
    return TokenGroups(place[shifted], barred if bool(barred.any()) else None)


class GroupedAttention(nn.Module):
    """Attention among the tokens of each group."""

    def __init__(self, config: PrithviConfig) -> None:
        super().__init__()
        width = config.hidden_size
        self.config, self.n_heads = config, config.num_attention_heads
        self.q, self.k, self.v, self.o = (nn.Linear(width, width) for _ in range(4))

    def forward(
        self, x: Float[Tensor, "B N D"], groups: TokenGroups, visible: Bool[Tensor, "B N"] | None = None
    ) -> Float[Tensor, "B N D"]:
        """What the heads write."""
        if x.shape[1] != groups.order.numel():  # where weights are probed by a single token
            groups, visible = TokenGroups(torch.arange(x.shape[1])[None]), None
        q, k, v = (part(x).unflatten(-1, (self.n_heads, -1)) for part in (self.q, self.k, self.v))
        kind = self.config._attn_implementation
        if kind in ("sdpa", "eager"):
            q, k, v = (groups.folded(part) for part in (q, k, v))
            z = groups.unfolded(F.scaled_dot_product_attention(q, k, v, groups.mask(visible, len(x))))
        else:  # somebody watches: all tokens of a row in one pattern
            q, k, v = (part.transpose(1, 2) for part in (q, k, v))
            attend = ALL_ATTENTION_FUNCTIONS[kind]
            z, _ = attend(self, q, k, v, groups.dense(visible, q.dtype), scaling=q.shape[-1] ** -0.5, dropout=0.0)
        out: Tensor = self.o(z.flatten(-2))
        return out


class FieldLayer(nn.Module):
    """x + attention(norm x), then x + MLP(norm x)."""

    def __init__(self, config: PrithviConfig) -> None:
        super().__init__()
        width, hidden = config.hidden_size, config.mlp_ratio * config.hidden_size
        self.norm, self.mlp_norm = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attention = GroupedAttention(config)
        self.mlp = nn.Sequential(nn.Linear(width, hidden), nn.GELU(), nn.Linear(hidden, width))

    def forward(
        self, x: Float[Tensor, "B N D"], groups: TokenGroups, visible: Bool[Tensor, "B N"] | None = None
    ) -> Float[Tensor, "B N D"]:
        """The stream after both."""
        x = x + self.attention(self.norm(x), groups, visible)
        return x + self.mlp(self.mlp_norm(x))


def fourier_positions(grid: tuple[int, int], width: int, wraps: bool) -> Float[Tensor, "h w D"]:
    """Sines and cosines of 1 to D / 4 times the angle of each row (0 to pi) and column (to 2 pi; to pi without wrapping)."""
    h, w = grid
    rows = torch.pi * (torch.arange(h) + 0.5) / h
    columns = (2 if wraps else 1) * torch.pi * torch.arange(w) / w
    times = torch.arange(1, width // 4 + 1)
    lat, lon = (angle[:, None] * times for angle in (rows, columns))
    parts = [lat.sin()[:, None].expand(h, w, -1), lat.cos()[:, None].expand(h, w, -1)]
    return torch.cat([*parts, lon.sin().expand(h, w, -1), lon.cos().expand(h, w, -1)], -1)


class _Prithvi(PreTrainedModel):
    config_class = PrithviConfig
    main_input_name = "pixel_values"
    _supports_sdpa = True

    def _init_weights(self, module: nn.Module) -> None:
        """PyTorch's own weights stay."""


class PrithviTrunk(_Prithvi):
    """From fields to states of the tokens, window after window."""

    def __init__(self, config: PrithviConfig) -> None:
        super().__init__(config)
        width, patch = config.hidden_size, config.patch_size
        self.embed = nn.Conv2d(config.num_channels, width, patch, patch)
        self.embed_static = nn.Conv2d(config.statics, width, patch, patch) if config.statics else None
        self.embed_lead, self.embed_gap = nn.Linear(1, width // 4), nn.Linear(1, width // 4)
        self.mask_token = nn.Parameter(torch.zeros(width))
        n_layers = 2 * (config.encoder_blocks + config.decoder_blocks + 1)
        self.layers = nn.ModuleList([FieldLayer(config) for _ in range(n_layers)])
        self.norm = nn.LayerNorm(width)
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        """The map of patches."""
        return self.embed

    def forward(
        self,
        pixel_values: Float[Tensor, "B K I J"],
        static: Float[Tensor, "B S I J"] | None = None,
        visible: Bool[Tensor, "B N"] | None = None,
        lead: Float[Tensor, "B"] | None = None,
        gap: Float[Tensor, "B"] | None = None,
    ) -> BaseModelOutput:
        """States [B, N, D] as `last_hidden_state`. `visible` says which tokens are not masked, lead and gap are in steps (1)."""
        window = (self.config.window[0], self.config.window[1])
        known = self._known(len(pixel_values), static, lead, gap).to(pixel_values.dtype)
        x = self._windows(self.embed(pixel_values)) + known
        first = 2 * self.config.encoder_blocks + 1  # of the decoder
        for i, layer in enumerate(self.layers):
            if i == first and visible is not None:
                x = torch.where(visible[..., None], x, self.mask_token + known)
            kind = self.config.kind(i, visible is not None)
            groups = token_groups(self.config.tokens, window, kind, self.config.wraps)
            x = layer(x, groups, visible if i < first else None)
        return BaseModelOutput(last_hidden_state=self.norm(x))

    def _windows(self, maps: Float[Tensor, "B D h w"]) -> Float[Tensor, "B N D"]:
        return partitioned(maps.permute(0, 2, 3, 1), (self.config.window[0], self.config.window[1])).flatten(1, 2)

    def _known(
        self, rows: int, static: Tensor | None, lead: Tensor | None, gap: Tensor | None
    ) -> Float[Tensor, "B N D"]:
        """What is known of masked tokens too: static fields, places, and the two times."""
        config = self.config
        place = fourier_positions(config.tokens, config.hidden_size, config.wraps)
        known = self._windows(place.permute(2, 0, 1)[None]).expand(rows, -1, -1)
        one = torch.ones(rows)
        a, b = (
            embed((one if t is None else t)[:, None].float())
            for embed, t in ((self.embed_lead, lead), (self.embed_gap, gap))
        )
        known = known + torch.cat([a.cos(), b.cos(), a.sin(), b.sin()], -1)[:, None]
        if self.embed_static is not None and static is not None:
            known = known + self._windows(self.embed_static(static))
        return known


@dataclass
class FieldOutput(ModelOutput):
    """`anomaly` [B, C, lat, lon] in units of sigma, and the states that it was made of."""

    anomaly: Tensor | None = None
    last_hidden_state: Tensor | None = None


class PrithviModel(_Prithvi):
    """Trunk and head in one: what `open_model` opens."""

    base_model_prefix = "trunk"

    def __init__(self, config: PrithviConfig) -> None:
        super().__init__(config)
        self.trunk = PrithviTrunk(config)
        self.head = nn.Linear(config.hidden_size, config.outputs * config.patch_size**2)
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        """The map of patches."""
        return self.trunk.embed

    def forward(
        self,
        pixel_values: Float[Tensor, "B K I J"],
        static: Float[Tensor, "B S I J"] | None = None,
        visible: Bool[Tensor, "B N"] | None = None,
        lead: Float[Tensor, "B"] | None = None,
        gap: Float[Tensor, "B"] | None = None,
    ) -> FieldOutput:
        """The anomaly that is forecast (see `PrithviTrunk.forward`)."""
        states = self.trunk(pixel_values, static, visible, lead, gap).last_hidden_state
        config = self.config
        window = (config.window[0], config.window[1])
        tokens = self.head(states).unflatten(1, (-1, window[0] * window[1]))
        maps = unpartitioned(tokens, window, config.tokens).permute(0, 3, 1, 2)
        return FieldOutput(F.pixel_shuffle(maps, config.patch_size), states)
