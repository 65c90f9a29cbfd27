"""What somebody points at (#2): rays, scenes, the loss and the ensemble's rule against what is written out by hand."""

import math
from dataclasses import replace

import pytest
import torch
from torch.nn import functional as F

from manyheads.errors import InputError
from manyheads.vision.finding.pointing import (
    TRAINING,
    Pointer,
    PointingEnsemble,
    agreements,
    load_pointer,
    ray_heat,
    save_pointer,
    train_pointer,
)
from manyheads.vision.finding.pointing_claims import centre_error, judged_right
from manyheads.vision.finding.pointing_scenes import ColourJudge, Pointed, pointed_shapes
from manyheads.vision.finding.seeing_pointing import draw_pointing

SCENES = pointed_shapes(60, 0)


def test_a_ray_is_one_on_its_axis_and_falls_to_a_known_share_and_is_nothing_behind_the_fingertip():
    origin, tip = torch.tensor([[10.5, 20.5], [30.5, 40.5]]), torch.tensor([[20.5, 20.5], [30.5, 30.5]])
    heat = ray_heat(origin, tip, 64, 4.0)  # one to the right along row 20, one upwards along column 30
    assert torch.equal(heat[0, 20, 20:], torch.ones(44)) and torch.equal(heat[1, :31, 30], torch.ones(31))
    assert float(heat[0, 24, 50]) == pytest.approx(0.607, abs=0.005) == pytest.approx(float(heat[1, 5, 26]), abs=0.005)
    assert not heat[0, :, :20].any() and not heat[1, 31:].any()
    slanted = ray_heat(torch.tensor([[0.5, 0.5]]), torch.tensor([[10.5, 10.5]]), 64, 3.0)[0]
    for row, column in ((10, 10), (40, 40), (30, 33), (9, 9), (5, 30)):
        along = ((row - 10) + (column - 10)) / math.sqrt(2)
        apart = abs(row - column) / math.sqrt(2)
        wanted = math.exp(-(apart**2) / 18) if along >= 0 else 0.0
        assert float(slanted[row, column]) == pytest.approx(wanted, abs=1e-5)
    with pytest.raises(InputError, match="apart from its origin"):
        ray_heat(origin, origin, 64, 4.0)


def test_what_is_meant_lies_on_one_of_the_two_lines_in_the_shares_that_are_said():
    middles = (SCENES.boxes[:, :2] + SCENES.boxes[:, 2:]) / 2
    tip, apart = SCENES.points[:, 2], []
    for origin in (SCENES.points[:, 0], SCENES.points[:, 1]):
        u = F.normalize(tip - origin, dim=-1)
        along = ((middles - tip) * u).sum(-1)
        apart.append(((middles - tip) - along[:, None] * u).norm(dim=-1) + 1000 * (along < 0))
    distance = torch.stack(apart)
    assert float(distance.min(0).values.max()) < 3.5
    assert 0.35 < float((distance[0] < distance[1]).float().mean()) < 0.85  # four deviations of 60 draws
    judge = ColourJudge(1.0)
    assert float(agreements(SCENES.boxes, SCENES, judge).mean()) == 1  # the box has the colour that is said
    often = agreements(SCENES.boxes.repeat(20, 1)[: 60 * 20], replace_many(20), ColourJudge(0.75, seed=1))
    assert float(often.mean()) == pytest.approx(0.75, abs=0.04)
    assert not torch.equal(pointed_shapes(2, 0, "test").pixels, SCENES.pixels[:2])


def replace_many(times: int) -> Pointed:
    """The scenes, `times` over."""
    return Pointed(
        SCENES.pixels.repeat(times, 1, 1, 1),
        SCENES.phrases * times,
        SCENES.points.repeat(times, 1, 1),
        SCENES.boxes.repeat(times, 1),
    )


def test_the_loss_is_that_of_the_best_query_written_out_and_the_centre_head_adds_its_own_part():
    given = Pointer("wrist", ("the", "square"), width=32, depth=1, seed=2)
    plain = Pointer("wrist", ("the", "square"), centre=False, width=32, depth=1, seed=2)
    state = {name: value for name, value in given.state_dict().items() if not name.startswith("centre")}
    assert all(torch.equal(value, state[name]) for name, value in plain.state_dict().items())
    few = slice(0, 3)
    words = given.vocabulary.numbers(SCENES.phrases[few])
    call = {
        "pixels": SCENES.pixels[few],
        "words": words,
        "points": SCENES.points[few],
        "boxes": SCENES.boxes[few],
    }
    heat = ray_heat(SCENES.points[few, 1], SCENES.points[few, 2], 64, 4.0)
    found = given(SCENES.pixels[few], heat, words)
    total, centres = 0.0, 0.0
    for i in range(3):
        x0, y0, x1, y1 = (SCENES.boxes[i] / 64).tolist()
        goal = [(x0 + x1) / 2, (y0 + y1) / 2, x1 - x0, y1 - y0]
        way = (SCENES.points[i, 2] - SCENES.points[i, 1]).tolist()
        way = [one / math.hypot(*way) for one in way]
        costs = []
        for q in range(64):
            b = found["boxes"][i, q].tolist()
            l1 = sum(abs(one - two) for one, two in zip(b, goal, strict=True))
            a = [b[0] - b[2] / 2, b[1] - b[3] / 2, b[0] + b[2] / 2, b[1] + b[3] / 2]
            inner = max(min(a[2], x1) - max(a[0], x0), 0) * max(min(a[3], y1) - max(a[1], y0), 0)
            union = b[2] * b[3] + goal[2] * goal[3] - inner
            hull = (max(a[2], x1) - min(a[0], x0)) * (max(a[3], y1) - min(a[1], y0))
            costs.append(5 * l1 + 2 * (1 - (inner / union - (hull - union) / hull)))
        p = found["scores"][i].sigmoid().tolist()
        best = min(range(64), key=lambda q: costs[q] - p[q])
        bce = -sum(math.log(p[q] if q == best else 1 - p[q]) for q in range(64))
        vector = found["vectors"][i].tolist()
        total += costs[best] + bce + sum(abs(one - two) for one, two in zip(vector, way, strict=True))
        c = found["centres"][i].tolist()
        centres += 5 * (abs(c[0] - goal[0]) + abs(c[1] - goal[1]))
    assert float(plain.loss(**call).detach()) == pytest.approx(total / 3, rel=1e-4)
    assert float(given.loss(**call).detach()) == pytest.approx((total + centres) / 3, rel=1e-4)


