"""Every system's claim, tried again: its experiments, or where it has none the tests that its row in the catalogue names.

    held, unsure, missed    a claim of an experiment, over seeds (`experiment`)
    not shown               the quick form does not keep the bound, which on so little data refutes nothing
    passed, failed          tests that show the claim; one fails if what they call is replaced
    not run                 with the reason, such as a package that is not installed
    not built               the system is absent

What was found for a number is kept in a folder, one JSON file a number, when it is done; a run that was interrupted goes on.
"""

from __future__ import annotations

import contextlib
import inspect
import json
import os
import subprocess
import sys
import time
import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal, get_args

from manyheads.catalogue import Method, methods
from manyheads.catalogue.rows import ROOMS
from manyheads.errors import InputError, ManyheadsError
from manyheads.evaluation.experiment import Experiment, Verdict, experiments
from manyheads.files import write_atomically
from manyheads.inputs import check_integer, clause, read_object
from manyheads.progress import Bar
from manyheads.version import __version__

Answered = Literal["held", "unsure", "missed", "not shown", "passed", "failed", "not run", "not built"]
ROOT = Path(__file__).parents[3]  # of the repository, if this is one
LIMIT = 600  # seconds that the tests of a row may take


@dataclass(frozen=True)
class Replication:
    """One claim of one system: what was measured beside the bound, the verdict, what to type, and how long it took."""

    number: int
    claim: str
    bound: str
    measured: str
    baseline: str
    verdict: Answered
    seeds: int
    command: str
    seconds: float

    def __post_init__(self) -> None:
        if self.verdict not in get_args(Answered):
            raise InputError(f"{self.verdict!r} is no verdict; there are {', '.join(get_args(Answered))}.")


@cache
def experiments_of() -> Mapping[int, tuple[tuple[str, Experiment], ...]]:
    """The experiments of each system, with their rooms; none of a room whose packages (an extra) are not installed."""
    found: dict[int, list[tuple[str, Experiment]]] = {}
    for room in (room for room in ROOMS if find_spec(f"manyheads.{room}") is not None):
        try:
            here = experiments(room)
        except (ManyheadsError, ImportError):
            continue
        for one in here.values():
            for number in one.numbers:
                found.setdefault(number, []).append((room, one))
    return {number: tuple(every) for number, every in found.items()}


def replicate(
    numbers: Sequence[int] = (),
    folder: str | Path | None = None,
    *,
    seeds: int = 3,
    quick: bool = True,
    again: bool = False,
    bar: Bar = Bar(),
) -> list[Replication]:
    """Try the claims of these systems (none: all 125), the quick form of an experiment or all of it.

    With a `folder` each number is kept there, and not tried again by the same code, seeds and form. `InputError` for a number
    that the catalogue has not.
    """
    check_integer(seeds, "seeds", 1, 100)
    known = {m.number: m for m in methods()}
    for number in numbers:
        if number not in known:
            raise InputError(f"there is no system {number}; the catalogue has 1 to {len(known)}.")
    wanted = [known[number] for number in (numbers or known)]
    done, found = bar.step("replicating", len(wanted)), []
    for m in wanted:
        kept = None if again else _kept(folder, m, seeds, quick)
        rows = list(_tried(m, folder, seeds, quick)) if kept is None else kept
        if folder is not None and kept is None:
            _keep(Path(folder), m, rows, seeds, quick)
        found += rows
        done(1, note=f"#{m.number} {m.name}: {', '.join(sorted({row.verdict for row in rows}))}")
    return found


def kept_replications(folder: str | Path) -> list[Replication]:
    """All that a folder keeps of the code as it is now, by number. `InputError` where a file in it is none of ours."""
    found, known = [], {m.number: m for m in methods()}
    for path in sorted(Path(folder).glob("[0-9]*.json"), key=lambda path: path.name.zfill(12)):
        rows, facts = _read(path), read_object(path)
        m = known.get(rows[0].number) if rows else None
        if m is not None and facts.get("code") == _mark(m, 0, True)["code"]:
            found += rows
    return found


def _tried(m: Method, folder: str | Path | None, seeds: int, quick: bool) -> Iterator[Replication]:
    if m.state == "absent":
        yield Replication(m.number, m.what, "", "", "", "not built", 0, "", 0.0)
        return
    for room, one in experiments_of().get(m.number, ()):
        yield from _by_experiment(m.number, room, one, folder, seeds, quick)
    if m.number not in experiments_of():
        yield _by_tests(m)


