"""Calibration: ECE and MCE by hand, and the temperature that made the labels is found again."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from manyheads.errors import InputError
from manyheads.evaluation.calibration import calibration, fit_temperature


def drawn(n, temperature, seed=0, classes=4):
    """Logits, and labels drawn from softmax(logits / temperature)."""
    rng = np.random.default_rng(seed)
    logits = 3 * rng.standard_normal((n, classes))
    p = np.exp(logits / temperature)
    p /= p.sum(1, keepdims=True)
    return logits, (rng.random((n, 1)) > p.cumsum(1)).sum(1).clip(0, classes - 1)


def test_ece_and_mce_of_a_case_by_hand():
    p = np.array([[0.9, 0.1], [0.9, 0.1], [0.7, 0.3], [0.6, 0.4]])
    found = calibration(np.log(p), np.array([0, 1, 0, 0]), bins=10)
    # 0.9: two rows, half right, gap 0.4. 0.7: right, gap 0.3. 0.6: right, gap 0.4.
    assert found.ece == pytest.approx((2 * 0.4 + 0.3 + 0.4) / 4)
    assert found.mce == pytest.approx(0.4)
    assert found.accuracy == 0.75
    assert found.nll == pytest.approx(-np.log([0.9, 0.1, 0.7, 0.6]).mean())


@pytest.mark.parametrize("temperature", [0.4, 1.0, 3.0])
def test_the_temperature_that_made_the_labels_is_found_and_calibrates(temperature):
    logits, labels = drawn(20_000, temperature)
    found = fit_temperature(logits, labels)
    assert found == pytest.approx(temperature, rel=0.05)
    assert calibration(logits, labels, temperature=found).ece < 0.01
    if temperature != 1.0:
        assert calibration(logits, labels).ece > 0.05


@settings(max_examples=30)
@given(st.integers(0, 10**6), st.integers(1, 40), st.floats(0.2, 5.0))
def test_no_temperature_has_less_loss_and_none_changes_the_accuracy(seed, n, other):
    logits, labels = drawn(n, 2.0, seed)
    best = calibration(logits, labels, temperature=fit_temperature(logits, labels))
    tried = calibration(logits, labels, temperature=other)
    assert best.nll <= tried.nll + 1e-6
    assert best.accuracy == tried.accuracy
    assert 0 <= tried.ece <= tried.mce <= 1


@pytest.mark.usefixtures("any_shape")
def test_what_cannot_be_calibrated_is_refused():
    logits, labels = drawn(5, 1.0)
    with pytest.raises(InputError, match="do not fit"):
        calibration(logits, labels[:3])
    with pytest.raises(InputError, match="there are classes 0 to 3"):
        calibration(logits, labels + 4)
    with pytest.raises(InputError, match="NaN"):
        fit_temperature(np.full((5, 4), np.nan), labels)
    with pytest.raises(InputError, match="N >= 1"):
        calibration(logits[:0], labels[:0])
