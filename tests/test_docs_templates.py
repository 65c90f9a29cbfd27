"""The templates of docs/adding.md: each registers itself, and finds what is known to be there."""

from __future__ import annotations

import importlib.util
import re
import sys
from functools import cache
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch

import manyheads as mh
from manyheads.atlas.core import registry
from manyheads.lab.constructed import constructed
from manyheads.shrink.cache.press import CacheCall
from manyheads.shrink.shrinking import shrink_way
from manyheads.trace import explaining

PAGE = (Path(__file__).parents[1] / "docs" / "adding.md").read_text("utf-8")
TEMPLATES = dict(re.findall(r'```python title="([^"]+)"\n(.*?)```', PAGE, re.DOTALL))
ladon = cache(mh.open_model)


@pytest.fixture
def installed(tmp_path, monkeypatch):
    """A template as a file of its own, imported; what it registers is gone after the test."""
    monkeypatch.setattr(registry, "_FOUND", dict(registry.behaviours()))
    monkeypatch.setattr(explaining._WAYS, "_found", dict(explaining.ways()))
    monkeypatch.setattr(shrink_way.__globals__["_WAYS"], "_found", dict(shrink_way.__globals__["_WAYS"].all()))

    def install(name: str) -> ModuleType:
        (path,) = [path for path in TEMPLATES if Path(path).stem == name]
        file = tmp_path / Path(path).name
        file.write_text(TEMPLATES[path], "utf-8")
        spec = importlib.util.spec_from_file_location(f"template_{name}", file)
        module = importlib.util.module_from_spec(spec)
        monkeypatch.setitem(sys.modules, spec.name, module)
        spec.loader.exec_module(module)
        return module

    return install


def test_every_template_names_a_folder_of_the_package_and_no_file_that_exists():
    root = Path(__file__).parents[1]
    assert {Path(path).stem for path in TEMPLATES} == {"self_attention", "without", "key_norms"}
    assert all((root / path).parent.is_dir() and not (root / path).exists() for path in TEMPLATES)


@pytest.mark.parametrize("seed", range(3))
def test_the_behaviour_finds_exactly_the_planted_heads_that_look_at_their_own_token(installed, seed):
    made = installed("self_attention")
    built = constructed(seed=seed)
    model = mh.open_model(built.module, tokenizer=built.tokenizer)
    found = set(made.self_attention(model, n=4).above(0.4))
    assert found == {*built.known["successor"], *built.known["anti_copying"]}


def test_the_behaviour_is_part_of_the_survey(installed):
    installed("self_attention")
    atlas = mh.atlas.survey(ladon(), ["self_attention"], n=2, checks=False)
    assert list(atlas.scores) == ["self_attention"]


def test_the_explanation_says_what_running_without_the_head_loses(installed):
    installed("without")
    prompt = "When Rachel and Eric went to the garden, Rachel gave a camera to"
    found = mh.explain(ladon(), prompt, "Eric", "Rachel", method="without")
    best = found.to_frame().iloc[0]
    ids = [ladon().tokenizer(f" {name}").input_ids[-1] for name in ("Eric", "Rachel")]
    with ladon().editing(mh.Ablate([best["node"]], "zero")):
        logits = ladon().logits(prompt)[0, -1]
    assert best["score"] == pytest.approx(found.difference - float(logits[ids[0]] - logits[ids[1]]), abs=1e-4)


def test_the_press_keeps_the_shortest_keys_of_each_head_and_frees_the_rest(installed):
    made = installed("key_norms")
    press = shrink_way("key_norms")(0.5)
    assert isinstance(press, made.KeyNorms)
    text = "The red cat sat on the green mat. " * 6
    sizes = []
    for each in (made.KeyNorms(compression_ratio=0.0), press):
        with each(ladon()) as block, torch.inference_mode():
            ladon().generate(text, max_new_tokens=2)
            sizes.append(block.nbytes)
    assert 0.4 < sizes[1] / sizes[0] < 0.6
    keys = torch.randn(2, 3, 10, 4, generator=torch.Generator().manual_seed(0))
    held, tokens = torch.ones(2, 3, 10, dtype=torch.bool), torch.tensor([10, 10])
    kept = press.compress(CacheCall(None, keys, keys, keys, held, tokens))
    shortest = np.argsort(keys.norm(dim=-1).numpy(), -1)[..., :5]
    assert all(set(np.flatnonzero(kept[b, g])) == set(shortest[b, g]) for b in range(2) for g in range(3))
