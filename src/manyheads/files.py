"""Writing files so that nothing is lost: into a temporary name first, then renamed; never over something by accident."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from manyheads.errors import InputError, ManyheadsError


def write_atomically(path: str | Path, write: Callable[[Path], object], *, force: bool = False) -> Path:
    """Call `write(temporary path)`, then rename it to `path`. `InputError` if `path` exists and `force` is not set.

    An interruption leaves either the old file or the new one, never half of one.
    """
    path = Path(path)
    refuse_existing(path, force=force)
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    os.close(handle)
    temporary = Path(name)
    try:
        write(temporary)
        temporary.chmod(0o666 & ~_umask())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
    return path


def write_folder_atomically(folder: str | Path, write: Callable[[Path], object], *, force: bool = False) -> Path:
    """Call `write(temporary folder)`, then rename it to `folder`; what was there (with `force`) goes only after that.

    What was there comes back if that fails. A process killed between the two renames leaves it beside, in `NAME.old.*`.
    """
    folder = Path(folder)
    refuse_existing(folder, force=force)
    if folder.exists() and not folder.is_dir():
        raise InputError(f"{folder} is a file, and a folder is to be written there; choose another name.")
    folder.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(dir=folder.parent, prefix=f".{folder.name}."))
    try:
        write(temporary)
        for path in (temporary, *temporary.rglob("*")):
            path.chmod((0o777 if path.is_dir() else 0o666) & ~_umask())
        if folder.exists():
            # No call that all systems have swaps two folders: for a moment there is none of this name.
            retired = Path(tempfile.mkdtemp(dir=folder.parent, prefix=f"{folder.name}.old.")) / folder.name
            try:
                folder.rename(retired)
                temporary.rename(folder)
            finally:
                if not folder.exists():
                    retired.rename(folder)
                shutil.rmtree(retired.parent)
        else:
            temporary.rename(folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return folder


def refuse_existing(path: str | Path, *, force: bool = False) -> None:
    """`InputError` if something is already at `path`, unless `force` is set."""
    if not force and Path(path).exists():
        raise InputError(
            f"{path} already exists and would be overwritten; choose another name or pass force (--force)."
        )


@contextlib.contextmanager
def working_folder(folder: str | Path, request: Mapping[str, Any], *, keep: bool = False) -> Iterator[Path]:
    """A folder for the state of a run that `request` describes: made, or gone on with if it is of the same request.

    It goes at the end, unless `keep` is set; after an interruption it stays, and after an error of ours it goes if it is new.
    `InputError` if it holds anything else.
    """
    folder = Path(folder)
    note, text = folder / "request.json", json.dumps(request, indent=1, sort_keys=True)
    if folder.exists() and not (note.is_file() and note.read_text("utf-8") == text):
        raise InputError(f"{folder} is not the work of this call; remove it, or give another folder with --work.")
    fresh = not folder.exists()
    folder.mkdir(parents=True, exist_ok=True)
    note.write_text(text, "utf-8")
    try:
        yield folder
    except ManyheadsError:
        if fresh:
            shutil.rmtree(folder)
        raise
    if not keep:
        shutil.rmtree(folder)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
