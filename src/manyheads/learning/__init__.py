"""A trunk's states, heads that read them, several on one trunk, and heads as files: what every room that trains heads shares."""

from manyheads.learning.attached import Attached, AttachedHeads
from manyheads.learning.balance import Balance, Equal, GradNorm, PCGrad, Uncertainty, Weighting
from manyheads.learning.export import sequence_classifier
from manyheads.learning.features import features
from manyheads.learning.head import Head, LinearHead, LinearSettings, ScalarHead
from manyheads.learning.multihead import MultiHead
from manyheads.learning.objective import GradientConflicts, HeadsRun, gradient_conflicts
from manyheads.learning.saved import Card, fill, load, save
from manyheads.learning.trunk import Pool, Trunk, at_readout, pooled

__all__ = [
    "Attached",
    "AttachedHeads",
    "Balance",
    "Card",
    "Equal",
    "GradNorm",
    "GradientConflicts",
    "Head",
    "HeadsRun",
    "LinearHead",
    "LinearSettings",
    "MultiHead",
    "PCGrad",
    "Pool",
    "ScalarHead",
    "Trunk",
    "Uncertainty",
    "Weighting",
    "at_readout",
    "features",
    "fill",
    "gradient_conflicts",
    "load",
    "pooled",
    "save",
    "sequence_classifier",
]
