"""Rotations in space, boxes, and rendered heads: against closed forms, Monte Carlo, finite differences and brute force."""

import math

import pytest
import torch

from manyheads.vision.core.boxes import box_iou, ciou, giou, matched_boxes, nms
from manyheads.vision.core.rotations import (
    euler_of_rotation,
    fisher_cross_entropy,
    fisher_entropy,
    fisher_log_c,
    fisher_log_normaliser,
    fisher_mean,
    fisher_mode,
    fisher_nll,
    geodesic,
    in_plane,
    random_rotations,
    rotation_of_euler,
    rotation_of_six,
    six_of_rotation,
)
from manyheads.vision.poses.head_mesh import random_look, render_head, z_buffer
from manyheads.vision.poses.scenes import head_scenes

G = torch.Generator


def test_angles_turn_the_nose_as_300w_lp_draws_it_and_come_back():
    nose = torch.tensor([0.0, 0.0, 1.0])
    up, left, roll = (rotation_of_euler(30.0 * one) for one in torch.eye(3))
    assert (up @ nose)[1] == pytest.approx(0.5, abs=1e-6) and (left @ nose)[0] == pytest.approx(-0.5, abs=1e-6)
    assert (roll @ torch.tensor([1.0, 0.0, 0.0]))[1] == pytest.approx(
        -0.5, abs=1e-6
    )  # clockwise: the right side goes down
    angles = (2 * torch.rand(500, 3, generator=G().manual_seed(0)) - 1) * torch.tensor([89.0, 179.0, 179.0])
    assert torch.allclose(euler_of_rotation(rotation_of_euler(angles)), angles, atol=1e-2)
    every = torch.cat(
        [random_rotations(500, G().manual_seed(1)), rotation_of_euler(torch.tensor([[20.0, 90.0, 30.0]]))]
    )
    assert geodesic(rotation_of_euler(euler_of_rotation(every)), every).max() < 0.1


def test_six_numbers_give_a_rotation_and_in_plane_turns_add_up():
    rotations = random_rotations(50, G().manual_seed(0))
    assert torch.allclose(rotation_of_six(3 * six_of_rotation(rotations)), rotations, atol=1e-5)
    some = rotation_of_six(torch.randn(50, 6, generator=G().manual_seed(2)))
    assert torch.allclose(torch.linalg.det(some), torch.ones(50), atol=1e-4)
    turn = in_plane(torch.tensor([40.0]))[0]
    assert geodesic(turn, torch.eye(3)) == pytest.approx(40, abs=1e-3) and (turn @ torch.tensor([1.0, 0, 0]))[1] > 0
    tiny = rotation_of_euler(torch.tensor([0.0, 0.01, 0.0]))
    assert geodesic(tiny, torch.eye(3)) == pytest.approx(0.01, rel=1e-2)  # an arc cosine would say 0


def test_the_normaliser_and_the_entropy_are_the_sheets_numbers():
    s = torch.tensor([[5.0, 4, 3], [3, 2, -1], [0, 0, 0]])
    log_c, d = fisher_log_c(s)
    assert torch.allclose(log_c, torch.tensor([7.3297, 1.4969, 0.0]).double(), atol=1e-3)
    assert torch.allclose(log_c - (s * d).sum(-1), torch.tensor([-3.1099, -0.9287, 0.0]).double(), atol=1e-3)


def test_monte_carlo_agrees_with_the_normaliser_the_mean_and_the_entropy():
    rotations = random_rotations(200_000, G().manual_seed(0)).double()
    a = torch.randn(3, 3, generator=G().manual_seed(3)).double()
    weight = (a * rotations).sum((-1, -2)).exp()
    assert fisher_log_normaliser(a) == pytest.approx(float(weight.mean().log()), abs=0.02)
    mean = (weight[:, None, None] * rotations).mean(0) / weight.mean()
    assert torch.allclose(fisher_mean(a), mean, atol=0.01)
    log_p = (a * rotations).sum((-1, -2)) - fisher_log_normaliser(a)
    assert fisher_entropy(a) == pytest.approx(-float((log_p.exp() * log_p).mean()), abs=0.02)
    assert (fisher_cross_entropy(a, a) - fisher_entropy(a)).abs() < 1e-9  # of a distribution under itself
    best = rotations[(a * rotations).sum((-1, -2)).argmax()]
    assert geodesic(fisher_mode(a), best) < 8 and torch.linalg.det(fisher_mode(-a)) == pytest.approx(1)


