"""What users could bring - bytes, JSON values, command lines - drawn by hypothesis, and what must not come of it: a traceback.

A case is right if it ends well, or in an error of ours with one sentence. `fuzz(cases)` runs many; the fast tests run a few.
"""

from __future__ import annotations

import contextlib
import copy
import gzip
import json
import math
import os
import shutil
import signal
import tempfile
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
import transformers as tf
from huggingface_hub import constants
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import seed as with_seed
from hypothesis import strategies as st
from safetensors.torch import save as save_tensors
from tokenizers import Tokenizer, models, pre_tokenizers
from typer.testing import CliRunner

import manyheads as mh
from manyheads import inputs
from manyheads.atlas.core.result import Atlas
from manyheads.atlas.retrieval_heads.documents import documents
from manyheads.cli import app
from manyheads.draft.core.trunk import DraftTrunk
from manyheads.draft.drafters.medusa import Medusa
from manyheads.draft.files.exchange import export_medusa, import_medusa
from manyheads.draft.files.saving import load_drafter, save_drafter
from manyheads.draft.training.corpus import Corpus
from manyheads.edit.checkpoint import save_baked, undo
from manyheads.edit.learn.examples import of_file, of_task, task_of
from manyheads.errors import ManyheadsError
from manyheads.files import check_output
from manyheads.heads import Head, HeadScores
from manyheads.learning import Card, load, save
from manyheads.model.editing.head_edit import HeadEdit
from manyheads.trace.circuits.circuit import Circuit
from manyheads.trace.sae.autoencoder import AttentionSae
from manyheads.trace.sae.files import export_sae_lens, import_sae_lens, load_sae, save_sae

SECONDS = 20  # a case that takes longer hangs

# Values

numbers = st.one_of(
    st.sampled_from([0, 1, -1, 2, 3, 7, 2**31, 2**63, -(2**63), 10**30, 10**399, 0.5, -0.0, 1e-300, 1e39, 1e308]),
    st.sampled_from([math.nan, math.inf, -math.inf]),
    st.integers(),
    st.floats(),
)
texts = st.one_of(
    st.sampled_from(
        ["", " ", "L0H0", "L9H9", "L0H0,L0H1", "nan", "\0", "\ud800", "é", "x" * 300, "../x", "name/kernel", "six"]
    ),
    st.text(max_size=12),
)
scalars = st.one_of(st.none(), st.booleans(), numbers, texts)
values = st.recursive(
    scalars, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(texts, inner, max_size=3), max_leaves=6
)
deep = st.sampled_from([60, 70, 2000, 100_000]).map(lambda n: "[" * n + "]" * n)
raw = st.one_of(
    st.binary(max_size=64),
    st.sampled_from([b"", b"\xef\xbb\xbf{}", b"\xff\xfe", b"{", b"null", b"\x1f\x8b\x08", b"1" * 6000]),
)


@st.composite
def damaged(draw: Any, whole: bytes) -> bytes:
    """Bytes of a good file, cut, changed, stretched or replaced."""
    kind = draw(st.sampled_from(["cut", "flip", "over", "insert", "other", "twice"]))
    at = draw(st.integers(0, max(0, len(whole) - 1)))
    if draw(st.booleans()):
        at = min(at, draw(st.integers(0, 200)))  # where headers are
    if kind == "cut":
        return whole[:at]
    if kind == "flip":
        return whole[:at] + bytes([whole[at] ^ (1 << draw(st.integers(0, 7)))]) + whole[at + 1 :] if whole else b"\0"
    if kind == "twice":
        return whole + whole
    some = draw(raw)
    return {
        "over": whole[:at] + some + whole[at + len(some) :],
        "insert": whole[:at] + some + whole[at:],
        "other": some,
    }[kind]


@st.composite
def changed(draw: Any, whole: Any) -> str:
    """The text of a good JSON value with one or two of its parts replaced, removed or added."""
    if draw(st.integers(0, 19)) == 0:
        return draw(deep)
    value = copy.deepcopy(whole)
    for _ in range(draw(st.integers(1, 2))):
        parent, key = None, None
        here = value
        while isinstance(here, dict | list) and here and (parent is None or draw(st.booleans())):
            parent, key = here, draw(st.sampled_from(sorted(here) if isinstance(here, dict) else range(len(here))))
            here = here[key]
        if parent is None:
            return json.dumps(draw(values))
        if draw(st.integers(0, 5)):
            parent[key] = draw(values)
        else:
            del parent[key]
    return json.dumps(value)


