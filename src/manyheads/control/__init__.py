"""Control: networks of agents with prediction heads that no reward trains."""

from manyheads.control.grid_rooms import GridRooms, four_rooms
from manyheads.control.proto_values import ProtoValues, learn_proto_values, load_proto_values
from manyheads.control.random_walk import RandomWalk, random_walk

__all__ = [
    "GridRooms",
    "ProtoValues",
    "RandomWalk",
    "four_rooms",
    "learn_proto_values",
    "load_proto_values",
    "random_walk",
]
