"""Brains: filters that carry their own uncertainty, and spiking networks that learn what comes, when, and how likely."""

from manyheads.brain.belief_fitting import FittedBeliefs, fit_beliefs
from manyheads.brain.belief_forecasts import FilteredSeries, filter_series
from manyheads.brain.beliefs import Beliefs, filter_beliefs
from manyheads.brain.deep_beliefs import DeepBeliefs
from manyheads.brain.exponential_family import track_statistics
from manyheads.brain.network import BeliefEdge, BeliefNetwork, BeliefNode, binary_beliefs, continuous_beliefs

__all__ = [
    "BeliefEdge",
    "BeliefNetwork",
    "BeliefNode",
    "Beliefs",
    "DeepBeliefs",
    "FilteredSeries",
    "FittedBeliefs",
    "binary_beliefs",
    "continuous_beliefs",
    "filter_beliefs",
    "filter_series",
    "fit_beliefs",
    "track_statistics",
]