# Good things to damage


@dataclass
class Good:
    """Small whole files of every kind under `root`, and a copy of one of them to damage."""

    root: Path

    @cached_property
    def model(self) -> mh.HeadModel:
        return mh.open_model(self.folder("model"))

    @cached_property
    def trunk(self) -> DraftTrunk:
        return DraftTrunk(self.model)

    def folder(self, name: str) -> Path:
        where = self.root / name
        if not where.exists():
            getattr(self, f"_{name}")(where)
        return where

    def copy(self, name: str) -> Path:
        whole, where = self.folder(name), self.root / "damaged"
        shutil.rmtree(where, ignore_errors=True)
        return Path(shutil.copytree(whole, where))

    def _model(self, where: Path) -> None:
        sizes = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2}
        torch.manual_seed(0)
        config = tf.LlamaConfig(
            vocab_size=40, **sizes, max_position_embeddings=32, pad_token_id=0, bos_token_id=1, eos_token_id=2
        )
        tf.LlamaForCausalLM(config).save_pretrained(where)
        words = {word: i for i, word in enumerate(["<unk>", "<s>", "</s>", *(f"w{i}" for i in range(30))])}
        tokenizer = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
        tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
        tf.PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>", eos_token="</s>").save_pretrained(
            where
        )

    def _edit(self, where: Path) -> None:
        HeadEdit.of(self.model, mh.Scale(["L0H1"], 0.5), method="m", settings={"a": 1}, effect={"b": [1.0]}).save(where)

    def _head(self, where: Path) -> None:
        save(where, Card("m", settings={"n": 3}, fingerprint="f", kind="k"), {"w": torch.ones(2, 3)})

    def _sae(self, where: Path) -> None:
        parts = torch.randn(8, 4), torch.zeros(4), torch.randn(4, 8), torch.zeros(8)
        save_sae(AttentionSae(0, 2, *parts, fingerprint="f"), where)

    def _lens(self, where: Path) -> None:
        export_sae_lens(load_sae(self.folder("sae")), where)

    def _drafter(self, where: Path) -> None:
        save_drafter(Medusa(self.trunk, 2, 1), self.trunk, where, acceptance=torch.full((2, 3), 0.5))

    def _medusa(self, where: Path) -> None:
        export_medusa(load_drafter(self.folder("drafter"), self.trunk).drafter, self.trunk, where)

    def _corpus(self, where: Path) -> None:
        Corpus(torch.ones(3, 4, dtype=torch.long), torch.ones(3, 4, dtype=torch.bool), self.model.fingerprint).save(
            where
        )

    def _baked(self, where: Path) -> None:
        save_baked(self.model, HeadEdit.load(self.folder("edit")), where)

    def _circuit(self, where: Path) -> None:
        where.mkdir()
        Circuit("heads", (1, 2), {"L0H0": 0.5}, method="m", meta={"fingerprint": "f"}).save(where / "circuit.json")

    def _scores(self, where: Path) -> None:
        where.mkdir()
        HeadScores("s", np.ones((1, 2)), np.ones((1, 2)), 3, {"a": 1}).save(where / "scores.parquet")

    def _atlas(self, where: Path) -> None:
        scores = HeadScores("s", np.ones((1, 2)), np.ones((1, 2)), 3, {})
        Atlas({"s": scores}, about={"s": {"threshold": 0.5}}, card={"fingerprint": "f"}, effects={"t": scores}).save(
            where
        )

    def _texts(self, where: Path) -> None:
        where.mkdir()
        rows = [{"text": f"one {i}", "topic": "x"} for i in range(3)]
        lines = "".join(json.dumps(row) + "\n" for row in rows)
        (where / "d.txt").write_text("one\n\ntwo\n")
        (where / "d.jsonl").write_text(lines)
        (where / "d.jsonl.gz").write_bytes(gzip.compress(lines.encode()))
        (where / "d.txt.gz").write_bytes(gzip.compress(b"one\ntwo\n" * 50))
        pd.DataFrame(rows).to_parquet(where / "d.parquet")
        examples = [{"prompt": f"p{i}", "answer": " a", "foil": " b"} for i in range(6)]
        (where / "e.jsonl").write_text("".join(json.dumps(row) + "\n" for row in examples))


