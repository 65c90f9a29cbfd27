"""Rows for unseen classes: from a graph that tells, not from a shuffled one, and what cannot be is refused."""

from dataclasses import replace

import numpy as np
import pytest

from manyheads.data.wordnet import NOUNS, word_kinds
from manyheads.errors import InputError
from manyheads.evaluation import experiment
from manyheads.judge.class_graph import zero_shot_head
from manyheads.judge.class_graph_claims import tree_of_classes


def test_the_tree_is_a_tree():
    means, edges = tree_of_classes(0)
    assert len(means) == 85 and len(edges) == 84 and sorted({a for a, _ in edges}) == list(range(84))
    siblings = np.linalg.norm(means[0] - means[1])
    assert siblings < np.linalg.norm(means[0] - means[20]) and siblings < np.linalg.norm(means[0] - means[63])


def test_a_graph_tells_of_unseen_classes_and_a_shuffled_one_does_not():
    tried = experiment("judge", "class-graph").run(seeds=range(2))
    values = tried.comparison.table.set_index(["method", "metric", "seed"])["value"]
    for seed in range(2):
        assert values["gcn", "zero-shot", seed] >= 3 / 16
        assert values["gcn", "zero-shot", seed] > 2 * values["gcn, edges shuffled", "zero-shot", seed]
        assert values["gcn", "zero-shot", seed] > 1.1 * values["mapping", "zero-shot", seed]


def test_vectors_that_tell_are_mapped_and_seen_rows_are_their_own():
    draw = np.random.default_rng(0)
    means = draw.normal(size=(30, 8)) * 3
    vectors = means @ draw.normal(size=(8, 8))  # a linear code of the means
    y = np.repeat(np.arange(24), 20)
    x = means[y] + draw.normal(size=(480, 8))
    head = zero_shot_head(x, y, vectors, way="mapping")
    direction = means - means[:24].mean(0)
    cosines = (head.rows * direction).sum(1) / np.linalg.norm(direction, axis=1)
    assert cosines[24:].min() > 0.8 and np.linalg.norm(head.rows, axis=1) == pytest.approx(1)
    own = x[y == 3].mean(0) - x.mean(0)
    assert head.rows[3] == pytest.approx(own / np.linalg.norm(own))
    test, labels = means[np.repeat(np.arange(30), 20)] + draw.normal(size=(600, 8)), np.repeat(np.arange(30), 20)
    judged = head.judged(test, labels)
    assert judged["zero-shot"] > 0.8
    assert judged["harmonic"] == pytest.approx(2 / (1 / judged["seen"] + 1 / judged["unseen"]))
    few = replace(head, classes=np.arange(28))
    assert not np.isin(few.predict(test), [28, 29]).any(), "nodes that are no classes are never named"
    held = replace(head, calibration=2.0).judged(test, labels)
    assert held["seen"] == 0 and held["unseen"] == pytest.approx(held["zero-shot"]) and held["harmonic"] == 0


def test_what_is_no_graph_of_classes_is_refused():
    x, y, v = np.random.default_rng(0).normal(size=(10, 4)), np.repeat([0, 1], 5), np.eye(3)
    for change, said in [
        ({"edges": ()}, "use way='mapping'"),
        ({"edges": [(0, 3)]}, "leads to no node"),
        ({"y": np.zeros(10, int)}, "two at least"),
        ({"classes": [0, 2]}, "are among them"),
        ({"y": np.repeat([0, 7], 5)}, "numbers of the 3 nodes"),
    ]:
        with pytest.raises(InputError, match=said):
            zero_shot_head(**({"x": x, "y": y, "vectors": v, "edges": [(0, 2)]} | change))
    with pytest.raises(InputError, match="of seen and of unseen"):
        zero_shot_head(x, y, v, [(0, 2)], length=2).judged(x, y)


def test_a_few_examples_are_weighed_against_what_the_graph_says():
    draw = np.random.default_rng(0)
    means, edges = tree_of_classes(0)
    seen = np.array([c for c in range(64) if c % 4])
    y = np.repeat(seen, 20)
    head = zero_shot_head(means[y] + draw.normal(size=(len(y), 32)), y, draw.normal(size=(85, 32)), edges, length=100)
    few, labels = means[[0, 0, 4]] + draw.normal(size=(3, 32)), np.array([0, 0, 4])
    alone, graph = head.with_examples(few, labels, 0.0), head.with_examples(few, labels, 1e6)
    own = few[:2].mean(0) - head.centre
    assert alone.rows[0] == pytest.approx(own / np.linalg.norm(own))
    assert graph.rows[0] == pytest.approx(head.rows[0], abs=1e-3) and (alone.rows[1] == head.rows[1]).all()
    both = head.with_examples(few, labels, 2.0).rows[0]
    halfway = own / np.linalg.norm(own) + head.rows[0]  # two examples, and a prior that counts as two
    assert both == pytest.approx(halfway / np.linalg.norm(halfway))
    with pytest.raises(InputError, match="no unseen class"):
        head.with_examples(few, np.array([0, 1, 4]))


def test_kinds_are_read_from_wordnets_own_form(tmp_path):
    nouns = tmp_path / "data.noun"
    nouns.write_text(
        "  1 This software and database is being provided to you\n"
        "00000100 03 n 02 pet 0 house_pet 0 001 ~ 00000200 n 0000 | kept\n"
        "00000200 05 n 01 dog 0 002 @ 00000100 n 0000 @ 00000300 n 0000 | barks\n"
        "00000300 05 n 01 animal 0 002 ~ 00000200 n 0000 ~ 00000400 n 0000 | lives\n"
        "00000400 05 n 01 tree_frog 0 003 @ 00000300 n 0000 + 00000900 a 0101 #p 00000500 n 0000 | climbs\n"
        "00000500 05 n 01 animal 0 000 | a person like one\n"
    )
    kinds = word_kinds("animal", nouns)
    assert kinds.names == ("animal", "dog", "tree frog") and kinds.leaves == (1, 2)
    assert sorted(kinds.edges) == [(1, 0), (2, 0)]
    for root, path, said in [("dog", nouns, "no noun 'dog' with kinds"), ("dog", tmp_path / "none", "wordnet-base")]:
        with pytest.raises(InputError, match=said):
            word_kinds(root, path)


@pytest.mark.slow
@pytest.mark.skipif(not NOUNS.is_file(), reason="needs WordNet's data.noun")
def test_wordnet_tells_of_animals_nobody_has_shown():
    tried = experiment("judge", "class-graph-words").run(seeds=range(2))
    values = tried.comparison.table.set_index(["method", "metric", "seed"])["value"]
    for seed in range(2):
        assert values["gcn", "zero-shot", seed] > max(3 / 60, 1.5 * values["gcn, edges shuffled", "zero-shot", seed])
