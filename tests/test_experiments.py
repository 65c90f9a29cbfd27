"""Experiments keep what was run, and a verdict says no more than the seeds do."""

import json
import math
from functools import cache, partial
from importlib.util import module_from_spec, spec_from_file_location

import pandas as pd
import pytest
import typer
from typer.testing import CliRunner

from manyheads.cli import app
from manyheads.cli.common import Commands
from manyheads.cli.experiments import add_experiments
from manyheads.errors import InputError
from manyheads.evaluation import Claim, Experiment, Together, experiments
from manyheads.evaluation.comparison import COLUMNS
from manyheads.evaluation.experiment import RESULTS, VERDICTS
from manyheads.evaluation.run_record import RECORD
from manyheads.pages.experiment import values_table

CALLS = []


def _experiment(claims, methods=None, datasets=None, name="toy"):
    def made(value):
        def run(data, seed):
            CALLS.append((data, seed))
            return {"score": value + 0.1 * seed + data}

        return run

    return Experiment(
        name,
        (1, 2),
        "2410.22269",
        "Is a better than b?",
        datasets=lambda quick: datasets or {"only": 0.0},
        methods=methods or {"a": made(1.0), "b": made(0.5)},
        baseline="b",
        claims=claims,
        room="nowhere",
    )


def _difference(values):
    return values["a", "score"] - values["b", "score"]


def _verdict(values, **bound):
    claim = Claim("x", lambda v: v["a", "score"], **bound)
    methods = {"a": lambda data, seed: {"score": values[seed]}, "b": lambda data, seed: {"score": 0.0}}
    return _experiment((claim,), methods).run(seeds=range(len(values))).verdicts[0]


def test_a_claim_is_held_where_two_standard_errors_are_within_its_bound():
    assert _verdict([1.0, 1.1, 0.9], at_least=0.5).answer == "held"
    assert _verdict([1.0, 3.0, 0.2], at_least=0.5).answer == "unsure"
    assert _verdict([0.1, 0.2, 0.3], at_least=0.5).answer == "missed"
    assert _verdict([0.1, 0.2, 0.3], at_most=0.5).answer == "held"
    assert _verdict([1.0], at_least=0.5).answer == "unsure"
    assert _verdict([float("nan"), 1.0], at_least=5).answer == "missed"


def test_a_claim_compares_methods_on_the_same_data_and_seed_only():
    tried = _experiment((Claim("x", _difference, at_least=0.4),)).run(seeds=(0, 1, 2))
    verdict = tried.verdicts[0]
    assert verdict.values == pytest.approx((0.5, 0.5, 0.5)) and verdict.stderr == pytest.approx(0)
    frame = tried.to_frame().set_index(["dataset", "method"])
    assert frame.loc[("only", "a"), "difference"] == pytest.approx(0.5)


def test_a_claim_may_be_about_one_data_set():
    one = Claim("x", lambda v: v["b", "score"], at_least=0.0, on="high")
    every = Claim("y", lambda v: v["b", "score"], at_least=0.0)
    tried = _experiment((one, every), datasets={"low": -5.0, "high": 5.0}).run(seeds=(0,))
    assert [len(verdict.values) for verdict in tried.verdicts] == [1, 2]
    assert tried.verdicts[0].mean == pytest.approx(5.5)


def test_what_was_run_is_kept_and_not_run_again(tmp_path):
    experiment = _experiment((Claim("x", _difference, at_least=0.4),))
    CALLS.clear()
    first = experiment.run(seeds=(0, 1), folder=tmp_path)
    assert len(CALLS) == 4
    more = experiment.run(seeds=(0, 1, 2), folder=tmp_path)
    assert len(CALLS) == 6 and more.verdicts[0].values[:2] == first.verdicts[0].values
    assert experiment.kept(tmp_path).to_frame().equals(more.to_frame())
    assert experiment.run(seeds=(2,), folder=tmp_path).comparison.table["seed"].tolist() == [2, 2] and len(CALLS) == 6


def test_a_run_that_was_interrupted_goes_on(tmp_path):
    def stops(data, seed):
        if seed == 1:
            raise KeyboardInterrupt
        return {"score": 1.0}

    claim = Claim("x", _difference, at_least=0.0)
    with pytest.raises(KeyboardInterrupt):
        _experiment((claim,), {"a": stops, "b": lambda data, seed: {"score": 0.0}}).run(folder=tmp_path)
    kept = json.loads((tmp_path / RECORD).read_text())["rows"]
    assert [row[:3] for row in kept] == [["a", "only", 0], ["b", "only", 0]]


