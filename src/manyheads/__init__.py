"""manyheads: the workbench for the attention heads of Transformers models.

import manyheads as mh

model = mh.open_model()  # the bundled model; or a hub id, a folder, a loaded model
heads = mh.atlas.induction(model).above(0.4)  # L3H4, L3H6, L3H7
prompt = "red cat seven lamp Paris red cat seven lamp"
model.generate(prompt, max_new_tokens=2)  # " Paris red"
with model.editing(mh.Ablate(heads)):  # undone at the end of the block
    model.generate(prompt, max_new_tokens=2)  # " red night"
mh.explain(model, prompt).to_frame()  # which heads and MLPs made the answer
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from manyheads import moved
from manyheads.model.weights import registering
from manyheads.version import __version__ as __version__

moved.install()
registering.install()

# Imported on first use, so that `import manyheads` and the command line start without PyTorch.
_WHERE = {
    "Head": "heads",
    "HeadSet": "heads",
    "HeadScores": "heads",
    "HeadModel": "model.headmodel",
    "MultiHead": "learning.multihead",
    "open_model": "model.opening",
    "Ablate": "model.editing.edits",
    "Edit": "model.editing.edits",
    "Mask": "model.editing.edits",
    "Offset": "model.editing.edits",
    "Patch": "model.editing.edits",
    "Rows": "model.editing.rows",
    "Scale": "model.editing.edits",
    "Reader": "model.reading.readers",
    "logit_attribution": "model.reading.attribution",
    "attribute": "model.reading.attribution",
    "source_attribution": "model.reading.attribution",
    "activation_patching": "model.replay.patching",
    "edge_attribution": "model.replay.edges",
    "edge_patching": "model.replay.edges",
    "path_patching": "model.replay.patching",
    "Atlas": "atlas",
    "Circuit": "trace.circuits.circuit",
    "HeadEdit": "model.editing.head_edit",
    "explain": "trace.explanation",
    "show": "explorer.showing",
    "ManyheadsError": "errors",
}
_ROOMS = (
    "atlas",
    "audio",
    "brain",
    "catalogue",
    "control",
    "data",
    "draft",
    "edit",
    "evaluation",
    "forecast",
    "judge",
    "lab",
    "learning",
    "model",
    "predict",
    "report",
    "shrink",
    "tasks",
    "trace",
    "training",
    "vision",
)

if TYPE_CHECKING:
    from manyheads import (
        atlas,
        audio,
        brain,
        catalogue,
        control,
        data,
        draft,
        edit,
        evaluation,
        forecast,
        judge,
        lab,
        learning,
        model,
        predict,
        report,
        shrink,
        tasks,
        trace,
        training,
        vision,
    )
    from manyheads.atlas import Atlas
    from manyheads.errors import ManyheadsError
    from manyheads.explorer.showing import show
    from manyheads.heads import Head, HeadScores, HeadSet
    from manyheads.learning.multihead import MultiHead
    from manyheads.model.editing.edits import Ablate, Edit, Mask, Offset, Patch, Scale
    from manyheads.model.editing.head_edit import HeadEdit
    from manyheads.model.editing.rows import Rows
    from manyheads.model.headmodel import HeadModel
    from manyheads.model.opening import open_model
    from manyheads.model.reading.attribution import attribute, logit_attribution, source_attribution
    from manyheads.model.reading.readers import Reader
    from manyheads.model.replay.edges import edge_attribution, edge_patching
    from manyheads.model.replay.patching import activation_patching, path_patching
    from manyheads.trace.circuits.circuit import Circuit
    from manyheads.trace.explanation import explain

__all__ = [
    "Ablate",
    "Atlas",
    "Circuit",
    "Edit",
    "Head",
    "HeadEdit",
    "HeadModel",
    "HeadScores",
    "HeadSet",
    "ManyheadsError",
    "Mask",
    "MultiHead",
    "Offset",
    "Patch",
    "Reader",
    "Rows",
    "Scale",
    "activation_patching",
    "atlas",
    "attribute",
    "audio",
    "brain",
    "catalogue",
    "control",
    "data",
    "draft",
    "edge_attribution",
    "edge_patching",
    "edit",
    "evaluation",
    "explain",
    "forecast",
    "judge",
    "lab",
    "learning",
    "logit_attribution",
    "model",
    "open_model",
    "path_patching",
    "predict",
    "report",
    "show",
    "shrink",
    "source_attribution",
    "tasks",
    "trace",
    "training",
    "vision",
]


def __getattr__(name: str) -> Any:
    if name in _ROOMS:
        return import_module(f"manyheads.{name}")
    if name in _WHERE:
        return getattr(import_module(f"manyheads.{_WHERE[name]}"), name)
    raise AttributeError(f"module 'manyheads' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*_WHERE, *_ROOMS, "__version__"])
