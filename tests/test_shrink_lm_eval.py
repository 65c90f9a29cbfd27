"""Other programs read what we make smaller: lm-evaluation-harness runs a task of ours on pruned checkpoints."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

import manyheads as mh
from manyheads.shrink import AMP
from manyheads.tasks import get_task

pytestmark = pytest.mark.slow
lm_eval = pytest.importorskip("lm_eval", reason="lm-eval comes with the extra `bench`")

ROWS = 24


@pytest.fixture(scope="module")
def rows() -> list[dict[str, Any]]:
    """Prompts with an answer and a foil, in turns the first and the second choice."""
    found = []
    for i, example in enumerate(get_task("ioi").examples(ROWS, 0, "test")):
        choices = [example.answer, example.foil]
        found.append({"prompt": example.prompt, "choices": choices[:: 1 if i % 2 else -1], "label": 1 - i % 2})
    return found


def accuracy_there(folder: Path, rows: list[dict[str, Any]], work: Path) -> float:
    """The share right as the harness counts it, from the checkpoint in `folder`."""
    data = work / "rows.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    task = {
        "task": "manyheads_ioi",
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(data)}},
        "test_split": "test",
        "output_type": "multiple_choice",
        "doc_to_text": "{{prompt}}",
        "doc_to_choice": "{{choices}}",
        "doc_to_target": "{{label}}",
        "target_delimiter": "",
        "metric_list": [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}],
    }
    given = f"pretrained={folder},dtype=float32"
    found = lm_eval.simple_evaluate(model="hf", model_args=given, tasks=[task], device="cpu", batch_size=4)
    return float(found["results"]["manyheads_ioi"]["acc,none"])


def accuracy_here(model: mh.HeadModel, rows: list[dict[str, Any]]) -> float:
    """The same from our logits: names are single tokens of ladon."""
    right = 0
    for row in rows:
        ids = [model.tokenizer(choice, add_special_tokens=False)["input_ids"] for choice in row["choices"]]
        assert all(len(one) == 1 for one in ids)
        logits = model.logits(row["prompt"])[0, -1]
        right += int(logits[[one[0] for one in ids]].argmax()) == row["label"]
    return right / len(rows)


@pytest.mark.parametrize("kind", ["whole", "uneven heads", "amp"])
def test_the_harness_counts_on_a_smaller_checkpoint_what_we_count(
    kind: str, rows: list[dict[str, Any]], tmp_path: Path
) -> None:
    ladon = mh.open_model()
    made = {
        "whole": lambda: ladon,
        "uneven heads": lambda: ladon.prune([(0, 1), (2, 3), (2, 5), (4, 0)]),
        "amp": lambda: AMP(ratio=0.1).convert(ladon),
    }[kind]()
    made.save_pretrained(tmp_path / "model", force=True)
    there = accuracy_there(tmp_path / "model", rows, tmp_path)
    assert there == pytest.approx(accuracy_here(made, rows))
    assert there > 0.8 or kind == "amp"
