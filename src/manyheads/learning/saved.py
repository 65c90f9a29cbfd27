"""What was learned beside a trunk, as a folder: `head.json` has what it is and whose, `head.safetensors` its tensors.

A card has the kind, the settings to build it again, the method, the seed, the version, the fingerprint of the trunk and the
number of this format; `about` is any JSON besides. Nothing is pickled, and a folder is there whole or not at all.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import Tensor, nn

from manyheads.errors import InputError, MismatchError
from manyheads.files import write_folder_atomically
from manyheads.inputs import clause, read_object, read_tensors
from manyheads.provenance import Provenance

FORMAT = 1
CARD, WEIGHTS = "head.json", "head.safetensors"
MOST = 1 << 20  # bytes of a card; a longer file is not one


@dataclass(frozen=True)
class Card(Provenance):
    """The card of a saved thing: its provenance, its kind, and any JSON besides. `settings` build it again."""

    fingerprint: str = ""
    kind: str = ""
    about: dict[str, Any] = field(default_factory=dict)
    format: int = FORMAT


def save(
    folder: str | Path,
    card: Card,
    weights: nn.Module | Mapping[str, Tensor],
    *,
    also: Callable[[Path], object] | None = None,
    force: bool = False,
) -> Path:
    """Write `card` and the weights into a new folder (over an older one only with `force`); `also(folder)` adds other files."""
    state = weights.state_dict() if isinstance(weights, nn.Module) else weights
    tensors = {name: value.detach().cpu().contiguous() for name, value in state.items()}
    text = json.dumps(asdict(card), indent=1, ensure_ascii=False) + "\n"
    if len(text.encode()) > MOST:
        raise InputError(f"a card of {len(text)} characters is no card; put large things among the tensors.")

    def write(into: Path) -> None:
        save_file(tensors, into / WEIGHTS)
        (into / CARD).write_text(text, "utf-8")
        if also is not None:
            also(into)

    return write_folder_atomically(folder, write, force=force)


def load(
    folder: str | Path,
    kinds: str | Collection[str],
    what: str,
    *,
    fingerprint: str | None = None,
    force: bool = False,
) -> tuple[Card, dict[str, Tensor]]:
    """The card and the tensors of a folder that `save` wrote, if they are one of `kinds`; `what` names them in errors.

    `InputError` where there is nothing, something damaged or another kind, `MismatchError` where it was learned beside a trunk
    with another fingerprint, unless `force`.
    """
    folder = Path(folder)
    try:
        card = _card(folder / CARD, {kinds} if isinstance(kinds, str) else kinds)
        tensors = read_tensors(folder / WEIGHTS)
        for name, tensor in tensors.items():
            if tensor.is_floating_point() and not bool(tensor.float().isfinite().all()):
                raise ValueError(f"{name} holds NaN or infinity")
    except (ValueError, KeyError, TypeError) as error:
        raise InputError(f"{folder} holds no {what} ({clause(error)}); give a folder that one was saved in.") from None
    if fingerprint is not None and card.fingerprint != fingerprint and not force:
        raise MismatchError(
            f"the {what} in {folder} was learned beside model {card.fingerprint}, not {fingerprint}; give that model or force "
            "it."
        )
    return card, tensors


def fill(module: nn.Module, tensors: Mapping[str, Tensor], where: str | Path) -> None:
    """Put loaded tensors into a module of the same shapes. `MismatchError` if they do not fit, forced or not."""
    try:
        module.load_state_dict(dict(tensors))
    except RuntimeError as error:
        reason = str(error).splitlines()[-1].strip()
        raise MismatchError(f"what {where} holds does not fit this model: {reason}") from None


def _card(path: Path, kinds: Collection[str]) -> Card:
    read = read_object(path, most=MOST)
    if read.get("format") != FORMAT:
        raise ValueError(f"{path.name} is no card of format {FORMAT}")
    card = Card(**{one.name: read[one.name] for one in fields(Card)})
    if card.kind not in kinds:
        raise ValueError(f"it holds a {card.kind}")
    if not isinstance(card.settings, dict) or not isinstance(card.about, dict) or not isinstance(card.fingerprint, str):
        raise ValueError(f"{path.name} is damaged")
    return card
