"""Brains: filters that carry their own uncertainty, and spiking networks that learn what comes, when, and how likely."""

from manyheads.brain.belief_fitting import FittedBeliefs, fit_beliefs
from manyheads.brain.belief_forecasts import FilteredSeries, filter_series
from manyheads.brain.beliefs import Beliefs, filter_beliefs
from manyheads.brain.deep_beliefs import DeepBeliefs
from manyheads.brain.exponential_family import track_statistics
from manyheads.brain.network import BeliefEdge, BeliefNetwork, BeliefNode, binary_beliefs, continuous_beliefs
from manyheads.brain.reservoir import SpikingReservoir
from manyheads.brain.timing import LearnedTiming, TimedReadout, learn_timing

__all__ = [
    "BeliefEdge",
    "BeliefNetwork",
    "BeliefNode",
    "Beliefs",
    "DeepBeliefs",
    "FilteredSeries",
    "FittedBeliefs",
    "LearnedTiming",
    "SpikingReservoir",
    "TimedReadout",
    "binary_beliefs",
    "continuous_beliefs",
    "filter_beliefs",
    "filter_series",
    "fit_beliefs",
    "learn_timing",
    "track_statistics",
]
