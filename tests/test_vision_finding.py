"""Detectors of boxes, the heads that help them learn, and how they are measured (#67)."""

import math
from dataclasses import replace

import pytest
import torch

from manyheads.errors import InputError
from manyheads.vision.core.boxes import box_iou
from manyheads.vision.core.precision import Boxes, average_precision
from manyheads.vision.finding.co_detr import (
    SIZES,
    TRAINING,
    CoDETR,
    anchors_of,
    assign,
    chosen_slots,
    load_detector,
    save_detector,
    train_co_detr,
)
from manyheads.vision.finding.detr import SmallDETR, shares, to_corners
from manyheads.vision.finding.scenes import BoxScenes, digit_scenes, shape_scenes


def boxes_of(*rows: tuple[float, float, float, float, int, float]) -> Boxes:
    table = torch.tensor(rows).reshape(-1, 6)
    return Boxes(table[:, :4], table[:, 4].long(), table[:, 5])


A, B, FAR = (0.0, 0.0, 10.0, 10.0), (20.0, 0.0, 30.0, 10.0), (50.0, 50.0, 60.0, 60.0)


def test_average_precision_is_that_of_cases_done_by_hand():
    truth = [boxes_of((*A, 0, 1), (*B, 0, 1))]

    def ap(*rows: tuple[float, float, float, float, int, float]) -> float:
        return average_precision([boxes_of(*rows)], truth)

    assert ap((*A, 0, 0.9), (*B, 0, 0.8)) == 1
    assert ap((*A, 0, 0.9), (*FAR, 0, 0.1)) == 0.5  # half is found, and what comes after costs nothing
    assert math.isclose(
        ap((*FAR, 0, 0.9), (*A, 0, 0.8), (*B, 0, 0.7)), 2 / 3, rel_tol=1e-6
    )  # precision 1/2, 2/3; falling
    assert math.isclose(
        ap((*A, 0, 0.9), (*A, 0, 0.8), (*B, 0, 0.7)), 0.5 + 0.5 * 2 / 3, rel_tol=1e-6
    )  # twice is wrong once
    assert ap((*A, 1, 0.9)) == 0 and ap() == 0  # another class; nothing
    two = [*truth, boxes_of((*A, 1, 1))]  # the mean over classes, not over boxes
    assert average_precision([boxes_of((*A, 0, 0.9), (*B, 0, 0.8)), boxes_of()], two) == 0.5


def test_scenes_have_exact_boxes_and_digits_of_the_two_parts_differ():
    scenes = shape_scenes(20, 0)
    counts = torch.bincount(scenes.scene, minlength=20)
    assert int(counts.max()) <= 10 and int(counts.min()) >= 1
    plain = shape_scenes(20, 0)
    assert torch.equal(plain.pixels, scenes.pixels) and not torch.equal(shape_scenes(20, 1).pixels, scenes.pixels)
    taken = scenes.take(torch.tensor([3, 3, 0]))
    assert torch.equal(taken.boxes[taken.scene == 1], scenes.boxes[scenes.scene == 3])
    assert len(digit_scenes(3, 0).names) == 10
    with pytest.raises(InputError, match="leaves its picture"):
        replace(scenes, boxes=scenes.boxes + 40)
    with pytest.raises(InputError, match="classes go from"):
        replace(scenes, classes=scenes.classes + 3)


def test_atss_takes_the_anchors_that_its_rule_written_out_takes():
    anchors, level = anchors_of(SIZES["ATSS"], 64)
    assert len(anchors) == 256 + 64
    boxes = shape_scenes(1, 4).boxes
    wanted = [set() for _ in boxes]
    for j, box in enumerate(boxes):
        candidates = []
        for one in (0, 1):
            mine = [i for i in range(len(anchors)) if level[i] == one]
            middles = (anchors[:, :2] + anchors[:, 2:]) / 2
            distance = (middles - (box[:2] + box[2:]) / 2).norm(dim=1)
            candidates += sorted(mine, key=lambda i: float(distance[i]))[:9]
        ious = [float(box_iou(anchors[i][None], box[None])) for i in candidates]
        mean = sum(ious) / len(ious)
        least = mean + math.sqrt(sum((v - mean) ** 2 for v in ious) / (len(ious) - 1))
        for i, iou in zip(candidates, ious, strict=True):
            x, y = ((anchors[i][:2] + anchors[i][2:]) / 2).tolist()
            if iou > least and box[0] < x < box[2] and box[1] < y < box[3]:
                wanted[j].add(i)
    owner = assign("ATSS", anchors, level, boxes)
    for i in range(len(anchors)):
        mine = [j for j in range(len(boxes)) if i in wanted[j]]
        best = max(mine, key=lambda j: float(box_iou(anchors[i][None], boxes[j][None])), default=-1)
        assert int(owner[i]) == best
    more = assign("overlap", *anchors_of(SIZES["overlap"], 64), boxes)
    assert set(more.tolist()) - {-1} == set(range(len(boxes)))  # each true box has at least one
    assert len(chosen_slots(torch.full((50,), -1), 30)) == 9 and len(chosen_slots(torch.zeros(50).long(), 30)) == 30