def test_what_only_one_method_measures_is_missing_for_the_others(tmp_path):
    methods = {"a": lambda data, seed: {"score": 1.0, "own": 2.0}, "b": lambda data, seed: {"score": float("nan")}}
    experiment = _experiment((Claim("x", lambda v: v["a", "own"], at_least=1.0),), methods)
    for tried in (experiment.run(seeds=(0, 1), folder=tmp_path), experiment.kept(tmp_path)):
        frame = tried.to_frame().set_index(["metric", "method"])["mean"]
        assert frame["own", "a"] == 2.0 and math.isnan(frame["own", "b"]) and math.isnan(frame["score", "b"])
        assert tried.verdicts[0].answer == "held"


def _together(over):
    """Two methods, of which one runs its seeds at once."""
    return {"a": Together(over), "b": lambda data, seed: {"score": data}}


def test_seeds_that_run_at_once_are_kept_one_by_one_and_only_the_missing_ones_run(tmp_path):
    asked = []

    def over(data, seeds):
        asked.append(list(seeds))
        return [{"score": data + 10 * seed} for seed in seeds]

    claim = Claim("x", _difference, at_least=0.0)
    experiment = _experiment((claim,), _together(over), {"low": 0.0, "high": 1.0})
    experiment.run(seeds=(1,), folder=tmp_path)
    tried = experiment.run(seeds=(0, 1, 2), folder=tmp_path)
    assert asked == [[1], [1], [0, 2], [0, 2]]
    assert sorted(tried.verdicts[0].values) == [0, 0, 10, 10, 20, 20]
    table = tried.comparison.table.query("method == 'a' and dataset == 'high'")
    assert dict(zip(table["seed"], table["value"], strict=True)) == {0: 1.0, 1: 11.0, 2: 21.0}
    assert experiment.methods["a"](5.0, 3) == {"score": 35.0}


def test_a_method_that_forgets_a_seed_is_an_error():
    with pytest.raises(ValueError, match="zip"):
        _experiment((), _together(lambda data, seeds: [{"score": 0.0}])).run(seeds=(0, 1))


def test_a_seed_counts_as_within_the_bound_only_if_it_is_on_every_data_set():
    methods = {"a": lambda data, seed: {"score": data[seed]}, "b": lambda data, seed: {"score": 0.0}}
    data = {"one": (1.0, 1.0, 1.0, 1.0, math.nan), "two": (1.0, 0.0, 1.0, 3.0, 1.0)}
    claims = tuple(Claim("x", lambda v: v["a", "score"], at_least=0.5, on=on) for on in (None, "one", "two"))
    verdicts = _experiment(claims, methods, data).run(seeds=range(5)).verdicts
    assert [(one.within, one.of) for one in verdicts] == [(3, 5), (4, 5), (4, 5)]


def test_the_folder_has_every_value_of_every_seed_and_the_verdicts(tmp_path):
    methods = {"a": lambda data, seed: {"score": 1.0 + seed, "own": math.inf}, "b": lambda data, seed: {"score": 0.0}}
    claims = (Claim("x", _difference, at_least=1.5), Claim("y", lambda v: v["b", "own"], at_least=0.0))
    tried = _experiment(claims, methods).run(seeds=(0, 1, 2), folder=tmp_path)
    table = pd.read_parquet(tmp_path / RESULTS)
    assert table[COLUMNS].equals(tried.comparison.table) and set(table["experiment"]) == {"toy"}
    assert table.query("method == 'a' and metric == 'score'")["value"].tolist() == [1.0, 2.0, 3.0]
    kept = json.loads((tmp_path / VERDICTS).read_text())
    assert kept["code"] == tried.experiment.code and kept["systems"] == [1, 2] and not kept["quick"]
    first, second = kept["verdicts"]
    assert (first["answer"], first["within"], first["of"], first["values"]) == ("unsure", 2, 3, [1.0, 2.0, 3.0])
    assert second["mean"] is None and second["within"] == 0  # JSON has no NaN


def test_a_file_that_no_run_wrote_is_not_written_over(tmp_path):
    (tmp_path / RESULTS).write_text("mine")
    CALLS.clear()
    with pytest.raises(InputError, match="already exists"):
        _experiment(()).run(folder=tmp_path)
    assert not CALLS and (tmp_path / RESULTS).read_text() == "mine"


