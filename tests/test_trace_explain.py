from functools import lru_cache

import numpy as np
import pytest
from typer.testing import CliRunner

import manyheads as mh
from manyheads.cli import app
from manyheads.errors import InputError
from manyheads.lab.constructed import constructed
from manyheads.lab.words import WORDS
from manyheads.trace.circuits.circuit import Circuit
from manyheads.trace.explaining import ways
from manyheads.trace.explanation import explain

WHO = "When Rachel and Eric went to the garden, Rachel gave a camera to"
OTHER = "When Eva and Scott went to the garden, Mary gave a camera to"


@lru_cache
def ladon():
    return mh.open_model()


@lru_cache
def induction():
    """A planted induction circuit, a prompt `... a b ... a`, its twin with a elsewhere, and b."""
    given = constructed(seed=0, plant=["previous_token", "induction", "copying", "retrieval"])
    model = mh.open_model(given.module, tokenizer=given.tokenizer)
    words = [WORDS[int(i)] for i in np.random.default_rng(0).permutation(np.arange(5, 60))[:12]]
    other = list(words)
    other[3], other[7] = words[7], words[3]
    prompt, corrupted = (" ".join([*some, words[3]]) for some in (words, other))
    return model, given.known, prompt, corrupted, words[4], words[8]


def test_direct_parts_and_constants_sum_to_the_difference_and_sources_to_their_head():
    found = explain(ladon(), WHO, "Eric", "Rachel")
    assert sum(found.circuit.nodes.values()) + sum(found.constants.values()) == pytest.approx(
        found.difference, abs=1e-3
    )
    assert len(found.sources) == 8
    for head, values in found.sources.items():
        assert values.sum() == pytest.approx(found.circuit.nodes[head], abs=1e-4)
        assert len(values) == len(found.tokens)


def test_the_models_own_answer_is_explained_against_its_next_best():
    found = explain(ladon(), WHO)
    logits = ladon().logits(WHO)[0, -1]
    assert found.answer == " Eric" and found.probability > 0.5
    assert found.difference == pytest.approx(float(logits.topk(2).values.diff().abs()), abs=1e-4)


def test_an_answer_may_be_given_with_or_without_its_space():
    assert explain(ladon(), WHO, "Eric", " Rachel").answer == " Eric"


@pytest.mark.parametrize("method", ways())
def test_every_method_credits_the_planted_circuit_and_little_else(method):
    model, known, prompt, corrupted, answer, foil = induction()
    found = explain(model, prompt, answer, foil, method=method, corrupted=corrupted)
    scores = {str(h): found.heads[h] for h in model.heads}
    # gim: one gradient, and where attention is certain it has no slope by which the previous-token head could be seen
    assert np.isnan(found.heads.stderr).all(), "one prompt has no standard error"
    (induction_head,), (previous,) = known["induction"], known["previous_token"]
    wanted = {str(induction_head)} | (
        {str(previous)} if method not in ("direct", "ablation", "decomposition", "gim") else set()
    )
    for name in wanted:
        assert scores[name] > 0.5 * found.difference
    others = [abs(v) for name, v in scores.items() if name not in (str(induction_head), str(previous))]
    assert max(others) < 0.1 * found.difference


def test_the_edge_from_previous_token_to_induction_key_is_in_the_drawn_circuit():
    model, known, prompt, corrupted, answer, foil = induction()
    found = explain(model, prompt, answer, foil, method="edges", corrupted=corrupted)
    # gim: one gradient, and where attention is certain it has no slope by which the previous-token head could be seen
    (induction_head,), (previous,) = known["induction"], known["previous_token"]
    ranked = list(found.circuit.edges)
    assert (str(previous), f"{induction_head}.key") in ranked[:4]
    assert (str(induction_head), "logits") in ranked[:4]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (dict(prompt="Monday", answer="xyzzy"), "not one token"),
        (dict(prompt=" "), "prompt is empty"),
        (dict(prompt="Monday", method="guessing"), "no method 'guessing'"),
        (dict(prompt=WHO, answer="Eric", against="Eric"), "both"),
        (dict(prompt=WHO, corrupted="When Mary went"), "corrupted prompt has"),
        *[(dict(prompt=WHO, method=method), "--corrupted") for method, way in ways().items() if way.needs_twin],
    ],
)
def test_what_cannot_be_explained_is_refused_with_a_reason(arguments, message):
    with pytest.raises(InputError, match=message):
        explain(ladon(), **arguments)


def test_the_command_prints_and_writes_what_it_found(tmp_path):
    run = CliRunner().invoke(
        app,
        [
            "trace",
            "ladon",
            WHO,
            "--answer",
            "Eric",
            "--corrupted",
            OTHER,
            "--method",
            "edges",
            "--out",
            str(tmp_path / "t"),
        ],
    )
    assert run.exit_code == 0, run.output
    assert "·Eric rather than" in run.output
    circuit = Circuit.load(tmp_path / "t" / "circuit.json", fingerprint=ladon().fingerprint)
    assert circuit.kind == "edges" and circuit.connected() == circuit and len(circuit) > 10
    page = (tmp_path / "t" / "trace.html").read_text()
    assert "Why “Eric”?" in page and page.count("<path d=") >= len(circuit) and "<script>alert" not in page
    again = CliRunner().invoke(app, ["trace", "ladon", WHO, "--out", str(tmp_path / "t")])
    assert again.exit_code == 2 and "already exists" in again.output


def test_what_a_prompt_says_cannot_become_markup(tmp_path):
    found = explain(ladon(), "Remember <script>alert(1)</script> Monday Tuesday")
    text = found.report(tmp_path / "p.html").read_text()
    assert "<script>alert" not in text and "&lt;script&gt;" in text
    assert text.count("<details open><summary>How to read this</summary>") == 1 and "M5 the MLP of layer 5" in text
