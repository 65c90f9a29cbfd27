"""Writing files so that nothing is lost: into a temporary name first, then renamed; never over something by accident.

Whatever takes long and writes at the end calls `check_output` before it begins.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from manyheads.errors import InputError, ManyheadsError


def check_output(
    path: str | Path, *, force: bool = False, inputs: Iterable[str | Path] = (), folder: bool | None = None
) -> None:
    """Before the work begins: `InputError` if nothing can be written at `path`.

    Refused are what exists already (unless `force` is set), what is or holds one of the `inputs` or the current folder, what has
    a file or nothing writable where its folder should be, and names that are too long. With `folder` it must not be a file, with
    `folder=False` not a folder. Whether a folder can be written to is tried, by a temporary folder in it.
    """
    path = Path(path)
    try:
        refuse_existing(path, force=force)
        if path.name == "..":
            raise InputError(f"{path} names no new file or folder; choose another name.")
        if path.is_dir() and not path.is_symlink():
            for kept in (Path.cwd(), *map(Path, inputs)):
                if path.resolve() in (kept.resolve(), *kept.resolve().parents):
                    raise InputError(f"{path} is or holds {kept}, which would be lost; choose another name.")
        elif any(path.exists() and one.exists() and path.samefile(one) for one in map(Path, inputs)):
            raise InputError(f"{path} is one of the files to read, and would be lost; choose another name.")
        if folder is not None and path.exists() and path.is_dir() != folder:
            here, wanted = ("a file", "a folder") if folder else ("a folder", "a file")
            raise InputError(f"{path} is {here}, and {wanted} is to be written there; choose another name.")
        parent = path.absolute().parent
        while not os.path.lexists(parent):
            _temporary_name(parent)
            parent = parent.parent
        os.rmdir(tempfile.mkdtemp(dir=parent, prefix=_temporary_name(path)))
    except (OSError, ValueError) as error:
        if isinstance(error, InputError):
            raise
        raise InputError(f"cannot write {_shortened(path)}: {_reason(error)}; choose another name.") from None


def write_atomically(path: str | Path, write: Callable[[Path], object], *, force: bool = False) -> Path:
    """Call `write(temporary path)`, then rename it to `path`. `InputError` if `path` exists and `force` is not set.

    An interruption leaves either the old file or the new one, never half of one. Without `force` a file that another program
    writes there in the meantime stays, too.
    """
    path = Path(path)
    check_output(path, force=force, folder=False)
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=_temporary_name(path))
    os.close(handle)
    temporary = Path(name)
    try:
        with disk_errors(path):
            write(temporary)
        temporary.chmod(0o666 & ~_umask())
        if force or not _linked(temporary, path):
            temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
    return path


def write_folder_atomically(folder: str | Path, write: Callable[[Path], object], *, force: bool = False) -> Path:
    """Call `write(temporary folder)`, then rename it to `folder`; what was there (with `force`) goes only after that.

    What was there comes back if that fails. A process killed between the two renames leaves it beside, in `NAME.old.*`.
    """
    folder = Path(folder)
    check_output(folder, force=force, folder=True)
    folder.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(dir=folder.parent, prefix=_temporary_name(folder)))
    try:
        with disk_errors(folder):
            write(temporary)
        for path in (temporary, *temporary.rglob("*")):
            path.chmod((0o777 if path.is_dir() else 0o666) & ~_umask())
        if os.path.lexists(folder):
            refuse_existing(folder, force=force)  # once more: another program may have come first
            # No call that all systems have swaps two folders: for a moment there is none of this name.
            retired = Path(tempfile.mkdtemp(dir=folder.parent, prefix=f"{folder.name[:_KEPT]}.old.")) / folder.name
            try:
                folder.rename(retired)
                temporary.rename(folder)
            finally:
                if not os.path.lexists(folder):
                    retired.rename(folder)
                shutil.rmtree(retired.parent)
        else:
            temporary.rename(folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return folder


def refuse_existing(path: str | Path, *, force: bool = False) -> None:
    """`InputError` if something is already at `path`, a link to nothing included, unless `force` is set."""
    if not force and os.path.lexists(path):
        raise InputError(
            f"{path} already exists and would be overwritten; choose another name or pass force (--force)."
        )


@contextlib.contextmanager
def working_folder(
    folder: str | Path,
    request: Mapping[str, Any],
    *,
    keep: bool = False,
    advice: str = "remove it, or give another folder with --work",
) -> Iterator[Path]:
    """A folder for the state of a run that `request` describes: made, or gone on with if it is of the same request.

    It goes at the end, unless `keep` is set; after an interruption it stays, and after an error of ours it goes if it is new.
    `InputError` with `advice` if it holds anything else.
    """
    folder = Path(folder)
    note, text = folder / "request.json", json.dumps(request, indent=1, sort_keys=True)
    if os.path.lexists(folder) and not (note.is_file() and note.read_bytes() == text.encode()):
        raise InputError(f"{folder} is not the work of this call; {advice}.")
    fresh = not os.path.lexists(folder)
    check_output(folder, force=True, folder=True)
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


_KEPT = 50  # characters of a name that stand in the temporary one: of up to four bytes each, of the 255 a name may have


def _temporary_name(path: Path) -> str:
    """How the temporary name beside `path` begins. `OSError` if the name of `path` is too long for any file."""
    if len(os.fsencode(path.name)) > 255 or len(os.fsencode(path.absolute())) > 4000:
        raise OSError(errno.ENAMETOOLONG, os.strerror(errno.ENAMETOOLONG))
    return f".{path.name[:_KEPT]}."


def _linked(temporary: Path, path: Path) -> bool:
    """Give `temporary` the name `path` besides, unless something has it; False where the file system has no links."""
    try:
        os.link(temporary, path)
    except FileExistsError:
        refuse_existing(path)
    except OSError:
        return False
    return True


@contextlib.contextmanager
def disk_errors(path: Path) -> Iterator[None]:
    """What safetensors says of a full disk is an `OSError`, as from everybody else."""
    try:
        yield
    except SafetensorError as error:
        raise OSError(f"cannot write {path}: {error}") from error


def _reason(error: Exception) -> str:
    return getattr(error, "strerror", None) or " ".join(str(error).split())


def _shortened(path: Path) -> str:
    text = str(path)
    return repr(text) if len(text) <= 200 else f"{text[:50]!r}... ({len(text)} characters)"


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
