"""Heads and the way they look (#5), and poses from few labels (#102)."""

from dataclasses import replace

import pytest
import torch

from manyheads.errors import InputError
from manyheads.evaluation.experiment import experiment
from manyheads.vision import predictor
from manyheads.vision.core.boxes import box_iou
from manyheads.vision.core.rotations import (
    fisher_entropy,
    fisher_mode,
    geodesic,
    in_plane,
    random_rotations,
)
from manyheads.vision.poses.direct_mhp import (
    ANCHORS,
    STRIDES,
    TRAINING,
    DirectMHP,
    Heads,
    angle_targets,
    angles_of,
    load_direct_mhp,
    positives,
    save_direct_mhp,
    train_direct_mhp,
    yaw_error,
)
from manyheads.vision.poses.direct_mhp_claims import pose_errors
from manyheads.vision.poses.scenes import head_scenes
from manyheads.vision.poses.semi_uhpe import (
    UNLABELLED,
    FisherNet,
    entropy_quantile,
    rolled_pictures,
    square_crop,
    train_labelled,
    train_semi_uhpe,
)
from manyheads.vision.poses.semi_uhpe_claims import partly_labelled, point_cloud, render_points

G = torch.Generator


def test_yaw_goes_over_the_circle_and_angles_come_back():
    assert yaw_error(torch.tensor(179.0), torch.tensor(-179.0)) == 2
    angles = torch.tensor([[-80.0, 179.0, 30.0], [0.0, 0.0, 0.0]])
    assert torch.allclose(angles_of(torch.logit(angle_targets(angles))), angles, atol=1e-3)


def test_tau_is_compared_with_the_raw_logit_as_released_or_with_the_probability():
    raw, wanted = torch.zeros(1, 3), torch.ones(1, 3)
    released, read = DirectMHP(), DirectMHP(tau_on="probability")
    assert released.angle_loss(torch.tensor([0.3]), raw, wanted) == 0  # a probability of .574
    assert read.angle_loss(torch.tensor([0.3]), raw, wanted) > 0
    assert read.angle_loss(torch.tensor([-0.5]), raw, wanted) == 0  # .378
    # the unsquared length of the vector of three, not a mean of squares
    assert released.angle_loss(torch.tensor([0.5]), raw, wanted) == pytest.approx(0.75**0.5)


