"""Make it behave otherwise: edits of heads that can be saved, shared, composed, undone and baked."""

from manyheads.edit.checkpoint import save_baked, undo
from manyheads.edit.examples import Answered
from manyheads.edit.guard import guard
from manyheads.edit.head_edit import HeadEdit, compose
from manyheads.edit.lofit import lofit, select_heads
from manyheads.edit.selective_tuning import tune_heads
from manyheads.edit.side_effects import SideEffects, side_effects
from manyheads.edit.soft_injection import Injection, injection_edit, soft_injection, task_embedding
from manyheads.edit.tuning import Learning, accuracy

__all__ = [
    "Answered",
    "HeadEdit",
    "Injection",
    "Learning",
    "SideEffects",
    "accuracy",
    "compose",
    "guard",
    "injection_edit",
    "lofit",
    "save_baked",
    "select_heads",
    "side_effects",
    "soft_injection",
    "task_embedding",
    "tune_heads",
    "undo",
]
