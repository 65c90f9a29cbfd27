"""Make it behave otherwise: edits of heads that can be saved, shared, composed, undone and baked."""

from manyheads.edit.checkpoint import save_baked, undo
from manyheads.edit.effects import SideEffects, side_effects
from manyheads.edit.inference_time.conditional_beams import HeadLearning, conditional_beam_search, learn_attribute
from manyheads.edit.inference_time.hidden_state_optimisation import StateSteps, optimise_states, score_answers
from manyheads.edit.learn.examples import Answered, Portions, of_file, of_task, task_of
from manyheads.edit.learn.lofit import lofit, select_heads
from manyheads.edit.learn.preferences import Preferences, preferred
from manyheads.edit.learn.selective_tuning import save_tuned, tune_heads, tuning_effects
from manyheads.edit.learn.soft_injection import Injection, injection_edit, soft_injection, task_embedding
from manyheads.edit.learn.tuning import LEARNING, answer_accuracy
from manyheads.edit.refusal_guard import guard
from manyheads.model.editing.head_edit import HeadEdit, compose

__all__ = [
    "LEARNING",
    "Answered",
    "HeadEdit",
    "HeadLearning",
    "Injection",
    "Portions",
    "Preferences",
    "SideEffects",
    "StateSteps",
    "answer_accuracy",
    "compose",
    "conditional_beam_search",
    "guard",
    "injection_edit",
    "learn_attribute",
    "lofit",
    "of_file",
    "of_task",
    "optimise_states",
    "preferred",
    "save_baked",
    "save_tuned",
    "score_answers",
    "select_heads",
    "side_effects",
    "soft_injection",
    "task_embedding",
    "task_of",
    "tune_heads",
    "tuning_effects",
    "undo",
]