def test_the_cells_that_should_find_a_head_can_say_its_box_exactly():
    boxes = torch.tensor([[30.0, 40.0, 62.0, 75.0], [0.0, 0.0, 24.0, 26.0]])
    for level, stride in enumerate(STRIDES):
        head, anchor, row, column = positives(boxes, level, (128 // stride, 128 // stride))
        cells = {(int(r), int(c)) for h, r, c in zip(head, row, column, strict=True) if h == 0}
        own = (int(57.5 // stride), int(46 // stride))
        assert own in cells and len(cells) == 3 and set(anchor[head == 0].tolist()) == {0, 1, 2}
        middle = (boxes[head, :2] + boxes[head, 2:]) / 2 / stride - torch.stack([column, row], -1)
        assert middle.min() >= -0.5 and middle.max() <= 1.5  # the range of 2 sig - .5
        ratio = (boxes[head, 2:] - boxes[head, :2]) / torch.tensor(ANCHORS[level])[anchor]
        assert ratio.max() < 4
    narrow = torch.tensor([[10.0, 10.0, 14.0, 90.0]])  # five times narrower than any anchor of the first level
    assert len(positives(narrow, 0, (16, 16))[0]) == 0


def test_errors_count_each_head_once_and_say_what_a_constant_would_do():
    scenes = head_scenes(6, 1)
    exact = [
        Heads(scenes.boxes[scene], torch.ones(int(scene.sum())), scenes.angles[scene])
        for scene in (scenes.scene == i for i in range(6))
    ]
    found = pose_errors(exact, scenes, 0.5)
    assert found["F1"] == 1 and found["yaw MAE"] == 0 and found["geodesic"] < 1e-3
    twice = [Heads(h.boxes.repeat(2, 1), h.scores.repeat(2), h.angles.repeat(2, 1)) for h in exact]
    assert pose_errors(twice, scenes, 0.5)["precision"] == 0.5
    assert pose_errors(exact, scenes, 1.5)["F1"] == 0


def test_a_detector_learns_four_scenes_by_heart_and_is_the_same_after_saving(tmp_path):
    scenes = head_scenes(4, 8, most=1, sides=(26, 40))
    settings = replace(TRAINING, steps=300, rows=4, rate=5e-3, precision="fp32")
    model = train_direct_mhp(scenes, settings, model=DirectMHP(8))
    found = pose_errors(model.detect(scenes.pixels), scenes, 0.3)
    assert found["F1"] > 0.85 and found["yaw MAE"] < 30 < found["constant yaw"]
    save_direct_mhp(model, tmp_path / "heads", {})
    again, card = load_direct_mhp(tmp_path / "heads")
    assert card.method == "DirectMHP"
    before, after = model.detect(scenes.pixels)[0], again.detect(scenes.pixels)[0]
    assert torch.allclose(before.boxes[:1], after.boxes[:1], atol=0.5)
    seen = predictor("head-pose", tmp_path / "heads")(scenes.pixels[0].permute(1, 2, 0).double().numpy())
    overlap = box_iou(torch.tensor([row["box"] for row in seen.rows]), scenes.boxes[:1])
    assert overlap.max() > 0.5 and seen.drawn.shape == (128, 128, 3)
    with pytest.raises(InputError, match="give their folder"):
        predictor("head-pose")
    with pytest.raises(InputError, match="tau_on"):
        DirectMHP(tau_on="both")


@pytest.mark.parametrize("degrees", [20.0, -75.0])
def test_turning_a_picture_is_turning_the_rotation(degrees):
    """The rotation is read off the pictures themselves: of 3 degrees around, the render that is most like the turned picture."""
    points, colours = point_cloud(G().manual_seed(0))
    rotation = random_rotations(1, G().manual_seed(1))
    picture = render_points((rotation @ points.T).mT, colours[None], 96)
    seen = rolled_pictures(picture, torch.tensor([degrees]))
    tries = in_plane(torch.arange(degrees - 3, degrees + 3.01, 0.25)) @ rotation
    renders = render_points((tries @ points.T).mT, colours.expand(len(tries), -1, -1), 96)
    best = tries[(renders - seen).square().mean((1, 2, 3)).argmin()]
    assert geodesic(best, (in_plane(torch.tensor([degrees])) @ rotation)[0]) < 1
    a = torch.randn(3, 3, generator=G().manual_seed(2))  # a teacher's answer: its mode turns with M, its entropy stays
    m = in_plane(torch.tensor(degrees))
    assert geodesic(fisher_mode(m @ a), m @ fisher_mode(a)) < 0.1
    assert fisher_entropy(m @ a) == pytest.approx(float(fisher_entropy(a)), abs=1e-4)


def test_the_quantile_keeps_the_share_and_crops_are_never_stretched():
    entropies = torch.randn(5000, generator=G().manual_seed(0))
    assert float((entropies < entropy_quantile(entropies, 0.75)).float().mean()) == pytest.approx(0.75, abs=0.01)
    picture = torch.zeros(3, 60, 100)
    picture[:, 20:40, 30:50] = 1  # a square of 20 pixels stays one, also at the edge of the picture
    crop = square_crop(picture, torch.tensor([20.0, 20.0, 60.0, 40.0]), 39, margin=0.15)  # 39 pixels a side
    assert crop[0].sum() == pytest.approx(400, rel=0.05)
    assert abs(int((crop[0] > 0.5).any(0).sum()) - 20) <= 1 and abs(int((crop[0] > 0.5).any(1).sum()) - 20) <= 1


def test_a_teacher_that_follows_keeps_its_share_and_a_fixed_threshold_does_not():
    data = partly_labelled(40, 200, 0)
    with pytest.raises(InputError, match="one for each"):
        train_labelled(data.pixels, data.rotations[:5])
    settings = replace(UNLABELLED, steps=20, rows=8)
    network = train_labelled(data.pixels, data.rotations, settings, network=FisherNet(8))
    moving = train_semi_uhpe(data.pixels, data.rotations, data.unlabelled, settings, network=network, period=20)
    fixed = train_semi_uhpe(
        data.pixels, data.rotations, data.unlabelled, settings, network=network, threshold="fixed", start=-5.3
    )
    assert float(moving.kept.float().mean()) == pytest.approx(0.75, abs=0.01) and fixed.tau == pytest.approx(-5.3)
    assert float(fixed.kept.float().mean()) < 0.2
    assert not torch.equal(moving.network.head[-1].weight, network.head[-1].weight)  # and the given one stays as it was


@pytest.mark.parametrize("name", ["head-pose", "semi-head-pose"])
def test_the_experiments_run(name):
    one = experiment("vision", name)
    tried = one.run(seeds=(0,), quick=True)
    assert len(tried.verdicts) == len(one.claims)
