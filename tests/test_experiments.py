"""Experiments keep what was run, and a verdict says no more than the seeds do."""

import json
import math
from functools import cache, partial
from importlib.util import module_from_spec, spec_from_file_location

import pytest
from typer.testing import CliRunner

from manyheads.cli import app
from manyheads.errors import InputError
from manyheads.evaluation import Claim, Experiment, experiments
from manyheads.evaluation.experiment import RECORD
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
