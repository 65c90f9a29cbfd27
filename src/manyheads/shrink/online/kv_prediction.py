"""KV prediction (#15): a smaller model reads the prompt, and linear maps make the larger one's cache of what it kept.

Horton et al., arXiv:2410.08391. With A the auxiliary model, j(i) the layer of A that serves layer i of the base,

    K^_i = K^A_j(i) M_i + c_i,    V^_i = V^A_j(i) N_i + d_i            all KV heads side by side, keys before they are rotated

    loss = CE(base reading K^, V^) + CE(A) + lam sum_i (mean|K^_i - K_i| + mean|V^_i - V_i|)                lam = 1 / L

The base stays as it is; A and the maps learn. To answer, A reads all of the prompt but the last token, the base reads that one
from the predicted cache and goes on alone: the time to the first token is nearly A's.

j repeats the early layers of A first (28 layers from 20: the first eight twice). `layer_pruned` makes an A of the base itself:
some of its layers, evenly spread. While it learns, a token's own key and value are predicted too, as in the paper; when it
answers, those of the last token are the base's own. Departure: the paper's small weight on squared logits (z-loss) is left out.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Self

import torch
from jaxtyping import Float, Int
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

from manyheads.errors import InputError, MismatchError, UnsupportedError
from manyheads.files import write_folder_atomically
from manyheads.inputs import check_integer, check_number, read_object, read_tensors
from manyheads.model.headmodel import HeadModel
from manyheads.model.hooks import frozen
from manyheads.model.inputs import takes
from manyheads.model.layout import find_layout
from manyheads.model.offloading import own_copy
from manyheads.model.opening import open_model
from manyheads.model.reading.attention import AttentionCall, Part, attending
from manyheads.model.weights.copies import rebuilt, settled
from manyheads.progress import Bar
from manyheads.provenance import Provenance
from manyheads.shrink.cache.attending import check_model
from manyheads.shrink.positions.rotation import Rope, rope_of
from manyheads.tasks.texts import passages
from manyheads.training import TrainSettings, epoch_rows, fit

LEARNING = TrainSettings(steps=400, rows=8, rate=1.2e-3, warmup=40, decay=0.9, floor=0.1, precision="fp32")
Change = Callable[[int, Part, Tensor], Tensor]  # layer, "key" or "value", what is there -> what is used


@dataclass(frozen=True)
class KVPrediction:
    """How a predictor learns: `KVPrediction(layers=0.5).learn(model)`.

    `layers` is the share of the base's layers that the auxiliary model has, where none is given. It learns from passages of
    `length` tokens of `texts` (None: prose that comes with Python), or from token ids `[N, T]`. `match` is lam (None: 1 / L).
    """

    layers: float = 0.5
    texts: Sequence[str] | Int[Tensor, "N T"] | None = None
    n: int = 512
    length: int = 128
    match: float | None = None
    settings: TrainSettings = LEARNING
    seed: int = 0

    def __post_init__(self) -> None:
        check_number(self.layers, "layers", 0.0, 1.0, above=True)
        check_integer(self.n, "n", 1)
        check_integer(self.length, "length", 2)
        if self.match is not None:
            check_number(self.match, "match", 0.0)

    def learn(
        self,
        model: HeadModel,
        auxiliary: HeadModel | None = None,
        *,
        folder: str | Path | None = None,
        bar: Bar = Bar(),
    ) -> KVPredictor:
        """A predictor for `model`, which stays as it is. `auxiliary` is a smaller model with the same tokens (it is copied); None
        takes layers of `model`. With a `folder` an interrupted call goes on.

        `UnsupportedError` for a model without plain rotary angles, or whose layers forget (sliding windows); `InputError` for an
        auxiliary model with other tokens.
        """
        helper = layer_pruned(model, self.layers) if auxiliary is None else auxiliary
        predictor = KVPredictor.new(model, _copied(helper))
        ids = self.texts
        if not isinstance(ids, Tensor):
            ids = passages(model, ids, n=self.n, length=self.length, seed=self.seed)
        match = 1 / model.n_layers if self.match is None else self.match
        settings = replace(self.settings, seed=self.seed)

        def batch(step: int) -> Tensor:
            return ids[epoch_rows(len(ids), settings.rows, step, settings.seed)]

        with frozen(model.plain):
            learning = _Learning(predictor, match)
            fit(learning, batch, settings, folder, device=model.device, bar=bar)
        predictor.eval()
        return predictor


def layer_pruned(model: HeadModel, share: float) -> HeadModel:
    """A copy with `share` of the layers, evenly spread, the first and the last among them."""
    check_number(share, "share", 0.0, 1.0, above=True)
    base = settled(model)
    count = max(1, round(share * base.n_layers))
    kept = [round(i * (base.n_layers - 1) / max(1, count - 1)) for i in range(count)]
    names = {id(part): name for name, part in base.plain.named_modules()}
    stems = [names[id(block.module)] for block in base.layout.blocks]
    config = copy.deepcopy(base.plain.config)
    config.num_hidden_layers = count
    for name, value in vars(config).items():
        if isinstance(value, list) and len(value) == base.n_layers:  # what is said layer by layer, such as layer_types
            setattr(config, name, [value[layer] for layer in kept])
    state = {key: t for key, t in base.plain.state_dict().items() if not any(key.startswith(f"{s}.") for s in stems)}
    for new, old in enumerate(kept):
        for key, tensor in base.plain.state_dict().items():
            if key.startswith(f"{stems[old]}."):
                state[stems[new] + key.removeprefix(stems[old])] = tensor
    module, missing = rebuilt(base.plain, config, state)
    if missing:
        raise UnsupportedError(
            f"{type(base.plain).__name__} with fewer layers lacks {missing[0]}; give an auxiliary model."
        )
    return HeadModel(module, model.tokenizer, find_layout(module))


def sources(n_base: int, n_auxiliary: int) -> list[int]:
    """j(i): for each layer of the base, the layer of the auxiliary model that serves it."""
    times, more = divmod(n_base, n_auxiliary)
    if times == 0:
        raise InputError(
            f"the auxiliary model has {n_auxiliary} layers, more than the {n_base} that are predicted; give a smaller one."
        )
    return [layer for layer in range(n_auxiliary) for _ in range(times + (layer < more))]


class KVPredictor(nn.Module):
    """An auxiliary model and the maps (formulas above). `cache` predicts, `generate` answers."""

    def __init__(self, base: HeadModel, auxiliary: HeadModel) -> None:
        super().__init__()
        self._base, self._auxiliary = (base,), (auxiliary,)  # in tuples: the base's parameters are not ours
        self.helper: Any = auxiliary.plain
        self.sources = sources(base.n_layers, auxiliary.n_layers)
        self._ropes: tuple[Rope, Rope] = (rope_of(base, "KV prediction"), rope_of(auxiliary, "KV prediction"))
        widths = [model.n_kv_heads * model.head_dim for model in (auxiliary, base)]
        self.maps = nn.ModuleDict(
            {part: nn.ModuleList(nn.Linear(widths[0], widths[1]) for _ in self.sources) for part in ("key", "value")}
        )
        self.to(base.device)
        for linear in (one for some in self.maps.values() for one in some):  # type: ignore[attr-defined]
            nn.init.zeros_(linear.bias)
            if widths[0] == widths[1]:
                nn.init.eye_(linear.weight)  # with the base itself as auxiliary model, its own cache

    @classmethod
    def new(cls, base: HeadModel, auxiliary: HeadModel) -> Self:
        """Maps that have learned nothing; the identity where both models keep as much a token."""
        for model in (base, auxiliary):
            check_model(model)
            kinds = {type(layer) for layer in DynamicCache(config=model.config).layers}
            if kinds - {DynamicLayer}:
                raise UnsupportedError(
                    f"layers of {type(model.plain).__name__} forget (a sliding window, say); a whole cache is predicted here."
                )
        if base.vocab_size != auxiliary.vocab_size:
            raise InputError(
                f"the auxiliary model knows {auxiliary.vocab_size} tokens and the base {base.vocab_size}; they must be the same."
            )
        return cls(base, auxiliary)

    @property
    def base(self) -> HeadModel:
        return self._base[0]

    @property
    def auxiliary(self) -> HeadModel:
        return self._auxiliary[0]

    def predicted(
        self, ids: Int[Tensor, "B T"], mask: Int[Tensor, "B T"] | None = None, *, last: bool = False
    ) -> tuple[list[dict[Part, Float[Tensor, "B G T Dh"]]], Float[Tensor, "B S V"]]:
        """Keys (rotated) and values for each layer of the base, and the helper's logits (with `last`, of the last token)."""
        seen: dict[tuple[int, Part], Tensor] = {}

        def keep(layer: int, part: Part, tensor: Tensor) -> Tensor:
            seen[layer, part] = tensor
            return tensor

        positions = _positions(ids, mask)
        logits = _run(self.auxiliary, ids, mask, positions, keep, last=last)
        rows: list[dict[Part, Tensor]] = []
        for at, layer in enumerate(self.sources):
            key = self._ropes[1].rotate(seen[layer, "key"], -positions[:, None])
            key = key / self._ropes[1].module.attention_scaling ** 2  # turned back, and scaled twice
            made = {"key": self._mapped("key", at, key), "value": self._mapped("value", at, seen[layer, "value"])}
            made["key"] = self._ropes[0].rotate(made["key"], positions[:, None])
            rows.append(made)  # type: ignore[arg-type]
        return rows, logits

    def _mapped(self, part: Part, layer: int, x: Float[Tensor, "B A T Da"]) -> Float[Tensor, "B G T Dh"]:
        linear: Any = self.maps[part][layer]  # type: ignore[index]
        flat = linear(x.transpose(1, 2).flatten(2).to(linear.weight.dtype))
        return flat.unflatten(-1, (self.base.n_kv_heads, -1)).transpose(1, 2)

    @torch.no_grad()
    def cache(self, ids: Int[Tensor, "B T"], mask: Int[Tensor, "B T"] | None = None) -> DynamicCache:
        """The base's cache after a prompt that the base has not read."""
        cache = DynamicCache(config=self.base.config)
        for layer, made in enumerate(self.predicted(ids, mask, last=True)[0]):
            cache.update(made["key"].to(self.base.plain.dtype), made["value"].to(self.base.plain.dtype), layer)
        return cache

    def generate(self, inputs: Any, **kwargs: Any) -> Any:
        """`HeadModel.generate` of the base, its prompt read by the auxiliary model but for the last token."""
        batch = self.base.inputs(inputs)
        ids, mask = batch["input_ids"], batch.get("attention_mask")
        if ids.shape[1] > 1:
            kwargs["past_key_values"] = self.cache(ids[:, :-1], None if mask is None else mask[:, :-1])
        return self.base.generate(inputs, **kwargs)

    def save(self, folder: str | Path, *, force: bool = False) -> Path:
        """Write the auxiliary model (an ordinary checkpoint), the maps and a card."""
        about = Provenance.of(self.base, "KV prediction", "arXiv:2410.08391").to_json()

        def write(into: Path) -> None:
            self.auxiliary.save_pretrained(into / "auxiliary")
            save_file({name: t.contiguous() for name, t in self.maps.state_dict().items()}, into / "maps.safetensors")
            (into / "card.json").write_text(json.dumps(about, indent=1), "utf-8")

        return write_folder_atomically(folder, write, force=force)

    @classmethod
    def load(cls, folder: str | Path, base: HeadModel) -> Self:
        """What `save` wrote, for the same base. `MismatchError` for another, `InputError` for a folder that holds none."""
        folder = Path(folder)
        if not (folder / "maps.safetensors").is_file():
            raise InputError(f"{folder} holds no KV predictor: there is no maps.safetensors in it.")
        found = read_object(folder / "card.json").get("fingerprint")
        if found != base.fingerprint:
            raise MismatchError(f"{folder} predicts the cache of model {found}, not of this one, {base.fingerprint}.")
        predictor = cls.new(base, open_model(folder / "auxiliary", dtype="auto"))
        try:
            predictor.maps.load_state_dict(read_tensors(folder / "maps.safetensors"))
        except (RuntimeError, ValueError) as error:
            raise InputError(
                f"the maps in {folder} do not fit its models: {' '.join(str(error).split())[:120]}."
            ) from None
        return predictor.eval()


