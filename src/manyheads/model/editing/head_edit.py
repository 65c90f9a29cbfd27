"""A head edit is a file: what it does to which heads, how it was found, and what was measured of it.

For each of its heads an edit is affine in z, the head's output before the output projection,

    z_h  ->  (1 + s (scale_h - 1)) z_h + s shift_h                 s: its strength; 0 changes nothing, 1 is as found

which holds what publications do to heads: scaling their values (arXiv:2310.15910), pruning them (arXiv:2402.18154), ablating them
to a mean, adding offset vectors (arXiv:2406.01563), mixing in task vectors (arXiv:2507.20906). Such maps compose to one of
their kind, and fold into the output projection. An edit acts on every token, or (`at="prompt"`) on the prompt's last token only,
which weights cannot express, so that such an edit cannot be baked.

Saved, it is a folder of `edit.json` and `edit.safetensors`, a few KB.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from jaxtyping import Float
from safetensors.torch import load_file, save_file
from torch import Tensor

from manyheads.errors import InputError, MismatchError, UnsupportedError
from manyheads.files import write_folder_atomically
from manyheads.heads import Head, HeadSet
from manyheads.model.editing.edits import Affine, Edit, compose_affine
from manyheads.model.headmodel import HeadModel
from manyheads.model.weights.copies import dtype_of_fingerprint
from manyheads.version import __version__

At = Literal["all", "prompt"]
FORMAT = 1


@dataclass(frozen=True, eq=False)
class HeadEdit:
    """An edit of `heads`, in their order: `scale` `[n]`, `shift` `[n, Dh]` (formula above).

    `method` names what made it, with `settings`; `found` is how its heads were found, `effect` what was measured (any JSON).
    `fingerprint` is that of its model, whose shape the heads know. `parts` are the edits it was composed of, in order.
    """

    heads: HeadSet
    scale: Float[Tensor, "n"]
    shift: Float[Tensor, "n Dh"]
    fingerprint: str
    method: str = ""
    found: str = ""
    strength: float = 1.0
    at: At = "all"
    settings: dict[str, Any] = field(default_factory=dict)
    effect: dict[str, Any] = field(default_factory=dict)
    parts: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        n = len(self.heads)
        if self.at not in get_args(At):
            raise InputError(f'at is {self.at!r}; an edit acts on "all" tokens or on the last of the "prompt".')
        if not n or self.heads.shape is None:
            raise InputError("a head edit needs at least one head, of a model of known shape (HeadModel.head_set).")
        if list(self.scale.shape) != [n] or self.shift.ndim != 2 or len(self.shift) != n:
            raise InputError(
                f"an edit of {n} heads has scale [{n}] and shift [{n}, Dh], not {list(self.scale.shape)} and "
                f"{list(self.shift.shape)}."
            )
        if not bool(self.scale.isfinite().all() and self.shift.isfinite().all()):
            raise InputError("scale and shift must be finite numbers.")

    @classmethod
    def of(
        cls,
        model: HeadModel,
        edits: Edit | Sequence[Edit],
        *,
        method: str,
        found: str = "",
        at: At = "all",
        settings: Mapping[str, Any] | None = None,
        effect: Mapping[str, Any] | None = None,
    ) -> HeadEdit:
        """From edits of the model room that are affine in z (Scale, Affine, Offset, Ablate to zero or to a fixed mean), in order.

        `UnsupportedError` for others.
        """
        edits = [edits] if isinstance(edits, Edit) else list(edits)
        for edit in edits:
            edit.check(*model.shape)
        heads = model.head_set({head for edit in edits for head in edit.head_set})
        layers = [compose_affine(edits, layer, model.n_heads, model.head_dim) for layer in range(model.n_layers)]
        return cls(
            heads=heads,
            scale=torch.stack([layers[h.layer][0][h.index] for h in heads]) if heads else torch.zeros(0),
            shift=torch.stack([layers[h.layer][1][h.index] for h in heads]) if heads else torch.zeros(0, 0),
            fingerprint=model.fingerprint,
            method=method,
            found=found,
            at=at,
            settings=dict(settings or {}),
            effect=dict(effect or {}),
        )

    # Using it

    def check(self, model: HeadModel, *, force: bool = False) -> None:
        """`MismatchError` if the edit was made for another model: other weights (unless `force`), or another shape (always).

        The same weights opened in another type, such as float32 for bfloat16, are the same model.
        """
        shape, width = self.heads.shape, self.shift.shape[1]
        if shape != model.shape or width != model.head_dim:
            raise MismatchError(
                f"this edit is for a model of {_size(shape, width)}; this one has {_size(model.shape, model.head_dim)}."
            )
        if force or self.fingerprint == model.fingerprint:
            return
        if dtype_of_fingerprint(model, self.fingerprint) is None:
            raise MismatchError(
                f"this edit was made for model {self.fingerprint}, not for this one, {model.fingerprint}; "
                "pass force (--force) to apply it all the same."
            )

    def edits(self, *, prompt_length: int | None = None) -> list[Edit]:
        """The edit for `HeadModel.editing`. One at the prompt's last token needs the prompt's length in token columns."""
        if self.at == "prompt" and prompt_length is None:
            raise InputError("this edit acts on the prompt's last token; give prompt_length=, in token columns.")
        positions = None if self.at == "all" or prompt_length is None else prompt_length - 1
        scales = 1 + self.strength * (self.scale - 1)
        return [Affine(self.heads, scales=scales, shifts=self.strength * self.shift, positions=positions)]

    def bake(self, model: HeadModel, *, force: bool = False) -> HeadModel:
        """A copy of `model` with the edit in its weights. `UnsupportedError` for one at the prompt's last token."""
        self.check(model, force=force)
        if self.at != "all":
            raise UnsupportedError(
                "this edit acts on the prompt's last token only; weights act on all, so it cannot be baked."
            )
        return model.bake(*self.edits())

    def at_strength(self, strength: float) -> HeadEdit:
        """The same edit, weaker, stronger or reversed. What was measured of it no longer holds, and is left out."""
        return replace(self, strength=float(strength), effect={})

    def then(self, other: HeadEdit) -> HeadEdit:
        """This edit first, `other` on what it left: one edit. Where they share a head the order matters.

        `MismatchError` for edits of two models; `UnsupportedError` if they act on different tokens.
        """
        if (self.fingerprint, self.heads.shape) != (other.fingerprint, other.heads.shape):
            raise MismatchError(f"edits of two models do not compose: {self.fingerprint} and {other.fingerprint}.")
        if self.at != other.at:
            raise UnsupportedError(
                "an edit of all tokens and one of the prompt's last do not make one edit; apply both."
            )
        assert self.heads.shape is not None
        heads = self.heads | other.heads
        both = [*self.edits(prompt_length=1), *other.edits(prompt_length=1)]
        everywhere = [replace(edit, positions=None) for edit in both]
        n_layers, n_heads = self.heads.shape
        layers = [compose_affine(everywhere, layer, n_heads, self.shift.shape[1]) for layer in range(n_layers)]
        return HeadEdit(
            heads=heads,
            scale=torch.stack([layers[h.layer][0][h.index] for h in heads]),
            shift=torch.stack([layers[h.layer][1][h.index] for h in heads]),
            fingerprint=self.fingerprint,
            method="composed",
            found="",
            at=self.at,
            parts=(*(self.parts or (str(self),)), *(other.parts or (str(other),))),
        )

    def __str__(self) -> str:
        strength = "" if self.strength == 1 else f" at strength {self.strength:g}"
        return f"{self.method or 'edit'} of {self.heads}{strength}"

    # Files

    def save(self, folder: str | Path, *, force: bool = False) -> Path:
        """Write the edit's folder, all or nothing. `InputError` if it exists and `force` is not set."""
        about = {
            "format": FORMAT,
            "heads": [str(head) for head in self.heads],
            "shape": self.heads.shape,
            **{name: getattr(self, name) for name in _PLAIN},
            "version": __version__,
        }

        def write(into: Path) -> None:
            (into / "edit.json").write_text(json.dumps(about, indent=1, ensure_ascii=False) + "\n", "utf-8")
            tensors = {"scale": self.scale, "shift": self.shift}
            save_file({k: v.detach().float().contiguous().cpu() for k, v in tensors.items()}, into / "edit.safetensors")

        return write_folder_atomically(folder, write, force=force)

    @classmethod
    def load(cls, folder: str | Path) -> HeadEdit:
        """Read what `save` wrote. `InputError` if there is no edit."""
        folder = Path(folder)
        if not (folder / "edit.json").is_file():
            raise InputError(f"no edit at {folder}: there is no edit.json in it.")
        try:
            about = json.loads((folder / "edit.json").read_text("utf-8"))
            tensors = load_file(folder / "edit.safetensors")
            if about["format"] != FORMAT:
                raise ValueError(f"format {about['format']}")
            plain = {name: about[name] for name in _PLAIN} | {"parts": tuple(about["parts"])}
            heads = HeadSet([Head.parse(name) for name in about["heads"]], tuple(about["shape"]))
            return cls(heads, tensors["scale"], tensors["shift"], **plain)
        except (ValueError, KeyError, TypeError, OSError) as error:
            raise InputError(f"{folder} is not an edit ({error}); give a folder that HeadEdit.save wrote.") from None


_PLAIN = ("fingerprint", "method", "found", "strength", "at", "settings", "effect", "parts")


def compose(edits: Iterable[HeadEdit]) -> HeadEdit:
    """All of `edits`, the first first, as one."""
    result: HeadEdit | None = None
    for edit in edits:
        result = edit if result is None else result.then(edit)
    if result is None:
        raise InputError("no edits to compose; give at least one.")
    return result


def _size(shape: tuple[int, int] | None, width: int) -> str:
    n_layers, n_heads = shape or (0, 0)
    return f"{n_layers} layers of {n_heads} heads of width {width}"