# Cases: a name, how many of a thousand, what is drawn, what is done with it


@dataclass(frozen=True)
class Target:
    """Something that reads what users bring. `draw` draws it, `run` is given that and must end well or in an error of ours."""

    name: str
    weight: int
    draw: st.SearchStrategy[Any]
    run: Callable[[Any], object]


def files(
    good: Good, name: str, read: Callable[[Path], object]
) -> tuple[st.SearchStrategy[Any], Callable[[Any], object]]:
    """A folder of which one file is damaged: as bytes, or where it is JSON by its values."""
    whole = {str(f.relative_to(good.folder(name))): f.read_bytes() for f in good.folder(name).rglob("*") if f.is_file()}

    def spoiled(file: str) -> st.SearchStrategy[Any]:
        bytes_ = damaged(whole[file])
        if file.endswith(".json"):
            bytes_ = (
                bytes_
                | changed(json.loads(whole[file])).map(str.encode)
                | changed(json.loads(whole[file])).map(str.encode)
            )
        return st.tuples(st.just(file), st.one_of(bytes_, st.none()))

    def run(drawn: tuple[str, bytes | None]) -> object:
        file, content = drawn
        where = good.copy(name)
        if content is None:
            (where / file).unlink()
        else:
            (where / file).write_bytes(content)
        return read(where)

    return st.sampled_from(sorted(whole)).flatmap(spoiled), run


def targets(good: Good) -> list[Target]:
    """Everything that is fuzzed."""
    model = good.model

    def opened(where: Path) -> None:
        mh.open_model(where).logits(torch.arange(3, 8)[None])

    def of_text(where: Path) -> None:
        for file in sorted(where.glob("d.*")):
            for column in (None, "topic"):
                with contextlib.suppress(ManyheadsError):
                    list(documents([file], domain_column=column))

    def tensors(content: bytes) -> None:
        (good.root / "t.safetensors").write_bytes(content)
        inputs.read_tensors(good.root / "t.safetensors", {"a": 1})

    def numbered(drawn: tuple[Any, Any]) -> None:
        strength, values_ = drawn
        edit = HeadEdit.load(good.folder("edit")).at_strength(strength)
        HeadEdit(edit.heads, torch.tensor([float(values_)]), edit.shift, "f", strength=strength).edits()

    def a_task(text: str) -> None:
        of_task(task_of(text), 4)

    task = st.one_of(
        texts,
        st.builds(
            lambda name, key, value: f"{name}:{key}={value}",
            st.sampled_from(
                ["by_example", "needle", "repeat", "facts", "arithmetic", "ioi", "refusal", "successor", "choice"]
            ),
            st.sampled_from(
                "relation shots shortest longest depth words rivals operation order marked kind form".split()
            ),
            scalars.map(str) | st.sampled_from(["french", "plural", "true", "ABBA", "-", "+", "day"]),
        ),
    )
    whole = save_tensors({"a": torch.ones(3), "b": torch.ones(2, 2)})
    return [
        Target("JSON", 150, raw | values.map(lambda v: json.dumps(v).encode()) | deep.map(str.encode), _parsed(good)),
        Target("safetensors", 100, damaged(whole), tensors),
        Target("edit", 90, *files(good, "edit", lambda where: HeadEdit.load(where).edits(prompt_length=2))),
        Target("head", 60, *files(good, "head", lambda where: load(where, "k", "head"))),
        Target("autoencoder", 60, *files(good, "sae", load_sae)),
        Target("sae-lens", 50, *files(good, "lens", lambda where: import_sae_lens(where, model))),
        Target("drafter", 50, *files(good, "drafter", lambda where: load_drafter(where, good.trunk).tree(4))),
        Target("Medusa", 40, *files(good, "medusa", lambda where: import_medusa(where, good.trunk))),
        Target("corpus", 40, *files(good, "corpus", lambda where: Corpus.load(where, model))),
        Target("undo", 40, *files(good, "baked", undo)),
        Target("circuit", 50, *files(good, "circuit", lambda where: Circuit.load(where / "circuit.json").heads)),
        Target("scores", 30, *files(good, "scores", lambda where: HeadScores.load(where / "scores.parquet"))),
        Target("atlas", 30, *files(good, "atlas", Atlas.load)),
        Target("texts", 40, *files(good, "texts", of_text)),
        Target("examples", 50, *files(good, "texts", lambda where: of_file(where / "e.jsonl"))),
        Target("model", 150, *files(good, "model", opened)),
        Target("numbers", 60, st.tuples(scalars, numbers.filter(lambda n: abs(n) < 1e308 or n != n)), numbered),
        Target("task", 40, task, a_task),
        Target("heads", 20, texts, Head.parse),
        Target(
            "output",
            40,
            texts | st.lists(texts, max_size=3).map("/".join),
            lambda t: check_output(Path(good.root, t), force=True),
        ),
        Target("command", 250, command_lines(good), run_command),
    ]


