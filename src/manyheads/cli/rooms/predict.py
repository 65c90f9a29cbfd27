"""`manyheads predict`: heads on top of a trunk. `reward` trains one from a file of preferences or ratings, and scores by it."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.table import Table
from rich.text import Text

from manyheads.cli.common import MANY, Commands, Force, ModelName, Opening, Seed, opens, refuse, terminal
from manyheads.cli.experiments import add_experiments
from manyheads.errors import InputError

if TYPE_CHECKING:
    from manyheads.predict.reward.training import RewardRun


@opens()
def predict_reward(
    model: ModelName = "ladon",
    pairs: Annotated[
        Path | None,
        typer.Option(
            help="Learn from these JSON lines: prompt, chosen, rejected (margin), or prompt, response, rating."
        ),
    ] = None,
    test: Annotated[
        Path | None, typer.Option(help="Measure on these. Default: a fifth of the prompts of --pairs.")
    ] = None,
    out: Annotated[
        Path | None, typer.Option(help="Write the head here, a folder; with --score the scores, JSON lines.")
    ] = None,
    export: Annotated[
        Path | None, typer.Option(help="Write AutoModelForSequenceClassification with one label here.")
    ] = None,
    heads: Annotated[Path | None, typer.Option(help="With --score: a head that --out wrote.")] = None,
    score: Annotated[Path | None, typer.Option(help="Score these JSON lines: prompt and response, or pairs.")] = None,
    objective: Annotated[str, typer.Option(help="The loss of pairs: scaled, regular or margin.")] = "scaled",
    layer: Annotated[
        str,
        typer.Option(help="Read this layer: a number, best, or -1 for the last, the only one that --export writes."),
    ] = "-1",
    tune: Annotated[bool, typer.Option("--tune", help="Train the model, too, not the head alone.")] = False,
    epochs: Annotated[
        int | None, typer.Option(min=1, max=MANY, help="Passes over the pairs, at most. Default: 40, with --tune 2.")
    ] = None,
    rate: Annotated[float | None, typer.Option(help="The learning rate. Default: 1e-3, with --tune 1e-5.")] = None,
    tokens: Annotated[
        int, typer.Option(min=1, max=MANY, help="Read at most the last so many tokens of a text.")
    ] = 1024,
    seed: Seed = 0,
    force: Force = False,
    opening: Opening = Opening(),
) -> None:
    """Train a reward head on preferences or ratings, and say how often it is right beside length, words and chance.

    The second form, --heads DIR --score FILE --out FILE, adds a score to each line of a file.
    """
    given: dict[str, Any] = {"pairs": pairs, "test": test, "export": export, "heads": heads, "score": score, "out": out}
    _check_form(given, tune)
    inputs = [model, pairs, test, heads, score]
    refuse(out, force=force, inputs=inputs, folder=score is None)
    refuse(export, force=force, inputs=inputs, folder=True)
    if out is not None and export is not None and out.resolve() == export.resolve():
        raise InputError(f"--out and --export are both {out}; give two folders.")
    if score is not None:
        assert heads is not None and out is not None
        _score(model, heads, score, out, tokens, force, opening)
        return
    assert pairs is not None
    from dataclasses import replace

    from manyheads.files import write_folder_atomically
    from manyheads.inputs import check_choice, check_number
    from manyheads.learning import sequence_classifier
    from manyheads.predict.reward.feedback import read_feedback
    from manyheads.predict.reward.preference import LOSSES
    from manyheads.predict.reward.training import FROZEN, LEAST, TUNED, train_reward
    from manyheads.progress import progressing

    check_choice(objective, "--objective", LOSSES[1:])
    place = _layer(layer)
    settings = TUNED if tune else FROZEN
    settings = replace(settings, epochs=epochs or settings.epochs)
    if rate is not None:
        settings = replace(settings, rate=check_number(rate, "--rate", 0.0, above=True))
    learned = read_feedback(pairs, least=LEAST)
    tested = None if test is None else read_feedback(test)
    opened = opening(model)
    with progressing() as bar:
        run = train_reward(
            opened,
            learned,
            tested,
            layer=place,
            objective=objective,  # type: ignore[arg-type]
            tune=tune,
            settings=settings,
            exportable=export is not None,
            most_tokens=tokens,
            seed=seed,
            bar=bar,
        )
    _show(run)
    if out is not None:
        terminal().print(Text(f"Wrote {run.heads.save(out, force=force)}."))
    if export is not None:
        made = sequence_classifier(run.heads, "reward")

        def write(folder: Path) -> None:
            made.save_pretrained(folder)
            if opened.tokenizer is not None:
                opened.tokenizer.save_pretrained(folder)

        terminal().print(Text(f"Wrote {write_folder_atomically(export, write, force=force)}."))


def _layer(given: str) -> Any:
    try:
        return "best" if given == "best" else int(given)
    except ValueError:
        raise InputError(f"--layer is {given!r}; give a number, or best.") from None


def _check_form(given: dict[str, Any], tune: bool) -> None:
    """One of the two forms. `InputError` says what is missing, or does not go together."""
    there = {name for name, value in given.items() if value is not None}
    if not there & {"pairs", "score"}:
        raise InputError("nothing was asked for; give --pairs FILE to learn, or --heads DIR --score FILE --out FILE.")
    if "score" in there:
        if missing := [f"--{name}" for name in ("heads", "out") if name not in there]:
            raise InputError(f"--score needs {' and '.join(missing)}; give a head that was saved, and a file to write.")
        if wrong := [f"--{name}" for name in ("pairs", "test", "export") if name in there] + ["--tune"] * tune:
            raise InputError(f"--score does not go with {wrong[0]}; train first, then score.")
    elif "heads" in there:
        raise InputError("--heads says whose scores are wanted; give --score FILE with it, or leave it out.")


def _score(model: str, heads: Path, score: Path, out: Path, tokens: int, force: bool, opening: Opening) -> None:
    import json

    from manyheads.files import write_atomically
    from manyheads.learning import MultiHead
    from manyheads.learning.multihead import TRUNK
    from manyheads.predict.reward.feedback import answers_of, read_answers
    from manyheads.predict.reward.training import reward_scores
    from manyheads.progress import progressing

    rows = read_answers(score)
    # A trunk that was tuned is saved with its head, and the model that it came from is not needed.
    loaded = MultiHead.load(heads, None if (heads / TRUNK).is_dir() else opening(model))
    with progressing() as bar:
        answers = [(row["prompt"], row[name]) for row in rows for name in answers_of(row)]
        found = iter(reward_scores(loaded, answers, most_tokens=tokens, bar=bar).tolist())
    for row in rows:
        for name in answers_of(row):
            row["score" if name == "response" else f"{name}_score"] = next(found)
    text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    write_atomically(out, lambda file: file.write_text(text, "utf-8"), force=force)
    terminal().print(Text(f"Wrote {out}, {len(rows)} lines."))


def _show(run: RewardRun) -> None:
    table = Table("scorer", "pair accuracy", "pairs")
    for scorer, accuracy, stderr, n in run.table.itertuples(index=False):
        table.add_row(scorer, f"{accuracy:.3f} ± {stderr:.3f}", str(n))
    terminal().print(table)
    for note in run.notes:
        terminal().print(Text(note))


predict_app = typer.Typer(
    cls=Commands,
    help="Heads on top of a trunk: train them, and try what the papers claim of them.",
    no_args_is_help=True,
)
predict_app.command("reward")(predict_reward)
add_experiments(predict_app, "predict", "draft")
