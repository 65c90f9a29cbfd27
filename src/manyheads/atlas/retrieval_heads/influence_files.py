"""AttentionInfluence of whole corpora (#17): files in, one Parquet file of scores out; an interrupted run can be resumed.

Documents are read one after the other and scored in parts; each part is written whole or not at all into `.NAME.parts` beside
the output, with the plan (files, settings, heads, model) that made it. The same call goes on after the last whole part, so that
no row is lost or comes twice; a call with another plan is refused. At the end ranks are taken over all parts and everything is
written as one file, then the parts go. Memory holds a part's texts and a few numbers a document.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from manyheads.atlas.retrieval_heads.documents import Document, documents
from manyheads.atlas.retrieval_heads.influence import ABOUT, FLOOR, influence, retrieval_heads, selection, token_rows
from manyheads.errors import InputError
from manyheads.files import check_output, write_atomically
from manyheads.heads import HeadLike, HeadSet
from manyheads.inputs import check_integer, check_number, check_seed, read_object
from manyheads.model.headmodel import HeadModel
from manyheads.progress import Bar

AT_ONCE = 64  # documents tokenized together
BATCHES = 32  # of `batch_tokens`: a part, the most that an interruption loses
MOST = 4096  # documents in a part
SCHEMA = pa.schema(
    [
        ("id", pa.int64()),
        ("file", pa.string()),
        ("row", pa.int64()),
        ("domain", pa.string()),
        ("n_tokens", pa.int64()),
        ("loss", pa.float64()),
        ("loss_masked", pa.float64()),
        ("score", pa.float64()),
    ]
)
RANKED = pa.schema(
    [
        *SCHEMA,
        ("rank", pa.int64()),
        ("selected", pa.bool_()),
        ("random", pa.bool_()),
        ("random_tokens", pa.bool_()),
    ]
)


def influence_files(
    model: HeadModel,
    paths: Sequence[str | Path],
    out: str | Path,
    *,
    heads: HeadSet | Iterable[HeadLike] | None = None,
    text_column: str = "text",
    domain_column: str | None = None,
    keep: float = 0.2,
    max_tokens: int | None = None,
    batch_tokens: int = 4096,
    floor: float = FLOOR,
    seed: int = 0,
    force: bool = False,
    bar: Bar = Bar(),
) -> Path:
    """Score every document of `paths` (.txt, .jsonl, .parquet; see `documents`) and write the Parquet file `out`.

    Columns: id (counted over all files), file, row, domain, n_tokens, loss, loss_masked, score, rank (in its domain, 1 is
    highest), selected (the top `keep` of each domain), random and random_tokens (baselines, see `selection`). Settings, heads and
    the model's fingerprint are in the file's metadata under `manyheads.influence`. `heads` default to the retrieval heads.

    A run that was interrupted goes on when called again. `InputError` if `out` exists, or if an unfinished run of it has another
    plan, unless `force` is set; `UnsupportedError` if the model has no retrieval heads. `bar` counts documents, those of
    an earlier run too.
    """
    out = Path(out)
    check_output(out, force=force, inputs=paths, folder=False)
    check_number(keep, "keep, the share of documents to select,", 0, 1)
    check_integer(batch_tokens, "batch_tokens", 1)
    check_number(floor, "floor", 0, above=True)
    check_seed(seed)
    if max_tokens is not None:
        check_integer(max_tokens, "max_tokens", 1)
    stream = documents(paths, text_column=text_column, domain_column=domain_column)
    token_rows(model, [""], max_tokens)  # a tokenizer and a sensible length, before anything is written
    settings = {
        "files": [_stamp(Path(path)) for path in paths],
        "heads": None if heads is None else [str(h) for h in model.head_set(heads)],
        "text_column": text_column,
        "domain_column": domain_column,
        "max_tokens": max_tokens,
        "batch_tokens": batch_tokens,
        "floor": floor,
    }
    folder = out.with_name(f".{out.name}.parts")
    plan = _plan(model, folder, ABOUT.provenance(model, seed, **settings), heads, force)
    chosen = model.head_set(plan["heads"])
    done = sum(pq.read_metadata(part).num_rows for part in _parts(folder))
    if done:
        bar(done)
    for texts, rows in _portions(model, islice(stream, done, None), max_tokens, BATCHES * batch_tokens):
        found = influence(model, rows, heads=chosen, max_tokens=max_tokens, batch_tokens=batch_tokens, floor=floor)
        table = pa.table(
            {
                "id": np.arange(done, done + len(texts)),
                "file": [document.file for document in texts],
                "row": [document.row for document in texts],
                "domain": [document.domain for document in texts],
                "n_tokens": found.n_tokens,
                "loss": found.loss,
                "loss_masked": found.loss_masked,
                "score": found.score,
            },
            schema=SCHEMA,
        )
        write_atomically(_part(folder, done), lambda file, table=table: pq.write_table(table, file), force=True)  # type: ignore[misc]
        done += len(texts)
        bar(len(texts))
    if not done:
        shutil.rmtree(folder)
        raise InputError(f"there is no document in {', '.join(map(str, paths)) or 'no files'}; give files with text.")
    about = {**plan, "documents": done, "keep": keep, "seed": seed}
    write_atomically(out, lambda file: _merge(_parts(folder), file, about, keep, seed), force=force)
    shutil.rmtree(folder)
    return out


def _plan(
    model: HeadModel, folder: Path, wanted: dict[str, Any], heads: HeadSet | Iterable[HeadLike] | None, force: bool
) -> dict[str, Any]:
    """What the parts in `folder` are made with: as begun, or begun now."""
    file = folder / "plan.json"
    if file.is_file():
        plan = read_object(file)
        if plan.get("wanted") == wanted:
            return plan
        if not force:
            if not isinstance(plan.get("wanted"), dict) or not isinstance(plan["wanted"].get("settings"), dict):
                raise InputError(f"{file} is damaged; {_ADVICE}")
            raise InputError(f"{folder} holds an unfinished run with {_difference(plan['wanted'], wanted)}; {_ADVICE}")
    shutil.rmtree(folder, ignore_errors=True)
    chosen = (
        retrieval_heads(model, seed=wanted["seed"]) if heads is None else model.head_set(wanted["settings"]["heads"])
    )
    plan = {"wanted": wanted, "heads": [str(h) for h in chosen]}
    write_atomically(file, lambda path: path.write_text(json.dumps(plan, indent=1)))
    return plan


_ADVICE = "finish it with the same call, remove it, or pass force (--force) to begin anew."


def _difference(before: dict[str, Any], now: dict[str, Any]) -> str:
    flat = [{**plan, **plan["settings"]} for plan in (before, now)]
    names = [name for name in flat[1] if name != "settings" and flat[0].get(name) != flat[1][name]]
    return f"another {' and '.join(names)}"


def _stamp(path: Path) -> dict[str, Any]:
    """Size and time of a file: whether it has changed between a run and its continuation."""
    state = path.stat()
    return {"path": str(path), "bytes": state.st_size, "modified": state.st_mtime_ns}


def _portions(
    model: HeadModel, stream: Iterator[Document], max_tokens: int | None, tokens: int
) -> Iterator[tuple[list[Document], list[list[int]]]]:
    """Documents with their token ids, about `tokens` of them together."""
    texts: list[Document] = []
    rows: list[list[int]] = []
    while some := list(islice(stream, AT_ONCE)):
        texts += some
        rows += token_rows(model, [document.text for document in some], max_tokens)
        if sum(map(len, rows)) >= tokens or len(rows) >= MOST:
            yield texts, rows
            texts, rows = [], []
    if texts:
        yield texts, rows


def _part(folder: Path, first: int) -> Path:
    return folder / f"{first:012d}.parquet"


def _parts(folder: Path) -> list[Path]:
    """The whole parts, in order, each named by its first document's id: the chain that begins at 0."""
    parts, done = [], 0
    while (part := _part(folder, done)).is_file():
        parts.append(part)
        done += pq.read_metadata(part).num_rows
    return parts


def _merge(parts: Sequence[Path], file: Path, about: dict[str, Any], keep: float, seed: int) -> None:
    """Rank over all parts, then copy them one by one into `file` with their ranks."""
    numbers = pa.concat_tables([pq.read_table(part, columns=["domain", "n_tokens", "score"]) for part in parts])
    domain = numbers["domain"].combine_chunks().dictionary_encode().indices.to_numpy()
    chosen = selection(numbers["score"].to_numpy(), numbers["n_tokens"].to_numpy(), domain, keep=keep, seed=seed)
    schema = RANKED.with_metadata({"manyheads.influence": json.dumps(about)})
    with pq.ParquetWriter(file, schema) as writer:
        start = 0
        for part in parts:
            table = pq.read_table(part)
            for name, values in chosen.items():
                column = pa.array(values[start : start + len(table)], RANKED.field(name).type, from_pandas=True)
                table = table.append_column(name, column)
            writer.write_table(table.cast(schema))
            start += len(table)
