"""Greater-than: a span of years that began in 1743 ends in a later year of that century."""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Float
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from manyheads.errors import InputError
from manyheads.tasks.base import Example, Split, Task, fill_in, in_split

EVENTS = "war journey reign project peace trial strike voyage drought friendship".split()
TEMPLATES = [
    "The {event} lasted from the year {century}{year} to the year {century2}",
    "The {event} began in {century}{year} and ended in {century2}",
    "From {century}{year} there was a {event}, which ended in {century2}",
]


@dataclass(frozen=True)
class GreaterThan(Task):
    """`The war lasted from the year 1743 to the year 17` -> any of `44` ... `99`.

    Held out: a fifth of the (century, year). `answer` is one later year, `accepted` all of them, the foil an earlier
    one; the twin begins in year 01 of the century, which makes the foil right. `probability_difference` is the score of
    the field. Spans: `year` (the two digits), `end`.
    """

    name: ClassVar[str] = "greater_than"

    def draw(self, rng: random.Random, split: Split) -> Example:
        while True:
            century, year = rng.randint(11, 19), rng.randint(3, 97)
            if in_split(f"greater_than/{century}/{year}", split):
                break
        template, event = rng.choice(TEMPLATES), rng.choice(EVENTS)
        parts = {"event": event, "century": str(century), "century2": str(century)}
        prompt, spans = fill_in(template, year=f"{year:02d}", **parts)
        later = [f"{y:02d}" for y in range(year + 1, 100)]
        foil = f"{rng.randint(2, year - 1):02d}"
        return Example(
            prompt=prompt,
            answer=rng.choice(later),
            foil=foil,
            corrupted=fill_in(template, year="01", **parts)[0],
            corrupted_answer=foil,
            spans={"year": spans["year"], "end": spans["century2"]},
            accepted=tuple(later),
            continuation=".",
        )


def probability_difference(
    logits: Float[Tensor, "N V"], years: list[int], tokenizer: PreTrainedTokenizerBase
) -> Float[Tensor, "N"]:
    """Mass on two-digit years after `years` minus mass on those up to them, in [-1, 1], at the last position."""
    ids = [tokenizer.encode(f"{y:02d}", add_special_tokens=False) for y in range(100)]
    if any(len(one) != 1 for one in ids):
        raise InputError(
            "This tokenizer has no single tokens for the years 00 to 99; greater-than cannot be scored with it."
        )
    mass = logits.float().softmax(-1)[:, torch.tensor(ids, device=logits.device).squeeze(1)]
    later = torch.arange(100, device=logits.device)[None] > torch.tensor(years, device=logits.device)[:, None]
    return (mass * later).sum(-1) - (mass * ~later).sum(-1)
