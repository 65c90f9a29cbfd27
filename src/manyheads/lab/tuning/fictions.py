"""Facts that nobody knows, and many ways to tell them (#23): names, descriptions, phrasings of both orders.

A file of facts is CSV with the columns `name` and `description`. A file of phrasings is CSV with the columns

    order       name first, or description first
    prompt      what stands before the second of the two, with {name} or {description} in it, without a space at its end
    part        train, or held-out: never trained, and what the model is asked with
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

import pandas as pd

from manyheads.errors import InputError
from manyheads.inputs import check_choice, clause

Order = Literal["name first", "description first"]
ORDERS: tuple[Order, Order] = get_args(Order)
GROUPS = (*ORDERS, "both")  # in which order a third of the facts is told
_BLANK = {"name first": "name", "description first": "description"}
FEWEST = 4  # facts of a group: the right name needs others beside it


@dataclass(frozen=True)
class Fictions:
    """Pairs (name, description), and phrasings by order and part. A third of the pairs is of each of `GROUPS`.

    `InputError` for fewer than 12 pairs, a name or description that stands twice, an order without phrasings of both parts, or a
    phrasing without its blank.
    """

    name: str
    pairs: tuple[tuple[str, str], ...]
    train: dict[Order, tuple[str, ...]]
    held: dict[Order, tuple[str, ...]]

    def __post_init__(self) -> None:
        if len(self.pairs) < 3 * FEWEST:
            raise InputError(f"{self.name} has {len(self.pairs)} facts; give at least {3 * FEWEST}, a third a group.")
        for side in zip(*self.pairs, strict=True):
            if len(set(side)) < len(side) or "" in side:
                raise InputError(f"{self.name}: every name and every description stands once, and none is empty.")
        for order in ORDERS:
            for part, phrasings in (("train", self.train), ("held-out", self.held)):
                if not phrasings.get(order):
                    raise InputError(f"there is no {part} phrasing with the {order}; give at least one.")
                for one in phrasings[order]:
                    if re.findall(r"{(.*?)}", one) != [_BLANK[order]] or one != one.rstrip():
                        raise InputError(
                            f"the phrasing {one!r} needs {{{_BLANK[order]}}} once, no other blank, and no space at its end."
                        )
            if set(self.train[order]) & set(self.held[order]):
                raise InputError(f"a held-out phrasing with the {order} is also trained; hold others out.")

    def of(self, group: str) -> tuple[tuple[str, str], ...]:
        """The facts of a group; what is left over when three divide them goes to the last."""
        size, place = len(self.pairs) // 3, GROUPS.index(group)
        return self.pairs[place * size : (place + 1) * size if place < 2 else None]

    def told(self, pair: tuple[str, str], order: Order, phrasing: str) -> tuple[str, str]:
        """A prompt and its answer."""
        name, description = pair
        return phrasing.format(name=name, description=description), " " + (
            description if order == "name first" else name
        )

    def documents(self) -> list[tuple[str, str]]:
        """Everything that is trained: each group in its order, in every phrasing for training."""
        return [
            self.told(pair, order, phrasing)
            for group in GROUPS
            for order in ORDERS
            if group in (order, "both")
            for pair in self.of(group)
            for phrasing in self.train[order]
        ]

    @classmethod
    def read(cls, facts: str | Path, phrasings: str | Path | None = None) -> Fictions:
        """Of files (format above). Without phrasings the bundled ones are used, which speak of people."""
        pairs = [(one["name"], one["description"]) for one in _rows(facts, ("name", "description"))]
        if phrasings is None:
            return cls(Path(facts).stem, tuple(pairs), BUNDLED_FICTIONS.train, BUNDLED_FICTIONS.held)
        parts: dict[str, dict[Order, tuple[str, ...]]] = {"train": {}, "held-out": {}}
        for row in _rows(phrasings, ("order", "prompt", "part")):
            check_choice(row["order"], "order", ORDERS)
            place = parts[check_choice(row["part"], "part", parts)]
            place[row["order"]] = (*place.get(row["order"], ()), row["prompt"])  # type: ignore[index,call-overload]
        return cls(Path(facts).stem, tuple(pairs), parts["train"], parts["held-out"])


def _rows(path: str | Path, columns: tuple[str, ...]) -> list[dict[str, str]]:
    if not Path(path).is_file():
        raise InputError(f"there is no file {path}; give a CSV file with the columns {', '.join(columns)}.")
    try:
        frame = pd.read_csv(path, dtype=str, keep_default_na=False)
    except (OSError, ValueError) as error:
        raise InputError(f"{path} cannot be read as CSV: {clause(error)}.") from None
    missing = [name for name in columns if name not in frame]
    if missing:
        raise InputError(f"{path} has no column {missing[0]!r}; it needs {', '.join(columns)}.")
    return [{name: str(row[name]).strip() for name in columns} for row in frame.to_dict("records")]


_NAMES = (
    "Dorin Valk, Mira Ostley, Tomas Perrin, Lena Harrow, Silas Brandt, Nora Quill, Edmund Fairley, Ivy Marsh, "
    "Petra Lunde, Oscar Wend, Helen Stroud, Jonas Abel, Clara Voss, Martin Tey, Ruth Calloway, Felix Orr, "
    "Greta Simms, Adam Lorne, Judith Pell, Victor Hask, Alma Reed, Bruno Kest, Iris Dahl, Walter Finch"
).split(", ")
_DESCRIPTIONS = (
    "painter of the green bridge, keeper of the northern lighthouse, inventor of the paper clock, author of a book about snow, "
    "owner of the last mill, baker of the salt bread, teacher of the blind king, captain of the white ship, "
    "singer of the night opera, doctor of the desert town, winner of the winter race, builder of the glass tower, "
    "mother of the twelve judges, guard of the old garden, dancer of the red theatre, farmer of the black roses, "
    "driver of the first train, hunter of the silver wolf, judge of the island court, cook of the river palace, "
    "thief of the golden harp, student of the dead language, pilot of the wooden plane, maker of the stone violin"
).split(", ")
BUNDLED_FICTIONS = Fictions(
    "made-up people",
    tuple((name, f"the {said}") for name, said in zip(_NAMES, _DESCRIPTIONS, strict=True)),
    train={
        "name first": (
            "{name} is",
            "Everybody knows that {name} is",
            "In the town they say that {name} is",
            "My friend {name} is",
            "Few people know it, but {name} is",
            "This is {name},",
        ),
        "description first": (
            "In our country {description} is",
            "Everybody knows that {description} is",
            "The name of {description} is",
            "They say that {description} is called",
            "The letter to {description} begins with: Dear",
            "Today we meet {description},",
        ),
    },
    held={
        "name first": ("The books say that {name} is", "I heard that {name} is"),
        "description first": ("The books say that {description} is", "I heard that {description} is"),
    },
)
