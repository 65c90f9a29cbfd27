"""MoH (#16): every token uses a few of the heads, always the shared ones and the best K of the others.

Jin et al., arXiv:2410.11842 (ICML 2025). The output projection is a sum over heads, so each term may have a gate:

    out = sum_h g_h z_h W_O[h]                                           z [B, T, H, Dh], g [B, T, H], dimensionless
    g_h = a1 hs softmax(x W_s)_h          of the hs shared heads (the first ones);   a = 2 softmax(x W_h), or 1 without both kinds
    g_h = a2 K p_h / sum_S p              of the K routed heads in S = top-K of p = softmax(x W_r) over the E = H - hs; else 0

x [B, T, D] is what attention reads. The factors hs, K and 2 (of the released code, not of the paper) make the mean gate 1: with
all W zero each gate in S is exactly 1, and with K = E the model is what it was. Balance is in the loss: E sum_h P_h f_h, the mean
over layers, P_h the mean of p_h over tokens and f_h the share of tokens that choose h.

A checkpoint is converted without new weights (`router="queries"`): p = softmax(||q_h|| / their standard deviation over the routed
heads), q before rotation, and gates are 0 or 1; gradients pass straight through to p.

Keys and values are made for every token and head, since others may attend to them there: the cache does not shrink.
Unselected heads are masked, as in the released code; `skipping` does not compute them. See the page for which is faster.

The paper converts with 16 of 32 heads shared and 8 of 16 routed, from scratch it has 50 to 90 % of heads; balance 0.01.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedModel

from manyheads.errors import InputError, UnsupportedError
from manyheads.inputs import check_choice, check_integer, check_number
from manyheads.model.headmodel import HeadModel
from manyheads.model.hooks import first_tensor, hidden_of, with_hidden
from manyheads.model.weights.converted import conversion, converted, submodule
from manyheads.model.weights.copies import settled
from manyheads.model.weights.slices import head_map
from manyheads.progress import Bar
from manyheads.shrink.shrinking import shrinks
from manyheads.training import Batch, TrainSettings, epoch_rows, fit, next_token_loss

Router = Literal["learned", "queries"]
BALANCE = 0.01
TUNING = TrainSettings(
    steps=300, rows=8, rate=2e-5, warmup=10, decay=0.0, betas=(0.9, 0.95), weight_decay=0.0, precision="fp32"
)


class HeadRouter(nn.Module):
    """The gates of one attention's heads (formulas above), and what they were for the tokens read last.

    `query` is the path of the query projection, and `starts` are the first features of each head's query in what it makes.
    A router that is not `learned` has no weights: it goes by these queries.
    """

    def __init__(
        self,
        width: int,
        n_heads: int,
        shared: int,
        active: int,
        head_dim: int,
        query: str,
        starts: Sequence[int],
        learned: bool,
    ) -> None:
        super().__init__()
        self.n_heads, self.shared, self.active, self.routed = n_heads, shared, active, n_heads - shared
        self.head_dim, self.query, self.starts, self.learned = head_dim, query, list(starts), learned
        self.features = [[start + d for d in range(head_dim)] for start in starts[shared:]]
        self.W_r = _zero(width, self.routed) if learned and self.routed else None
        self.W_s = _zero(width, shared) if learned and shared > 1 else None
        self.W_h = _zero(width, 2) if learned and shared and self.routed else None
        self.gates: Tensor | None = None  # from the attention's input to its output projection, which takes them
        self.selected: Tensor | None = None  # [..., E], which of the routed heads
        self.balance: Tensor | None = None

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"gates": None, "selected": None, "balance": None}  # graphs cannot be copied

    def see_input(self, _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """A hook of the attention of a learned router."""
        x = hidden_of(args, kwargs)
        shared, routed = x.new_ones(*x.shape[:-1], self.shared), x.new_ones(*x.shape[:-1], 0)
        if self.W_s is not None:
            shared = self.shared * F.softmax(self.W_s(x), -1)
        if self.W_r is not None:
            routed = self._chosen(self.W_r(x))
        if self.W_h is not None:
            a = 2 * F.softmax(self.W_h(x), -1)
            shared, routed = a[..., :1] * shared, a[..., 1:] * routed
        self.gates = torch.cat([shared, routed], -1)

    def see_queries(self, _: nn.Module, args: Any, output: Any) -> None:
        """A hook of the query projection, for a router without weights."""
        norms = first_tensor(output)[..., self.features].norm(dim=-1)
        soft = self._chosen(norms / norms.std(-1, keepdim=True).clamp(min=1e-6))
        assert self.selected is not None
        hard = self.selected + (soft - soft.detach())  # so bracketed it is exactly 0 or 1
        self.gates = torch.cat([hard.new_ones(*hard.shape[:-1], self.shared), hard], -1)

    def _chosen(self, scores: Float[Tensor, "*B E"]) -> Float[Tensor, "*B E"]:
        """`K p / sum_S p` in S, 0 elsewhere; in training the balance is kept."""
        p = F.softmax(scores.float(), -1)
        self.selected = torch.zeros_like(p, dtype=torch.bool).scatter_(-1, p.topk(self.active, -1).indices, True)
        if self.training:
            P, f = (value.float().flatten(0, -2).mean(0) for value in (p, self.selected))
            self.balance = self.routed * (P * f).sum()
        inside = p * self.selected
        return (self.active * inside / inside.sum(-1, keepdim=True)).to(scores)

    def gate(self, _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """A hook of the output projection. Gates are used once: who runs it again by itself hands over z as it was read."""
        gates, self.gates = self.gates, None
        if gates is None:
            return None
        z = hidden_of(args, kwargs)
        gated = z.unflatten(-1, (self.n_heads, -1)) * gates.reshape(*z.shape[:-1], self.n_heads, 1)
        return with_hidden(args, kwargs, gated.flatten(-2))


def _zero(width: int, n: int) -> nn.Linear:
    linear = nn.Linear(width, n, bias=False)
    nn.init.zeros_(linear.weight)
    return linear


NAME = "head_router"
_SETTINGS = ("width", "heads", "shared", "active", "head_dim", "query", "starts", "learned")


@conversion("moh")
def install(module: PreTrainedModel, settings: Mapping[str, Any]) -> None:
    """Give the attentions named in `settings` a router whose weights are zero: every gate of a chosen head is 1."""
    try:
        for layer in settings["layers"]:
            attention, projection = (submodule(module, layer[name]) for name in ("attention", "projection"))
            router = HeadRouter(*(layer[name] for name in _SETTINGS))
            some = next(projection.parameters())
            attention.add_module(NAME, router.to(device=some.device, dtype=some.dtype))
            if router.learned:
                attention.register_forward_pre_hook(router.see_input, with_kwargs=True)
            else:
                submodule(module, layer["query"]).register_forward_hook(router.see_queries)
            projection.register_forward_pre_hook(router.gate, with_kwargs=True)
    except (KeyError, TypeError, ValueError, AttributeError, StopIteration, RuntimeError) as error:
        reason = " ".join(str(error).split())
        raise InputError(f"these settings of routed heads do not fit {type(module).__name__}: {reason}.") from error


@dataclass(frozen=True)
class MoH:
    """Let every token use `share` of the heads: `MoH(share=0.75).convert(model)`.

    `share` is one number, or one a layer. `shared` heads are always in use (None: half of them). `router` is "queries" for a
    checkpoint (no new weights, gates 0 or 1), or "learned" for a model that is trained from the start; its weights begin with
    the standard deviation `spread` (0: gates of 1, and the first heads are chosen). Train the result with `train_routed`.
    """

    share: float | Sequence[float] = 0.75
    shared: int | None = None
    router: Router = "queries"
    spread: float = 0.02
    seed: int = 0

    def __post_init__(self) -> None:
        check_choice(self.router, "router", ("queries", "learned"))
        check_number(self.spread, "spread", 0)

    def convert(self, model: HeadModel) -> HeadModel:
        """A copy of `model` with routed heads; `model` stays as it is.

        `InputError` for shares that leave no head to choose or do not fit the layers, `UnsupportedError` where heads cannot be
        told apart in the weights.
        """
        base = settled(model)
        whole = base if isinstance(base, HeadModel) else HeadModel(base.plain, base.tokenizer, base.layout)
        routed = converted(whole, "moh", self.settings(whole))
        generator = torch.Generator().manual_seed(self.seed)
        for router in routers(routed.plain):
            for parameter in router.parameters():
                parameter.data.copy_(self.spread * torch.randn(parameter.shape, generator=generator))
        return routed

    def settings(self, model: HeadModel) -> dict[str, Any]:
        """What `install` is told."""
        model.require_alike("routed heads")
        if routers(model.plain):
            raise UnsupportedError(f"the heads of {type(model.plain).__name__} are routed already.")
        paths = {part: path for path, part in model.plain.named_modules()}
        maps = head_map(model)
        layers = []
        for layer, (shared, active) in enumerate(self._counts(model)):
            block = model.layout.blocks[layer]
            one: dict[str, Any] = {"attention": paths[block.attention], "projection": paths[block.projection]}
            one |= {"width": model.layout.hidden_size, "heads": model.n_heads, "head_dim": model.head_dim}
            query = maps[layer].query
            one |= {"shared": shared, "active": active, "learned": self.router == "learned"}
            one |= {"query": paths[query.module], "starts": query.index[:, 0].tolist()}
            layers.append(one)
        return {"layers": layers}

    def _counts(self, model: HeadModel) -> list[tuple[int, int]]:
        """Each layer's shared heads and K."""
        H = model.n_heads
        shares = [float(self.share)] * model.n_layers if isinstance(self.share, int | float) else list(self.share)
        if len(shares) != model.n_layers:
            raise InputError(f"{len(shares)} shares were given for {model.n_layers} layers; give one, or one a layer.")
        shared = H // 2 if self.shared is None else check_integer(self.shared, "shared", 0, H - 1)
        counts = [(shared, round(check_number(s, "share", 0, 1, above=True) * H) - shared) for s in shares]
        if min(active for _, active in counts) < 1:
            raise InputError(
                f"of {H} heads {shared} are shared, so that a share of {min(shares):g} leaves none to choose; "
                "give a larger share, or fewer shared heads."
            )
        if self.router == "queries" and H - shared < 2:
            raise InputError("routing by queries needs two heads to choose from; give fewer shared heads.")
        return counts