def _parsed(good: Good) -> Callable[[bytes], object]:
    def run(content: bytes) -> None:
        (good.root / "j.json").write_bytes(content)
        inputs.read_json(good.root / "j.json")

    return run


# Command lines. The model is one that is not there, or so small that a whole command is a matter of a moment.


def command_lines(good: Good) -> st.SearchStrategy[list[str]]:
    tiny, edit = str(good.folder("model")), str(good.folder("edit"))
    anything = texts | numbers.map(str)
    option_values = {
        "-b": st.sampled_from(["induction", "", "zzz", "induction,induction"]) | anything,
        "--method": st.sampled_from(["direct", "zzz", "lofit", "inject", "tune"]),
        "--room": st.sampled_from(["atlas", "zzz"]),
        "--dtype": st.sampled_from(["float32", "bfloat16", "float8_e4m3fn", "zzz", "int8", ""]),
        "--device-map": st.sampled_from(["cpu", "cuda", "auto", "zzz", ""]),
        "--examples": st.sampled_from(
            [str(good.folder("texts") / "e.jsonl"), str(good.folder("texts") / "d.parquet"), "/", "no"]
        ),
        "--task": st.sampled_from(
            ["ioi", "by_example:relation=klingon", "by_example:shots=-1", "", "needle:longest=9e9"]
        ),
        "--tree": st.sampled_from(["4", "best:4", "chain:4", "chain:99999", "0", "best:-1"]),
        "--drafter": st.sampled_from(["prompt-lookup", "./none", tiny, str(good.folder("drafter"))]),
        "--heads": st.sampled_from(["L0H0", "L0H1", "L9H0", "0", "-1", "3", "9" * 50, ""]),
    }
    options = (
        "--out --factor --strength --seed --n --n-random --seeds --top --dtype --device-map --force --no-measure --no-checks -b "
        "--answer --against --method --corrupted --task --examples --swap --heads --mlps --shots --rate --epochs --steps --rows "
        "--patience --controls --work --beta --max-new-tokens --keep --max-tokens --batch-tokens --text-column --domain-column "
        "--tree --temperature --top-k --top-p --threads --minutes --drafter --model "
        "--goal --edit --json --room --state --scale --loss --debug=0 --help"
    ).split()
    flags = {"--force", "--no-measure", "--no-checks", "--swap", "--json", "--scale", "--debug=0", "--help"}
    commands = st.sampled_from(
        [
            *(["edit", "scale", tiny, "L0H0", "--no-measure"],) * 3,
            *(["edit", "apply", tiny, edit, "w1 w2", "--max-new-tokens", "1"],) * 2,
            ["edit", "inspect", edit],
            ["edit", "compose", edit, edit],
            ["edit", "bake", tiny, edit],
            ["edit", "undo", tiny],
            *(["trace", tiny, "w1 w2"],) * 2,
            ["trace", "./none", "w1"],
            ["atlas", "./none"],
            ["atlas", "roles", str(good.folder("atlas"))],
            ["atlas", "roles", tiny],
            ["atlas", "diff", "./none", str(good.folder("atlas"))],
            ["atlas", "diff", str(good.folder("atlas")), str(good.folder("atlas"))],
            ["atlas", "influence", str(good.folder("texts") / "d.jsonl"), "--model", "./none"],
            ["edit", "learn", "./none", "--method", "lofit"],
            ["edit", "prefer", "./none", "memory"],
            ["edit", "repair", "./none"],
            ["edit", "guard", "./none"],
            ["draft", "generate", tiny, "w1 w2", "--max-new-tokens", "2"],
            ["draft", "train", "./none", "--kind", "medusa"],
            ["draft", "bench", "./none"],
            ["check", "./none"],
            ["edit", "./none"],
            ["methods"],
            ["version"],
            [],
        ]
    )

    @st.composite
    def line(draw: Any) -> list[str]:
        given_ = list(draw(commands))
        if "--out" not in given_ and draw(st.booleans()):
            given_ += ["--out", str(good.root / "out"), "--force"]
        if given_[:2] == ["edit", "scale"] and draw(st.booleans()):
            given_ += ["--factor", draw(anything)]
        for option in draw(st.lists(st.sampled_from(options), max_size=3)):
            given_.append(option)
            if option in ("--out", "--work"):
                given_.append(
                    str(good.root / draw(st.sampled_from(["out", "model/config.json/x", "n" * 300, "", "edit", "a/b"])))
                )
            elif option not in flags:
                given_.append(draw(option_values.get(option, anything)))
        if draw(st.integers(0, 3)) == 0 and given_:
            given_[draw(st.integers(0, len(given_) - 1))] = draw(anything)
        return given_

    return line()


