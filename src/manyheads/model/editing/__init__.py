"""What changes a pass: edits of heads and rows, and edits as files."""

from manyheads.model.editing.edits import Ablate, Affine, Edit, Mask, Offset, Patch, Scale, Swap
from manyheads.model.editing.rows import Rows

__all__ = ["Ablate", "Affine", "Edit", "Mask", "Offset", "Patch", "Rows", "Scale", "Swap"]