def _by_experiment(
    number: int, room: str, one: Experiment, folder: str | Path | None, seeds: int, quick: bool
) -> Iterator[Replication]:
    verb = "try" if room == "forecast" else "run"
    command = (
        f"manyheads {room} {verb} {one.name}{' --quick' if quick else ''}{f' --seeds {seeds}' if seeds != 3 else ''}"
    )
    # Runs of other code lie in another folder.
    place = None if folder is None else Path(folder) / room / f"{one.name}{'-quick' if quick else ''}-{one.code}"
    started = time.monotonic()
    try:
        tried = one.run(seeds=range(seeds), quick=quick, folder=place)
    except (ManyheadsError, ImportError, OSError) as error:
        yield Replication(number, one.question, "", clause(error), "", "not run", 0, command, 0.0)
        return
    seconds = round(tried.seconds or time.monotonic() - started, 1)
    for verdict in tried.verdicts:
        yield Replication(
            number,
            verdict.says,
            verdict.bound,
            _measured(verdict),
            one.baseline,
            _answer(verdict, quick),
            verdict.of,
            command,
            seconds,
        )


def _answer(verdict: Verdict, quick: bool) -> Answered:
    if not verdict.of:
        return "not run"
    return "not shown" if quick and verdict.answer == "missed" else verdict.answer


def _measured(verdict: Verdict) -> str:
    if not verdict.of:
        return "the quick form leaves its data out"
    spread = f" ± {verdict.stderr:.2g}" if len(verdict.values) > 1 else ""
    return f"{verdict.mean:.3g}{spread} ({verdict.within} of {verdict.of})"


def _by_tests(m: Method) -> Replication:
    """By the tests that the row names, which lie in the repository and in no wheel."""
    command = f"pytest -m 'slow or not slow' {' '.join(m.tests)}"

    def told(verdict: Answered, measured: str, seconds: float = 0.0) -> Replication:
        return Replication(m.number, m.what, "", measured, "", verdict, 0, command, round(seconds, 1))

    if not all((ROOT / test.partition("::")[0]).is_file() for test in m.tests):
        return told("not run", "its tests lie in the repository; run this there")
    started = time.monotonic()
    words = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-m", "slow or not slow", *m.tests]
    try:
        ran = subprocess.run(
            words,
            cwd=ROOT,
            capture_output=True,
            text=True,
            timeout=LIMIT,
            env=os.environ | {"PYTHONPATH": str(ROOT / "src")},
        )
    except subprocess.TimeoutExpired:
        return told("not run", f"it took more than {LIMIT} seconds", LIMIT)
    last = next((line.strip("= ") for line in reversed(ran.stdout.splitlines()) if line.strip()), "")
    seconds = time.monotonic() - started
    if ran.returncode == 0 and "passed" not in last:  # skipped for a package or a download
        return told("not run", last, seconds)
    return told("passed" if ran.returncode == 0 else "failed", last.partition(" in ")[0], seconds)


def _mark(m: Method, seeds: int, quick: bool) -> dict[str, Any]:
    """What a result depends on: the version, how it was tried, and the code of experiments, else of tests and entry."""
    own = [one.code for _, one in experiments_of().get(m.number, ())]
    if not own and m.state != "absent":
        files = {ROOT / test.partition("::")[0] for test in m.tests}
        with contextlib.suppress(ManyheadsError, ImportError):  # of an extra that is not installed
            files.add(Path(inspect.getfile(inspect.unwrap(m.load()))))
        own = [f"{zlib.crc32(b''.join(file.read_bytes() for file in sorted(files) if file.is_file())):08x}"]
    return {"version": __version__, "seeds": seeds, "quick": quick, "code": own}


def _keep(folder: Path, m: Method, rows: Sequence[Replication], seeds: int, quick: bool) -> None:
    facts = _mark(m, seeds, quick) | {"rows": [asdict(row) for row in rows]}
    text = json.dumps(facts, indent=1, ensure_ascii=False)
    folder.mkdir(parents=True, exist_ok=True)
    write_atomically(folder / f"{m.number}.json", lambda file: file.write_text(text, "utf-8"), force=True)


def _kept(folder: str | Path | None, m: Method, seeds: int, quick: bool) -> list[Replication] | None:
    path = None if folder is None else Path(folder) / f"{m.number}.json"
    if path is None or not path.is_file():
        return None
    facts, mark = read_object(path), _mark(m, seeds, quick)
    if {name: facts.get(name) for name in mark} != mark:
        return None
    rows = _read(path)
    # What could not begin, or failed, is tried once more; what ran into its limit is not.
    again = any(row.verdict == "failed" or (row.verdict == "not run" and not row.seconds) for row in rows)
    return None if again else rows


def _read(path: Path) -> list[Replication]:
    try:
        rows: Any = read_object(path)["rows"]
        return [Replication(**row) for row in rows]
    except (KeyError, TypeError):
        raise InputError(f"{path} is no result of `manyheads replicate`; give the folder that it wrote.") from None