def run_command(arguments: list[str]) -> None:
    """`ManyheadsError`s have become sentences here; anything else is raised."""
    result = CliRunner().invoke(app, arguments)
    if result.exit_code == 1:
        result = CliRunner().invoke(app, ["--debug", *arguments])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    assert "Traceback" not in result.output and "should not have happened" not in result.output, result.output


# Running


@contextlib.contextmanager
def _deadline() -> Iterator[None]:
    def late(*_: Any) -> None:
        raise TimeoutError(f"longer than {SECONDS} s")

    before = signal.signal(signal.SIGALRM, late)
    signal.setitimer(signal.ITIMER_REAL, SECONDS)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def fuzz(
    cases: int, root: Path, *, seed: int = 0, only: str | None = None, told: Callable[[str], object] = print
) -> tuple[int, dict[str, str]]:
    """Run about `cases` cases. How many ran, and for each different failure the case and its traceback."""
    good = Good(root)
    every = [target for target in targets(good) if only in (None, target.name)]
    whole = sum(target.weight for target in every)
    ran = 0
    failures: dict[str, str] = {}
    home, online = Path.cwd(), constants.HF_HUB_OFFLINE
    constants.HF_HUB_OFFLINE = True  # a name at random is no folder, and would be asked for
    os.chdir(tempfile.mkdtemp(dir=root))  # where a command writes to a name without a folder
    try:
        for target in every:
            count = _run(target, math.ceil(cases * target.weight / whole), seed, failures)
            ran += count
            told(
                f"{target.name}: {count} cases, {sum(place.startswith(f'{target.name}:') for place in failures)} failures"
            )
    finally:
        os.chdir(home)
        constants.HF_HUB_OFFLINE = online
    return ran, failures


def _run(target: Target, cases: int, seed: int, failures: dict[str, str]) -> int:
    count = 0

    @with_seed(seed)
    @settings(
        max_examples=cases,
        database=None,
        deadline=None,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    @given(drawn=target.draw)
    def one(drawn: Any) -> None:
        nonlocal count
        count += 1
        try:
            with _deadline():
                target.run(drawn)
        except ManyheadsError as error:
            if "\n" in str(error).strip() or len(str(error)) > 2000:
                failures.setdefault(f"{target.name}: not one sentence", f"{drawn!r:.500}\n{error}")
        except KeyboardInterrupt:
            raise
        except BaseException as error:  # a panic in Rust is no Exception
            frames = traceback.extract_tb(error.__traceback__)
            ours = next((frame for frame in reversed(frames) if "src/manyheads" in frame.filename), frames[-1])
            place = f"{target.name}: {type(error).__name__} at {Path(ours.filename).name}:{ours.lineno}"
            failures.setdefault(place, f"{drawn!r:.500}\n{''.join(traceback.format_exception(error))}")

    one()
    return count
