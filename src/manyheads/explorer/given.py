"""What the command line gives the explorer beside the model: files, each checked against the model before anything is served."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from manyheads.atlas.core.result import Atlas
from manyheads.atlas.retrieval_heads.documents import documents
from manyheads.draft.core.trunk import DraftTrunk
from manyheads.draft.files.saving import load_drafter
from manyheads.errors import InputError, MismatchError
from manyheads.explorer.labels import LabelFile
from manyheads.explorer.on_heads import TEXTS
from manyheads.explorer.overview import overview
from manyheads.explorer.workbench import Workbench
from manyheads.model.editing.head_edit import HeadEdit
from manyheads.model.headmodel import HeadModel
from manyheads.trace.sae.files import load_sae


@dataclass(frozen=True)
class Given:
    """Folders and files of what was trained or measured before (see the options of `manyheads explore`)."""

    atlases: Sequence[Atlas] = ()
    history: Path | None = None
    labels: Path | None = None
    drafter: Path | None = None
    edits: Sequence[Path] = ()
    saes: Sequence[Path] = ()
    texts: Path | None = None

    def bench(self, model: HeadModel, name: str) -> Workbench:
        """The workbench with all of it. `MismatchError` for what belongs to another model."""
        for atlas in self.atlases[:1]:
            made_of = atlas.card.get("fingerprint")
            if made_of not in (None, model.fingerprint):
                raise MismatchError(f"the atlas is of the model {made_of}, not of this one, {model.fingerprint}.")
        bench = Workbench(model, name)
        if self.drafter is not None:
            bench.drafter = load_drafter(self.drafter, DraftTrunk(model)).drafter
            bench.drafted_by = self.drafter.name
        for folder in self.edits:
            edit = HeadEdit.load(folder)
            edit.check(model)
            bench.edits[folder.name] = edit
        for folder in self.saes:
            sae = load_sae(folder)
            sae.check(model)
            if sae.layer in bench.saes:
                raise InputError(f"{folder} is a second autoencoder of layer {sae.layer}; give one a layer.")
            bench.saes[sae.layer] = sae
        if self.texts is not None:
            bench.texts = [one.text for one in islice(documents([self.texts]), TEXTS)]
            if not bench.texts:
                raise InputError(f"{self.texts} holds no document.")
        return bench

    def overview(self, bench: Workbench, labels: LabelFile, **more: Any) -> dict[str, Any]:
        """What the page has at once."""
        return overview(
            bench.about,
            atlases=self.atlases,
            history=self.history,
            labels=labels.json()["labels"],
            label_file=self.labels,
            **more,
        )
