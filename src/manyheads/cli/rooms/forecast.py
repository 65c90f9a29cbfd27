"""`manyheads forecast`: a table of series in, a forecast, a backtest and an explanation out."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.table import Table
from rich.text import Text

from manyheads.cli.common import DefaultCommands, Force, Seed, announce, listed, refuse, terminal
from manyheads.cli.experiments import add_experiments

if TYPE_CHECKING:
    from manyheads.forecast.core.forecaster import Forecaster
    from manyheads.forecast.core.panel import Panel


class _ForecastCommands(DefaultCommands):
    DEFAULT = "run"


forecast_app = typer.Typer(
    cls=_ForecastCommands,
    help="Forecast a table of series: `manyheads forecast FILE --horizon H`; more below.",
    no_args_is_help=False,
)

File = Annotated[Path, typer.Argument(help="A .csv or .parquet file, one row a series and time.")]
Horizon = Annotated[int, typer.Option("--horizon", min=1, max=100_000, help="How many steps ahead.")]
Methods = Annotated[
    list[str] | None,
    typer.Option(
        "--method", "-m", help="Methods, separated by commas. Default: what suits the file; the best is taken."
    ),
]
Item = Annotated[str | None, typer.Option(help="The column of the series' names.")]
Time = Annotated[str | None, typer.Option(help="The column of times.")]
Target = Annotated[list[str] | None, typer.Option(help="The columns to forecast, separated by commas.")]
Known = Annotated[list[str] | None, typer.Option(help="Covariates known ahead, separated by commas.")]
Freq = Annotated[str | None, typer.Option(help="The step, as pandas writes it: h, D, W, MS, 15min. Default: found.")]
Season = Annotated[int | None, typer.Option(min=1, help="Steps in a season. Default: by the frequency.")]
Windows = Annotated[int | None, typer.Option(min=1, max=1000, help="Windows of the backtest. Default: up to 5.")]
Context = Annotated[int | None, typer.Option(min=1, max=100_000, help="Steps that networks look back.")]
Epochs = Annotated[int | None, typer.Option(min=1, max=100_000, help="Passes over all windows, of networks.")]
Channels = Annotated[
    str | None, typer.Option(help="targets, or series: all series as channels of one, for methods that mix them.")
]
Out = Annotated[Path | None, typer.Option(help="Write forecast.parquet, backtest.parquet, report.html here.")]


@forecast_app.command("run")
def forecast_run(
    file: File,
    horizon: Horizon,
    method: Methods = None,
    out: Out = None,
    force: Force = False,
    item: Item = None,
    time: Time = None,
    target: Target = None,
    known: Known = None,
    future: Annotated[Path | None, typer.Option(help="A file with the known covariates of the steps ahead.")] = None,
    freq: Freq = None,
    season: Season = None,
    windows: Windows = None,
    context: Context = None,
    epochs: Epochs = None,
    channels: Channels = None,
    seed: Seed = 0,
) -> None:
    """Try methods on windows of the past beside seasonal naive, fit the best on everything, and forecast."""
    refuse(out, force=force, inputs=[file, future], folder=True)
    from manyheads.forecast.core.frames import frame_of, read_frame
    from manyheads.forecast.running import run_forecast
    from manyheads.pages.forecast import scores_table, warnings_of
    from manyheads.progress import progressing

    panel = _panel(file, item, time, target, known, freq)
    methods = _methods(
        panel, horizon, method, context=context, epochs=epochs, channels=channels, season=season, seed=seed
    )
    ahead = None if future is None else read_frame(future)
    with progressing() as bar:
        run = run_forecast(panel, methods, horizon=horizon, future=ahead, windows=windows, season=season, bar=bar)
    terminal().print(scores_table(run.backtest))
    for sentence in warnings_of(run.backtest):
        announce(sentence)
    frame = frame_of(panel, run.forecasts, run.chosen.METHOD)
    terminal().print(_shown(frame, f"the forecast, by {run.chosen.METHOD}"))
    if out is not None:
        terminal().print(Text(f"Wrote {run.save(out, force=force)}."))


@forecast_app.command("compare")
def forecast_compare(
    file: File,
    horizon: Horizon,
    method: Methods = None,
    out: Annotated[Path | None, typer.Option(help="Write the page here, one HTML file.")] = None,
    force: Force = False,
    item: Item = None,
    time: Time = None,
    target: Target = None,
    known: Known = None,
    freq: Freq = None,
    season: Season = None,
    windows: Windows = None,
    refit: Annotated[bool, typer.Option("--refit", help="Train anew at every window.")] = False,
    context: Context = None,
    epochs: Epochs = None,
    channels: Channels = None,
    seed: Seed = 0,
) -> None:
    """Compare methods on the same windows of the past: one table, with seconds and parameters."""
    refuse(out, force=force, inputs=[file], folder=False)
    from manyheads.forecast.backtest import backtest
    from manyheads.forecast.running import windows_for
    from manyheads.pages.forecast import scores_table, warnings_of
    from manyheads.progress import progressing

    panel = _panel(file, item, time, target, known, freq)
    methods = _methods(
        panel, horizon, method, context=context, epochs=epochs, channels=channels, season=season, seed=seed
    )
    with progressing() as bar:
        found = backtest(
            methods,
            panel,
            horizon=horizon,
            windows=windows or windows_for(panel, horizon),
            season=season,
            refit=refit,
            bar=bar,
        )
    terminal().print(scores_table(found))
    for sentence in warnings_of(found):
        announce(sentence)
    if out is not None:
        terminal().print(Text(f"Wrote {found.report(out, force=force)}."))


@forecast_app.command("explain")
def forecast_explain(
    file: File,
    horizon: Annotated[int | None, typer.Option("--horizon", min=1, max=100_000, help="How many steps ahead.")] = None,
    method: Annotated[str, typer.Option("--method", "-m", help="One method, fitted on the file now.")] = "patchtst",
    fitted: Annotated[Path | None, typer.Option(help="A forecaster that was saved, in place of --method.")] = None,
    series: Annotated[str | None, typer.Option(help="Which series. Default: the first.")] = None,
    on: Annotated[str | None, typer.Option(help="Which target. Default: the first.")] = None,
    out: Annotated[Path | None, typer.Option(help="Write the page here, one HTML file.")] = None,
    force: Force = False,
    item: Item = None,
    time: Time = None,
    target: Target = None,
    known: Known = None,
    freq: Freq = None,
    windows: Annotated[int, typer.Option(min=2, max=1000, help="Windows of the past.")] = 8,
    n_random: Annotated[int, typer.Option(min=1, max=10_000, help="Random sets of heads.")] = 99,
    context: Context = None,
    epochs: Epochs = None,
    channels: Channels = None,
    seed: Seed = 0,
) -> None:
    """Say which stretches of the past, channels, covariates and attention heads made the forecast of one series."""
    refuse(out, force=force, inputs=[file, fitted], folder=False)
    from manyheads.errors import InputError
    from manyheads.forecast.core.forecaster import Forecaster
    from manyheads.forecast.explaining import explain_forecast
    from manyheads.pages.forecast import forecast_effects_table
    from manyheads.progress import progressing

    panel = _panel(file, item, time, target, known, freq)
    if fitted is None and horizon is None:
        raise InputError("give --horizon, or a saved forecaster with --fitted.")
    with progressing() as bar:
        if fitted is None:
            settings = {"context": context, "epochs": epochs, "channels": channels, "seed": seed}
            one = _methods(panel, horizon or 1, [method], **settings)[method].fit_panel(panel, bar=bar)
        else:
            one = Forecaster.load(fitted)
        found = explain_forecast(
            one,
            panel,
            item=series,
            target=on,
            horizon=horizon,
            windows=windows,
            n_random=n_random,
            quantile_levels=getattr(one, "levels", ()),
            seed=seed,
            bar=bar,
        )
    terminal().print(forecast_effects_table(found))
    if found.no_heads:
        announce(f"no heads: {found.no_heads}")
    if out is not None:
        terminal().print(Text(f"Wrote {found.report(out, force=force)}."))


@forecast_app.command("score")
def forecast_score(
    forecasts: Annotated[
        Path, typer.Argument(help="Subject, date, p_CLASS of each class, VALUE, VALUE_low, VALUE_high.")
    ],
    truth: Annotated[Path, typer.Argument(help="Subject, date, diagnosis, VALUE: a row a visit.")],
    date: Annotated[
        list[str] | None, typer.Option("--date", help="VALUE=COLUMN: the day a value was measured on, where another.")
    ] = None,
    seed: Seed = 0,
) -> None:
    """Score forecasts of subjects over years, as TADPOLE does: diagnoses, values and their 50 % intervals."""
    from manyheads.errors import InputError
    from manyheads.forecast.core.frames import read_frame
    from manyheads.forecast.pipelines.longitudinal import score_longitudinal

    pairs = [one.split("=", 1) for one in listed(date) or []]
    if wrong := [pair[0] for pair in pairs if len(pair) != 2]:
        raise InputError(f"--date is {wrong[0]!r}; give VALUE=COLUMN.")
    found = score_longitudinal(read_frame(forecasts), read_frame(truth), dates=dict(pairs), seed=seed)
    terminal().print(_shown(found.table, "scores", most=100))


@forecast_app.command("methods")
def forecast_methods() -> None:
    """List the methods, with their papers and settings."""
    from manyheads.forecast.core.forecaster import FORECASTERS

    table = Table("method", "paper", "what it is", "settings")
    for name, cls in FORECASTERS.all().items():
        settings = ", ".join(cls().get_params())
        table.add_row(name, cls.PAPER, Text((cls.__doc__ or "").splitlines()[0]), Text(settings))
    terminal().print(table)


def _panel(
    file: Path,
    item: str | None,
    time: str | None,
    target: list[str] | None,
    known: list[str] | None,
    freq: str | None,
) -> Panel:
    from manyheads.forecast.core.frames import columns_of, panel_of, read_frame

    df = read_frame(file)
    columns = columns_of(df, item=item, time=time, target=listed(target), known=listed(known) or ())
    return panel_of(df, columns, freq)


def _methods(panel: Panel, horizon: int, names: list[str] | None, **settings: Any) -> dict[str, Forecaster]:
    from manyheads.forecast.choosing import forecaster_named, methods_for

    chosen = listed(names) or methods_for(panel, horizon)
    return {name: forecaster_named(name, panel, horizon, **settings) for name in chosen}


def _shown(frame: Any, title: str, most: int = 12) -> Table:
    table = Table(
        title=title + ("" if len(frame) <= most else f" (the first {most} of {len(frame):,} rows)"),
        title_justify="left",
    )
    inner = [name for name in frame.columns if _is_quantile(name)][1:-1]
    frame = frame.drop(columns=inner)
    for name in frame.columns:
        table.add_column(str(name), no_wrap=True)
    for row in frame.head(most).itertuples(index=False):
        table.add_row(*[f"{value:.4g}" if isinstance(value, float) else str(value) for value in row])
    return table


def _is_quantile(name: str) -> bool:
    return "-q-" in name or name.replace(".", "", 1).isdigit()


add_experiments(forecast_app, "forecast")