class _Learning(nn.Module):
    """The loss of a batch of ids (formula above)."""

    def __init__(self, predictor: KVPredictor, match: float) -> None:
        super().__init__()
        self.predictor, self.match = predictor, match

    def forward(self, ids: Int[Tensor, "B T"]) -> Float[Tensor, ""]:
        base = self.predictor.base
        true: dict[tuple[int, Part], Tensor] = {}

        def keep(layer: int, part: Part, tensor: Tensor) -> Tensor:
            true[layer, part] = tensor
            return tensor

        positions = _positions(ids, None)
        with torch.no_grad():
            _run(base, ids, None, positions, keep)
        predicted, logits = self.predictor.predicted(ids)
        read = _run(base, ids, None, positions, lambda layer, part, tensor: predicted[layer][part])
        apart = sum(
            (made[part] - true[layer, part]).abs().mean() for layer, made in enumerate(predicted) for part in made
        )
        return _next(read, ids) + _next(logits, ids) + self.match * apart


def _next(logits: Float[Tensor, "B T V"], ids: Int[Tensor, "B T"]) -> Float[Tensor, ""]:
    return F.cross_entropy(logits[:, :-1].flatten(0, 1).float(), ids[:, 1:].flatten())


def _copied(model: HeadModel) -> HeadModel:
    module = own_copy(model.plain).requires_grad_(True)
    return HeadModel(module, model.tokenizer, find_layout(module))