def test_gradients_are_right_where_singular_values_tie_and_a_sure_distribution_is_finite():
    for a in (3 * torch.eye(3), torch.diag(torch.tensor([2.0, 2.0, -2.0])), torch.zeros(3, 3)):
        assert torch.autograd.gradcheck(fisher_log_normaliser, (a.double().requires_grad_(),))
    sure = (1000 * rotation_of_euler(torch.tensor([10.0, 170.0, 5.0]))).requires_grad_()
    loss = fisher_nll(sure, rotation_of_euler(torch.tensor([10.0, 170.0, 5.0])), over=1.0)
    loss.backward()
    # near its mode c is that of a Gaussian: exp(3 k) (pi / k)^1.5 / (8 pi^2), with k = 1000
    assert float(loss.detach()) == pytest.approx(1.5 * math.log(math.pi / 1000) - math.log(8 * math.pi**2), abs=0.01)
    assert torch.isfinite(sure.grad).all()


def test_overlaps_are_those_of_counted_pixels_and_the_best_boxes_stay():
    g = G().manual_seed(0)
    low = torch.randint(0, 20, (2, 30, 2), generator=g)
    a, b = torch.cat([low, low + torch.randint(1, 20, (2, 30, 2), generator=g)], -1)

    def pixels(box):
        canvas = torch.zeros(40, 40, dtype=torch.bool)
        canvas[box[1] : box[3], box[0] : box[2]] = True
        return canvas

    iou = torch.tensor([[float((pixels(x) & pixels(y)).sum() / (pixels(x) | pixels(y)).sum()) for y in b] for x in a])
    assert torch.allclose(box_iou(a.float(), b.float()), iou, atol=1e-6)
    hull = (torch.maximum(a, b)[:, 2:] - torch.minimum(a, b)[:, :2]).prod(-1).float()
    union = torch.tensor([float((pixels(x) | pixels(y)).sum()) for x, y in zip(a, b, strict=True)])
    assert torch.allclose(giou(a.float(), b.float()), iou.diag() - (hull - union) / hull, atol=1e-6)
    same = torch.tensor([[0.0, 0, 10, 10]])
    assert ciou(same, same) == pytest.approx(1) and ciou(same, same + 5) < box_iou(same, same + 5)
    boxes = torch.tensor([[0.0, 0, 10, 10], [1, 0, 11, 10], [30, 30, 40, 40]])
    assert nms(boxes, torch.tensor([0.5, 0.9, 0.1])).tolist() == [1, 2]
    assert matched_boxes(boxes, torch.tensor([0.5, 0.9, 0.1]), boxes[:1]) == [(1, 0)]  # once, by the better one


def test_the_nearest_triangle_is_seen_and_only_from_outside():
    near, far = [[1.0, 1, 5], [1, 9, 5], [9, 1, 5]], [[0.0, 0, 1], [0, 12, 1], [12, 0, 1]]
    points = torch.tensor(near + far)
    which, depth = z_buffer(points, torch.tensor([[0, 1, 2], [3, 4, 5]]), 12)
    assert which[2, 2] == 0 and depth[2, 2] == 5 and which[0, 0] == 1 and which[11, 11] == -1
    assert z_buffer(points, torch.tensor([[2, 1, 0]]), 12)[0].max() == -1


@pytest.mark.parametrize("kind", ["balls", "heads"])
def test_a_scene_is_the_same_twice_and_its_boxes_hold_the_heads(kind):
    a, b = head_scenes(4, 7, kind=kind), head_scenes(4, 7, kind=kind)
    assert torch.equal(a.pixels, b.pixels) and torch.equal(a.boxes, b.boxes)
    assert (
        a.boxes.min() >= 0 and a.boxes.max() <= 128 and not torch.equal(a.pixels, head_scenes(4, 8, kind=kind).pixels)
    )
    assert geodesic(rotation_of_euler(a.angles), a.rotations).max() < 1e-2
    sides = a.boxes[:, 3] - a.boxes[:, 1]
    assert sides.max() <= 75


def test_a_head_that_is_turned_in_the_plane_gives_the_picture_turned():
    look, rotation = random_look(G().manual_seed(0)), rotation_of_euler(torch.tensor([10.0, 40.0, 0.0]))
    look = type(look)(
        look.person, look.skin, look.hair, look.light, 1.0
    )  # no shading: light does not turn with the head
    upright, turned = render_head(rotation, 64, look), render_head(in_plane(torch.tensor(90.0)) @ rotation, 64, look)
    assert (torch.rot90(upright, 1, (1, 2)) - turned).abs().mean() < 0.01