def test_another_experiments_folder_is_refused_and_left_alone(tmp_path):
    _experiment((Claim("x", _difference, at_least=0.0),)).run(seeds=(0,), folder=tmp_path)
    before = (tmp_path / RECORD).read_bytes()
    with pytest.raises(InputError, match="a run of toy"):
        _experiment((Claim("x", _difference, at_least=0.0),), name="other").run(folder=tmp_path)
    assert (tmp_path / RECORD).read_bytes() == before
    with pytest.raises(InputError, match="run it first"):
        _experiment((), name="other").kept(tmp_path)
    (tmp_path / RECORD).write_text("{")
    with pytest.raises(InputError, match="something else"):
        _experiment(()).run(folder=tmp_path)


def test_a_claim_has_one_bound_and_seeds_are_different():
    with pytest.raises(InputError, match="one bound"):
        Claim("x", _difference)
    with pytest.raises(InputError, match="one bound"):
        Claim("x", _difference, at_least=0.0, at_most=1.0)
    with pytest.raises(InputError, match="each once"):
        _experiment(()).run(seeds=(1, 1))


def test_the_page_has_every_verdict_and_every_seed(tmp_path):
    tried = _experiment((Claim("a is above b by .4", _difference, at_least=0.4),)).run(seeds=(0, 1, 2))
    text = tried.report(tmp_path / "page.html").read_text("utf-8")
    assert "a is above b by .4" in text and "held" in text and "#1, #2" in text
    assert text.count('class="dot"') == 6


def test_every_experiment_of_the_room_says_what_it_is_about():
    found = experiments("predict")
    assert found
    for name, one in found.items():
        assert (
            name == one.name
            and one.numbers
            and one.claims
            and one.baseline in one.methods
            and one.question.endswith("?")
        )


def test_the_command_line_lists_runs_and_shows_experiments(tmp_path, monkeypatch):
    monkeypatch.setenv("MANYHEADS_HOME", str(tmp_path))
    run = CliRunner()
    listed = run.invoke(app, ["predict", "list"])
    assert "fourier" in listed.output and "#19" in listed.output
    assert "choose from" in str(run.invoke(app, ["predict", "run", "nothing"]).output)
    missing = run.invoke(app, ["predict", "show", "fourier"])
    assert missing.exit_code == 2 and "run it first" in missing.output
    one = experiments("predict")["fourier"]
    rows = [
        (method, dataset, seed, metric, 0.5)
        for method in one.methods
        for dataset in ("mixture", "beta", "ratings")
        for seed in (0, 1)
        for metric in ("kl", "roughness", "roughness of the truth")
    ]
    from manyheads.version import __version__

    folder = tmp_path / "predict" / "fourier"
    folder.mkdir(parents=True)
    kept = {"name": "fourier", "version": __version__, "code": "of other code", "rows": rows}
    (folder / RECORD).write_text(json.dumps(kept))
    other = run.invoke(app, ["predict", "run", "fourier"])
    assert other.exit_code == 2 and "other code" in other.output and "--again" in other.output
    (folder / RECORD).write_text(json.dumps(kept | {"code": one.code}))
    shown = run.invoke(app, ["predict", "show", "fourier", "--out", str(tmp_path / "page.html")])
    assert shown.exit_code == 0 and "missed" in shown.output and (tmp_path / "page.html").exists()


@pytest.fixture
def room(monkeypatch, tmp_path):
    """A room whose experiments are two that run and one that fails in its second seed."""

    def breaks(data, seed):
        if seed == 1:
            raise RuntimeError("the data are  torn")
        return {"score": 0.0}

    claim = Claim("x", _difference, at_least=0.4)
    found = {name: _experiment((claim,), name=name) for name in ("first", "last")}
    found["middle"] = _experiment((claim,), {"a": breaks, "b": breaks}, name="middle")
    monkeypatch.setattr("manyheads.evaluation.experiments", lambda room: dict(sorted(found.items())))
    monkeypatch.setenv("MANYHEADS_HOME", str(tmp_path / "home"))
    group = typer.Typer(cls=Commands)
    add_experiments(group, "nowhere")
    CALLS.clear()
    return group