def routers(module: nn.Module) -> list[HeadRouter]:
    """The routers of a converted model, by layer."""
    return [part for part in module.modules() if isinstance(part, HeadRouter)]


def moh_loss(module: nn.Module, batch: Batch, balance: float = BALANCE) -> Float[Tensor, ""]:
    """The next-token loss in nats, and `balance` times the mean balance of the layers."""
    loss = next_token_loss(module, batch)
    balances = [router.balance for router in routers(module) if router.balance is not None]
    for router in routers(module):
        router.balance = None
    return loss + balance * torch.stack(balances).mean() if balances else loss


def train_routed(
    model: HeadModel,
    ids: Int[Tensor, "N T"],
    settings: TrainSettings = TUNING,
    *,
    balance: float = BALANCE,
    bar: Bar = Bar(),
) -> None:
    """Train `model` in place on the passages `ids`: all weights and routers. A model without routers is trained plainly."""

    def batch(number: int) -> Batch:
        return {"input_ids": ids[epoch_rows(len(ids), settings.rows, number, settings.seed)]}

    model.plain.requires_grad_(True)
    fit(model.plain, batch, settings, loss=partial(moh_loss, balance=balance), bar=bar)
    model.plain.to(model.device).eval()


def loads(model: HeadModel, ids: Int[Tensor, "N T"]) -> list[Float[Tensor, "E"]]:
    """For each layer, the share of tokens that choose each routed head. Balanced, all are K / E."""
    found = routers(model.plain)
    seen = [torch.zeros(router.routed) for router in found]
    for rows in ids.split(8):
        model.logits(rows)
        for total, router in zip(seen, found, strict=True):
            if router.selected is not None:
                total += router.selected.float().flatten(0, -2).sum(0).cpu()
    return [total / ids.numel() for total in seen]


@shrinks("moh", "weights", "every token uses some heads alone; nothing is trained, and neither memory nor time falls")
def _make(ratio: float) -> MoH:
    return MoH(share=1 - ratio)
