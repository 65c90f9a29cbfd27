"""`MultiHead`: several heads on one trunk, trained together, saved as one folder, and taken off again.

    heads = MultiHead(Trunk(model, frozen=False), {
        "topic": Attached(LinearHead(LinearSettings(width, 4)), layer=6, pool="last"),
        "length": Attached(ScalarHead(LinearSettings(width, 1)), weight=0.1, gradient="stops", stays=False),
    })
    heads.fit(batches, settings)                     # batches(i) has "topic" and "length" beside what the trunk takes
    heads(batch)["topic"]
    heads.save("folder")

With the states s_h that head h reads, its loss L_h and its weight w_h(t) at a share t of the run, what is minimised is
sum_h w_h(t) L_h(head_h(s_h), target_h), or what a `Balance` makes of these. A head's gradient reaches the trunk ("flows"), does
not ("stops"), or reaches it with the other sign ("reversed": Ganin et al., arXiv:1505.07818); with `tunes_from` it does so only
from that share of the run on (first a probe, then tuning).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

from torch import nn

from manyheads.errors import InputError
from manyheads.inputs import clause
from manyheads.learning.attached import Attached, AttachedHeads
from manyheads.learning.balance import Balance, Equal
from manyheads.learning.head import Head
from manyheads.learning.objective import HeadsRun, train_heads
from manyheads.learning.saved import CARD, Card, fill, load, save
from manyheads.learning.trunk import Trunk
from manyheads.model.headmodel import HeadModel
from manyheads.progress import Bar
from manyheads.training import TrainSettings

TRUNK = "trunk"  # the folder in which a tuned trunk is saved


class MultiHead(AttachedHeads):
    """Heads on a trunk (see above) that train together and are saved together."""

    def fit(
        self,
        batches: Callable[[int], Mapping[str, Any]],
        settings: TrainSettings,
        folder: str | Path | None = None,
        *,
        balance: Balance | None = None,
        judge: Callable[[], float] | None = None,
        log_every: int | None = None,
        bar: Bar = Bar(),
    ) -> HeadsRun:
        """Train in place (`training.fit`) and return how it went: each head's loss, and its gradient's conflicts with others'.

        `batches(i)` is a pure function of the batch number. Every `log_every` steps the heads' gradients at the trunk are
        compared, which costs one backward pass a head; by default about 50 times, or every 100 steps where a clock ends the run.
        `judge` is as in `fit`. `InputError` names the head that cannot be trained on the first batch, before anything is.
        """
        self.check(batches(0))
        return train_heads(
            self, batches, settings, folder, balance=balance or Equal(), judge=judge, every=log_every, bar=bar
        )

    def save(self, folder: str | Path, *, force: bool = False) -> Path:
        """Write the heads into a new folder, and the trunk unless it is frozen: as a checkpoint, where Transformers has it."""
        about = {name: _described(one) for name, one in self.attached.items()}
        tuned = not self.trunk.frozen
        card = Card(
            "multihead", fingerprint=self.trunk.fingerprint, kind="multihead", about={"heads": about, "tuned": tuned}
        )

        def trunk(into: Path) -> None:
            if tuned:
                self.trunk.save(into / TRUNK)

        return save(folder, card, self.heads, also=trunk, force=force)

    @classmethod
    def load(
        cls, folder: str | Path, trunk: Trunk | HeadModel | nn.Module | None = None, *, force: bool = False
    ) -> MultiHead:
        """Heads as they were saved. A trunk that was saved with them need not be given if it is a model of Transformers.

        `InputError` for another folder, `MismatchError` for a trunk that the heads were not trained on, unless `force`.
        """
        card, tensors = load(folder, "multihead", "set of heads")
        tuned = bool(card.about.get("tuned"))
        given = _trunk(Path(folder) / TRUNK, trunk, tuned)
        if not force:
            given.refuse_other(card.fingerprint, f"heads in {folder}")
        try:
            heads = {name: _attached(one) for name, one in card.about["heads"].items()}
        except (KeyError, TypeError, AttributeError) as error:
            raise InputError(f"{Path(folder) / CARD} is damaged ({clause(error)}).") from None
        out = cls(given, heads)
        fill(out.heads, tensors, folder)
        return out.eval()


def _described(one: Attached) -> dict[str, Any]:
    kept = {f.name: getattr(one, f.name) for f in fields(one) if f.name not in ("head", "weight")}
    weight = (
        "a schedule" if callable(one.weight) else one.weight
    )  # it says how the head was trained; reading needs none
    return kept | {"kind": type(one.head).__name__, "settings": one.head.described(), "weight": weight}


def _attached(card: Mapping[str, Any]) -> Attached:
    card = dict(card)
    head = Head.rebuilt(card.pop("kind"), card.pop("settings"))
    weight, target = card.pop("weight"), card.pop("target")
    target = tuple(target) if isinstance(target, list) else target
    return Attached(head, target=target, weight=weight if isinstance(weight, int | float) else 1.0, **card)


def _trunk(folder: Path, given: Trunk | HeadModel | nn.Module | None, tuned: bool) -> Trunk:
    if tuned:
        return Trunk.restored(folder, given)
    if given is None:
        raise InputError(
            f"the trunk of the heads in {folder.parent} was not saved; give the model they were trained on."
        )
    return given if isinstance(given, Trunk) else Trunk(given)
