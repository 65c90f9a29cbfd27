"""#73: the gradient and both references are exact, and descent goes where they say."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy.optimize import minimize
from torch.nn import functional as F

from manyheads.errors import InputError
from manyheads.lab.formation.token_selection import (
    GAP,
    Selections,
    cosine_to,
    digit_selections,
    least_nuclear,
    margins,
    nearest_above,
    random_selections,
    select_tokens,
    selection_gradient,
)


def loss(given, w):
    attention = torch.einsum("rntd,rde,rne->rnt", given.x, w, given.z).softmax(-1)
    f = torch.einsum("rnt,rntd,rd->rn", attention, given.x, given.v)
    return F.softplus(-given.y * f).mean(-1).sum()


@pytest.mark.parametrize("scale", [0.0, 1.0, 20.0])
def test_the_gradient_is_autograds_in_direction(scale):
    given = random_selections(3, seed=1)
    w = scale * torch.randn(3, 10, 10, dtype=torch.float64)
    w.requires_grad_()
    (expected,) = torch.autograd.grad(loss(given, w), w)
    expected = expected / torch.linalg.matrix_norm(expected)[:, None, None]
    torch.testing.assert_close(selection_gradient(given, w.detach()), expected, atol=1e-9, rtol=0)


def test_the_gradient_has_a_direction_where_float64_has_no_attention_left():
    given = random_selections(2, seed=1)
    w = torch.randn(2, 10, 10, dtype=torch.float64)
    far, farther = (selection_gradient(given, size * w) for size in (1e5, 2e5))
    torch.testing.assert_close(torch.linalg.matrix_norm(far), torch.ones(2, dtype=torch.float64))
    torch.testing.assert_close(far, farther)


def test_the_least_norm_is_what_slsqp_finds():
    given = random_selections(3, sequences=3, tokens=4, width=4, seed=2)
    for i, chosen in enumerate(select_tokens(given, steps=200).chosen):
        a = margins(given.x[i], given.z[i], chosen)
        w, u = nearest_above(a)
        other = minimize(
            lambda w: w @ w / 2,
            np.zeros(16),
            jac=lambda w: w,
            constraints={"type": "ineq", "fun": lambda w, a=a: a @ w - 1, "jac": lambda w, a=a: a},
            method="SLSQP",
            options={"maxiter": 500, "ftol": 1e-12},
        )
        np.testing.assert_allclose(w, other.x, atol=1e-5)
        assert (a @ w).min() > 1 - 1e-9 and (u >= 0).all()  # and the conditions of Karush, Kuhn and Tucker
        np.testing.assert_allclose(a.T @ u, w, atol=1e-9)
        assert abs(u @ (a @ w - 1)) < 1e-9


def test_the_nearest_point_to_a_start_leaves_what_holds_already():
    a = np.array([[1.0, 0.0], [0.0, 1.0]])
    np.testing.assert_allclose(nearest_above(a, np.array([3.0, 0.0]))[0], [3.0, 1.0], atol=1e-12)
    np.testing.assert_allclose(nearest_above(a, np.array([2.0, 5.0]))[0], [2.0, 5.0], atol=1e-12)


def test_one_constraint_has_the_closed_form_and_both_norms_agree_on_it():
    x, z = torch.randn(1, 2, 5, dtype=torch.float64), torch.randn(1, 5, dtype=torch.float64)
    a = margins(x, z, torch.tensor([1]))
    away = (x[0, 1] - x[0, 0]).numpy()
    expected = np.outer(away, z[0]) / (away @ away) / float(z[0] @ z[0])
    np.testing.assert_allclose(nearest_above(a)[0].reshape(5, 5), expected, atol=1e-9)
    w, gap = least_nuclear(a)
    np.testing.assert_allclose(w.reshape(5, 5), expected, atol=1e-6)
    assert gap < GAP


def test_the_least_nuclear_norm_is_known_where_one_direction_serves_two_constraints():
    """W_00 >= 1 and W_00 + 3 W_11 >= 1: one entry does it. Least norm of |W_00| + |W_11| under W_00 + 3 W_11 >= 1 alone: 1/3."""
    entries = np.array([[1.0, 0, 0, 0], [1.0, 0, 0, 3.0]])
    np.testing.assert_allclose(least_nuclear(entries)[0], [1, 0, 0, 0], atol=1e-3)
    w, _ = least_nuclear(entries[1:])
    np.testing.assert_allclose(w, [0, 0, 0, 1 / 3], atol=1e-3)
    np.testing.assert_allclose(nearest_above(entries[1:])[0], [0.1, 0, 0, 0.3], atol=1e-9)  # Frobenius: another one


def test_the_nuclear_solution_beats_every_other_feasible_matrix_tried():
    given = random_selections(1, seed=3)
    chosen = select_tokens(given, steps=300).chosen[0]
    a = margins(given.x[0], given.z[0], chosen)
    w, gap = least_nuclear(a)
    norm = np.linalg.norm(w.reshape(10, 10), "nuc")
    assert 0 <= gap < GAP and (a @ w).min() > 1 - 1e-9
    rng = np.random.default_rng(0)
    for size in (0.01, 0.1, 1.0):
        for _ in range(20):
            other, _ = nearest_above(a, w + size * rng.normal(size=100) / 10)
            assert np.linalg.norm(other.reshape(10, 10), "nuc") > norm * (1 - GAP)


def test_on_ten_problems_descent_selects_and_its_direction_is_the_support_vector_machines():
    """Attention above .99 and cosines above .99, ten problems, 2,000 steps; factored nearer to the nuclear solution."""
    given = random_selections(10)
    run, factored = select_tokens(given), select_tokens(given, factored=True)
    assert float(run.attention.min()) > 0.99 and float(factored.attention.min()) > 0.99
    assert cosine_to(given, run.w, run.chosen).min() > 0.99
    start = select_tokens(given, steps=1)
    assert cosine_to(given, start.w, run.chosen).max() < 0.9
    to_frobenius = cosine_to(given, factored.w, factored.chosen).mean()
    assert cosine_to(given, factored.w, factored.chosen, nuclear=True).mean() > to_frobenius + 0.05


def test_real_images_are_selected_in_the_same_way():
    pytest.importorskip("sklearn")
    given = digit_selections(2)
    run = select_tokens(given)
    assert float(run.attention.min()) > 0.99
    assert cosine_to(given, run.w, run.chosen).min() > 0.99
    assert set(given.y.unique().tolist()) <= {-1.0, 1.0}


def test_tokens_that_no_matrix_separates_are_refused():
    x = torch.ones(1, 2, 3, dtype=torch.float64)
    with pytest.raises(InputError, match="no W separates"):
        nearest_above(margins(x, torch.ones(1, 3, dtype=torch.float64), torch.tensor([0])))
    with pytest.raises(InputError):
        random_selections(1, tokens=1)


def test_the_score_of_a_token_is_what_it_adds_to_the_right_answer():
    given = Selections(
        *(torch.ones(s, dtype=torch.float64) for s in ((1, 2, 3, 4), (1, 2, 4), (1, 4))),
        torch.tensor([[1.0, -1]]).double(),
    )
    assert given.scores[0].tolist() == [[4.0] * 3, [-4.0] * 3]