def test_all_experiments_run_one_that_fails_stops_no_other_and_an_interrupted_run_goes_on(room, tmp_path):
    done = CliRunner().invoke(room, ["run", "--all", "--quick", "--folder", str(tmp_path / "kept")])
    assert done.exit_code == 1 and "RuntimeError" in done.output and "torn" in done.output
    rows = {line.split("│")[1].strip(): line.split("│") for line in done.output.splitlines() if "#1" in line}
    assert list(rows) == ["first", "last", "middle"]
    assert [cell.strip() for cell in rows["last"][4:8]] == ["3", "1", "0", "0"]  # seeds, held, unsure, missed
    assert len(CALLS) == 12
    for name in ("first", "last"):
        files = sorted(path.name for path in (tmp_path / "kept" / name).iterdir())
        assert files == [RECORD, "page.html", RESULTS, VERDICTS]
    kept = json.loads((tmp_path / "kept" / "middle" / RECORD).read_text())["rows"]
    assert [row[:3] for row in kept] == [["a", "only", 0], ["b", "only", 0]]
    again = CliRunner().invoke(room, ["run", "--all", "--quick", "--folder", str(tmp_path / "kept")])
    assert again.exit_code == 1 and len(CALLS) == 12
    anew = CliRunner().invoke(
        room, ["run", "first", "--quick", "--again", "--folder", str(tmp_path / "kept" / "first")]
    )
    assert anew.exit_code == 0 and len(CALLS) == 18 and "3 of 3" in anew.output
    shown = CliRunner().invoke(room, ["show", "first", "--folder", str(tmp_path / "kept" / "first")])
    assert shown.exit_code == 0 and "3 of 3" in shown.output


@pytest.mark.parametrize(
    ("given", "words"),
    [
        (["run"], "or --all"),
        (["run", "first", "--all"], "or --all"),
        (["run", "--all", "--out", "page.html"], "--folder"),
        (["run", "first", "--folder", __file__], "a file"),
    ],
)
def test_what_cannot_be_run_is_said_before_anything_runs(room, given, words):
    done = CliRunner().invoke(room, given)
    assert done.exit_code == 2 and words in " ".join(done.output.split()) and not CALLS


def test_a_page_that_no_run_wrote_is_not_written_over(room, tmp_path):
    (tmp_path / "page.html").write_text("mine")
    done = CliRunner().invoke(room, ["run", "first", "--folder", str(tmp_path)])
    assert done.exit_code == 2 and not CALLS and (tmp_path / "page.html").read_text() == "mine"


class Called:
    """A method that is an object."""

    def __call__(self, data, seed):
        return {"x": 1.0}


def _plain(scale, data, seed):
    return {"x": scale}


@pytest.mark.parametrize(
    "method", [Called(), partial(_plain, 1.0), cache(partial(partial(_plain, 1.0), seed=1)), lambda d, s: {"x": 1.0}]
)
def test_runs_are_marked_by_the_code_of_any_kind_of_method(method, tmp_path):
    one = Experiment("x", (1,), "", "", lambda quick: {"d": 0}, {"m": method}, "m", ())
    assert one.code == Experiment("y", (1,), "", "", lambda quick: {}, {"m": _plain}, "m", ()).code


@pytest.mark.parametrize("room", ["draft", "forecast", "lab", "predict"])
def test_every_experiment_has_a_mark(room):
    found = experiments(room)
    assert found and all(len(one.code) == 8 for one in found.values())


def test_other_code_in_the_folder_of_a_method_is_another_experiment(tmp_path):
    (tmp_path / "a.py").write_text("def run(data, seed):\n    return {'x': 1.0}\n")
    spec = spec_from_file_location("made_for_marks", tmp_path / "a.py")
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    one = Experiment("x", (1,), "", "", lambda quick: {"d": 0}, {"m": module.run}, "m", ())
    marks = [one.code]
    (tmp_path / "b.py").write_text("helper = 1\n")
    marks.append(one.code)
    (tmp_path / "b.py").write_text("helper = 2\n")
    marks.append(one.code)
    assert len(set(marks)) == 3


@pytest.mark.parametrize(("metrics", "titles"), [(6, ["data", "method", "m0"]), (7, ["data", "metric", "a"])])
def test_many_metrics_stand_below_each_other(metrics, titles):
    def run(data, seed):
        return {f"m{i}": i + 0.25 for i in range(metrics)}

    tried = Experiment("x", (1,), "", "", lambda quick: {"d": 0}, {"a": run, "b": run}, "a", ()).run(seeds=[0])
    table = values_table(tried)
    assert [str(column.header) for column in table.columns][:3] == titles
    assert table.row_count == (2 if metrics == 6 else 7)
    last = [list(column.cells)[-1] for column in table.columns]
    assert last[0] == "d" and last[-1] == f"{metrics - 1 + 0.25:.3f}"