def test_the_rule_takes_the_higher_sum_of_z_scores_and_believes_clip_less_about_small_boxes():
    pair = [Pointer(line, ("the",), width=16, depth=1) for line in ("head", "wrist")]
    both = PointingEnsemble(*pair, scores=((0.5, 0.1), (0.4, 0.2)), agreements=(0.5, 0.5), weight=1.0)
    large, small = torch.tensor([0.0, 0, 20, 20]), torch.tensor([0.0, 0, 6, 6])  # 36 of 4096 pixels are under 1 %
    scores = torch.tensor([[0.65, 0.65, 0.5], [0.4, 0.4, 0.4]])  # z: 1.5, 1.5, 0 beside 0
    agreed = torch.tensor([[0.0, 0.0, 0.5], [1.0, 1.0, 0.5]])  # z: -1, -1, 0 beside 1, 1, 0
    boxes = torch.stack([large, small, large]).expand(2, 3, 4)
    # .5 < 1: the wrist; with half the weight 1 > .5: the head; a tie: the head
    assert both.rule(scores, agreed, boxes, 64).tolist() == [1, 0, 0]
    with pytest.raises(InputError, match="give head, then wrist"):
        PointingEnsemble.fitted(*pair[::-1], SCENES, ColourJudge())


def test_a_network_learns_scenes_by_heart_and_the_ensemble_believes_the_judge_where_lines_differ(tmp_path):
    rows = torch.arange(6)
    kept = Pointed(SCENES.pixels[rows], SCENES.phrases[:6], SCENES.points[rows], SCENES.boxes[rows])
    settings = replace(TRAINING, steps=80, rows=6, warmup=10, rate=4e-3)
    start = Pointer("head", ("the", "square", "circle", "triangle"), width=32, depth=1, seed=0)
    head = train_pointer(kept, "head", settings, model=start)
    assert float(judged_right(head.best(kept).boxes, kept).mean()) >= 0.8
    assert float(centre_error(head.best(kept).boxes, kept)) < 6
    wrist = Pointer("wrist", ("the",), width=32, depth=1, seed=1)  # knows nothing
    judge = ColourJudge(1.0)
    both = PointingEnsemble.fitted(head, wrist, kept, judge, weight=2.0)
    which, boxes = both.choose(kept, judge)
    assert float(judged_right(boxes, kept).mean()) >= 0.6 and boxes.shape == (6, 4)
    assert torch.equal(boxes[which == 0], head.best(kept).boxes[which == 0])
    save_pointer(head, tmp_path / "head", {})
    again, card = load_pointer(tmp_path / "head")
    assert again.line == "head" and card.method == "CAPE"
    assert torch.equal(again.best(kept).boxes, head.best(kept).boxes)
    with pytest.raises(InputError, match="for the line of the head"):
        train_pointer(kept, "wrist", settings, model=start)


def test_wrong_scenes_are_refused():
    with pytest.raises(InputError, match="a fingertip lies within a pixel"):
        replace(SCENES, points=SCENES.points * 0 + 5)
    with pytest.raises(InputError, match="leaves its picture"):
        replace(SCENES, boxes=SCENES.boxes + 60)
    with pytest.raises(InputError, match="phrases, points"):
        replace(SCENES, phrases=SCENES.phrases[1:])
    with pytest.raises(InputError, match="line is"):
        Pointer("nose", ("the",))


def test_the_box_that_is_believed_is_drawn_in_white():
    few = Pointed(SCENES.pixels[:2], SCENES.phrases[:2], SCENES.points[:2], SCENES.boxes[:2])
    pair = [Pointer(line, ("the",), width=16, depth=1, seed=3) for line in ("head", "wrist")]
    both = PointingEnsemble(*pair, scores=((0.0, 1.0), (0.0, 1.0)), agreements=(0.0, 1.0), weight=0.0)
    boxes = both.choose(few, ColourJudge())[1]
    for i, drawn in enumerate(draw_pointing(both, few, ColourJudge(), larger=4)):
        left, top, right, bottom = (4 * boxes[i]).round().int().tolist()
        assert drawn.shape == (256, 256, 3)
        corner = drawn[min(max(top - 2, 0), 255), min(max((left + right) // 2, 0), 255)]
        assert top < 2 or corner.tolist() == [1, 1, 1]
        assert bottom > 254 or drawn[bottom, (left + right) // 2].min() > 0.99