def test_without_heads_the_loss_and_its_gradients_are_the_plain_detectors_exactly():
    scenes = shape_scenes(4, 1)
    alone, wrapped = SmallDETR(3, width=32, seed=5), SmallDETR(3, width=32, seed=5)
    plain, none = alone.loss(scenes), CoDETR(wrapped, ()).loss(scenes)
    plain.backward()
    none.backward()
    assert torch.equal(plain, none)
    assert all(torch.equal(a.grad, b.grad) for a, b in zip(alone.parameters(), wrapped.parameters(), strict=True))
    # with heads the rest is added: L_enc as often as there are layers
    both = CoDETR(wrapped, ("ATSS",))
    torch.manual_seed(0)
    total = both.loss(scenes)
    torch.manual_seed(0)
    tokens = wrapped.encode(scenes.pixels)
    aux, enc = both.heads["ATSS"](wrapped, tokens, scenes, 30)
    assert torch.allclose(total, plain + aux + 2 * 2 * enc)


def test_what_a_helped_detector_answers_is_bit_identical_after_its_helpers_are_gone(tmp_path):
    scenes = shape_scenes(8, 2)
    detector = SmallDETR(3, width=32, seed=0)
    helped = CoDETR(detector)
    before = [p.clone() for p in detector.parameters()]
    optimizer = torch.optim.AdamW(helped.parameters(), 1e-3)
    losses = []
    for _ in range(3):
        optimizer.zero_grad()
        loss = helped.loss(scenes)
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert all(p.grad is not None and bool(p.grad.abs().sum() > 0) for p in helped.heads.parameters())
    assert losses[-1] < losses[0] and any(
        not torch.equal(a, b) for a, b in zip(before, detector.parameters(), strict=True)
    )
    with torch.no_grad():
        answer = helped.eval().detector(scenes.pixels)[-1]
        save_detector(detector, scenes.names, tmp_path / "kept", {})
        again, card = load_detector(tmp_path / "kept")
        assert not any("heads" in name for name in again.state_dict()) and card.about["names"] == list(scenes.names)
        assert all(torch.equal(a, b) for a, b in zip(answer, again(scenes.pixels)[-1], strict=True))


def test_the_queries_of_a_head_see_neither_the_detectors_own_nor_empty_slots():
    detector = SmallDETR(3, width=32, seed=0).eval()
    tokens = detector.encode(shape_scenes(1, 3).pixels)
    boxes, content = torch.rand(1, 5, 4) * 0.5 + 0.2, torch.randn(1, 5, 32)
    none = torch.tensor([[False, False, False, True, True]])
    full = detector.decode(tokens, boxes, content, content, none)[-1]
    cut = detector.decode(tokens, boxes[:, :3], content[:, :3], content[:, :3])[-1]
    assert torch.allclose(full[0][:, :3], cut[0], atol=1e-5) and torch.allclose(full[1][:, :3], cut[1], atol=1e-5)


def test_a_detector_learns_two_scenes_by_heart():
    scenes = shape_scenes(2, 7)
    start = SmallDETR(3, width=32, seed=0)
    model = train_co_detr(scenes, replace(TRAINING, steps=120, rows=2, warmup=10, rate=3e-3), model=start)
    truth = [Boxes(scenes.boxes[scenes.scene == i], scenes.classes[scenes.scene == i], torch.ones(0)) for i in range(2)]
    assert average_precision(model.detect(scenes.pixels), truth) > 0.6
    assert torch.allclose(to_corners(shares(scenes)) * 64, scenes.boxes, atol=1e-4)
    with pytest.raises(InputError, match="knows 4 classes"):
        train_co_detr(scenes, model=SmallDETR(4))
    with pytest.raises(InputError, match="no boxes"):
        train_co_detr(BoxScenes(scenes.pixels, torch.zeros(0).long(), torch.zeros(0, 4), torch.zeros(0).long(), ("a",)))
