"""What a page may ask of the model, each with its bounds: the bodies of `POST /api/jobs`, told apart by `kind`."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field

PROMPT = 8_000  # characters
NEW_TOKENS = 128
MOST_SCALE = 3.0
HeadName = Annotated[str, Field(pattern=r"^L\d{1,4}H\d{1,4}$", description="A head, for example L3H4.")]
Prompt = Annotated[str, Field(min_length=1, max_length=PROMPT, description="The text that the model reads.")]
Answer = Annotated[str | None, Field(max_length=200)]


class Asked(BaseModel):
    """Base of all: unknown fields are refused."""

    model_config = ConfigDict(extra="forbid")


class Predict(Asked):
    """The most likely next tokens."""

    kind: Literal["predict"]
    prompt: Prompt


class Explain(Asked):
    """What every head and MLP adds to the logit difference of two answers."""

    kind: Literal["explain"]
    prompt: Prompt
    answer: Answer = None
    against: Answer = None


class LookAt(Asked):
    """One head's attention pattern on a prompt."""

    kind: Literal["pattern"]
    prompt: Prompt
    head: HeadName


class WhyThere(Asked):
    """A head's attention score, split over what wrote query and key."""

    kind: Literal["why"]
    prompt: Prompt
    head: HeadName
    query: Annotated[int, Field(ge=0, le=100_000)]
    key: Annotated[int, Field(ge=0, le=100_000)]


class Promotes(Asked):
    """The tokens that a head's OV circuit raises when it reads each token of a prompt."""

    kind: Literal["promotes"]
    prompt: Prompt
    head: HeadName


class Carries(Asked):
    """The features of an autoencoder that a head carries on a prompt."""

    kind: Literal["features"]
    prompt: Prompt
    head: HeadName


class Documents(Asked):
    """The documents that need a head most."""

    kind: Literal["documents"]
    head: HeadName


class Scaling(Asked):
    """One head of the edit desk; scale 1 leaves it as it is, 0 ablates it."""

    head: HeadName
    scale: Annotated[float, Field(ge=0, le=MOST_SCALE, allow_inf_nan=False)]


class OnDesk(Asked):
    """An edit that was given on the command line, by its name; strength 0 changes nothing, 1 is as found."""

    name: Annotated[str, Field(min_length=1, max_length=100)]
    strength: Annotated[float, Field(ge=0, le=MOST_SCALE, allow_inf_nan=False)] = 1.0


class Rewrite(Asked):
    """Next tokens and text with heads scaled and edits applied, beside the model as it is."""

    kind: Literal["edit"]
    prompt: Prompt
    scales: Annotated[list[Scaling], Field(max_length=256)] = []
    edits: Annotated[list[OnDesk], Field(max_length=16)] = []
    new_tokens: Annotated[int, Field(ge=1, le=NEW_TOKENS)] = 24


class Decode(Asked):
    """Text with, for each token, the pass in which it came."""

    kind: Literal["decode"]
    prompt: Prompt
    new_tokens: Annotated[int, Field(ge=1, le=NEW_TOKENS)] = 64


class Measure(Asked):
    """Score one behaviour of every head now."""

    kind: Literal["measure"]
    behaviour: Annotated[str, Field(min_length=1, max_length=60, pattern=r"^[a-z0-9_]+$")]


class DeskScales(Asked):
    """The edit desk's scales as a file that `manyheads edit bake` folds into a checkpoint."""

    scales: Annotated[list[Scaling], Field(min_length=1, max_length=256)]


class Label(Asked):
    """What a user says of some heads."""

    heads: Annotated[list[HeadName], Field(min_length=1, max_length=1024)]
    name: Annotated[str, Field(min_length=1, max_length=80)]
    note: Annotated[str, Field(max_length=2_000)] = ""


class Labels(Asked):
    """All labels of one model."""

    labels: Annotated[list[Label], Field(max_length=1024)]


Ask = Annotated[
    Predict | Explain | LookAt | WhyThere | Promotes | Carries | Documents | Rewrite | Decode | Measure,
    Field(discriminator="kind"),
]