def _positions(ids: Int[Tensor, "B T"], mask: Int[Tensor, "B T"] | None) -> Int[Tensor, "B T"]:
    """Where each token stands; padding, which nobody sees, at 0."""
    if mask is None:
        return torch.arange(ids.shape[1], device=ids.device).expand_as(ids)
    return (mask.cumsum(1) - 1).clamp(min=0)


def _run(
    model: HeadModel, ids: Tensor, mask: Tensor | None, positions: Tensor, change: Change, last: bool = False
) -> Float[Tensor, "B S V"]:
    """Logits of a pass without a cache, its keys (rotated) and values handed to `change`."""
    plain: Any = model.plain
    given: dict[str, Any] = {} if mask is None else {"attention_mask": mask}
    if last and takes(plain, "logits_to_keep"):  # those of all tokens may cost as much as some layers
        given["logits_to_keep"] = 1
    with _changing(model, change):
        logits: Tensor = plain(input_ids=ids, position_ids=positions, use_cache=False, **given).logits
    return logits


@contextmanager
def _changing(model: HeadModel, change: Change) -> Iterator[None]:
    blocks = model.layout.blocks
    cores = {layer: blocks[layer].core for layer in model.layout.attention_layers}
    with attending(cores, {layer: _Changer(model.n_heads, layer, change) for layer in cores}, True):
        yield


class _Changer:
    """Hands a layer's keys and values to `change`, and attends to what it gives back."""

    by_query_head = False
    offset = 0

    def __init__(self, n_heads: int, layer: int, change: Change) -> None:
        self.n_heads, self.layer, self._change = n_heads, layer, change

    def change(self, part: Part, tensor: Tensor) -> Tensor:
        return tensor if part == "query" else self._change(self.layer, part, tensor)

    def touches(self, part: Part) -> bool:
        return part != "query"

    def block(self, shape: tuple[int, int, int, int], device: torch.device) -> Tensor | None:
        return None

    def attend(self, call: AttentionCall) -> Tensor:
        return call.z
