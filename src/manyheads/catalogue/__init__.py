"""The catalogue: 125 published systems that work on attention heads, what each is for, and how far ours is (not all are built).

`methods()` lists them, `find_methods("reduce kv memory")` finds what answers a need, `search("reward model")` those that hold
the words, `method(11)` names one. `catalogue.json` is the list.
"""

from manyheads.catalogue.ranking import find_methods, rankings
from manyheads.catalogue.rows import ROOM_ABOUT, ROOMS, STATES, Method, Room, State, method, methods
from manyheads.catalogue.words import search

__all__ = [
    "ROOMS",
    "ROOM_ABOUT",
    "STATES",
    "Method",
    "Room",
    "State",
    "find_methods",
    "method",
    "methods",
    "rankings",
    "search",
]
