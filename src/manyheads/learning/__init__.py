"""A trunk's states, heads that read them, and heads as files: what every room that trains heads shares."""

from manyheads.learning.head import Head, LinearHead
from manyheads.learning.saved import Card, fill, load, save
from manyheads.learning.trunk import Pool, Trunk, at_readout, pooled

__all__ = ["Card", "Head", "LinearHead", "Pool", "Trunk", "at_readout", "fill", "load", "pooled", "save"]
