"""A press written for kvpress, on a cache that really gets smaller.

kvpress (NVIDIA, PyPI `kvpress`) has some forty methods. Those that give every token of every head a score (`ScorerPress`) run
here as they are, and `AdaKVPress` around them becomes our `AdaKV`: what kvpress masks, where heads have unequal budgets, is gone
here.

    with from_kvpress(kvpress.ExpectedAttentionPress(compression_ratio=0.5))(model) as block: ...
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar
from weakref import WeakKeyDictionary

from jaxtyping import Float
from torch import Tensor, nn

from manyheads.errors import InputError, UnsupportedError
from manyheads.model.headmodel import HeadModel
from manyheads.shrink.cache.press import CacheCall, Press, ScorePress
from manyheads.shrink.cache.ragged import RaggedLayer, Window
from manyheads.shrink.cache.snapkv import AdaKV

_ROTARY: WeakKeyDictionary[nn.Module, Any] = WeakKeyDictionary()


def from_kvpress(press: Any) -> Press:
    """Our press that keeps what `press` scores highest. `UnsupportedError` for one that does more than score tokens."""
    kinds = {kind.__name__ for kind in type(press).__mro__}
    if "AdaKVPress" in kinds:
        inner = from_kvpress(press.press)
        assert isinstance(inner, Scored)
        return AdaKV(inner, press.alpha_safeguard)
    if "ScorerPress" not in kinds or "ObservedAttentionPress" in kinds or _compresses_by_itself(press):
        raise UnsupportedError(
            f"{type(press).__name__} does more than score the tokens of each head by keys, values and hidden states; give a "
            "ScorerPress of kvpress, alone or in an AdaKVPress."
        )
    return Scored(compression_ratio=press.compression_ratio, press=press)


def _compresses_by_itself(press: Any) -> bool:
    """Whether a press drops tokens in its own way, so that its scores alone are not the method."""
    owner = next(kind for kind in type(press).__mro__ if "compress" in vars(kind))
    return owner.__name__ != "ScorerPress"


@dataclass(frozen=True)
class Scored(ScorePress):
    """Keeps what a press of kvpress scores highest, of the first pass of a generation alone; what comes later stays.

    The prompt comes whole and without padding, as kvpress wants it.
    """

    needs_hidden: ClassVar[bool] = True
    press: Any = None

    def windows(self, model: HeadModel) -> list[list[Window | None]]:
        """Tell the press of its model, as kvpress does when its block begins."""
        if hasattr(self.press, "post_init_from_model"):
            self.press.post_init_from_model(model.plain)
        for layer in model.layout.attention_layers:
            _ROTARY[model.layout.blocks[layer].core] = getattr(model.plain.get_decoder(), "rotary_emb", None)
        return super().windows(model)

    def due(self, layer: RaggedLayer, new: int) -> bool:
        return layer.seen == new

    def score(self, call: CacheCall) -> Float[Tensor, "B G S"]:
        """`press.score` of kvpress. `InputError` for padded rows."""
        if call.hidden is None or call.hidden.shape[1] != call.keys.shape[2] or not bool(call.held.all()):
            raise InputError("kvpress scores whole prompts of one length; give rows without padding.")
        own = vars(call.core)
        added = not hasattr(call.core, "rotary_emb")
        if (
            added
        ):  # kvpress puts it there for its methods; beside the registered modules, so that the model stays the same
            own["rotary_emb"] = _ROTARY.get(call.core)
        try:
            found: Tensor = self.press.score(call.core, call.hidden, call.keys, call.values, None, call.given)
        finally:
            if added:
                del own["rotary_emb"]
        return found.float()
