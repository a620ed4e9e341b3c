"""symptoms(): known answers."""

from __future__ import annotations

import math

import pytest
import torch

from tfqc.temporal.disturbance import symptoms

EYE = torch.eye(4)[:, None]  # 4 steps, 1 request, 4 values: all features orthogonal


def test_equal_is_undisturbed() -> None:
    found = symptoms(EYE, EYE.clone())
    assert found.cosine == (1, 1, 1, 1)
    assert found.relative_l2 == (0, 0, 0, 0)
    assert found.mismatch == (0, 0, 0, 0)


def test_scaling_is_no_change_of_direction() -> None:
    found = symptoms(EYE, 3 * EYE)
    assert found.cosine == (1, 1, 1, 1)
    assert found.relative_l2 == (2, 2, 2, 2)
    assert found.mismatch == (0, 0, 0, 0)


def test_mismatch_counts_positions_of_the_schedule() -> None:
    """Step 0 looks like step 2, step 3 like step 1."""
    found = symptoms(EYE, EYE[[2, 1, 2, 1]])
    assert found.mismatch == (2, 0, 0, -2)
    assert found.cosine == (0, 1, 1, 0)
    assert found.relative_l2 == pytest.approx((math.sqrt(2), 0, 0, math.sqrt(2)))


def test_a_tie_with_itself_is_no_mismatch() -> None:
    assert symptoms(torch.ones(3, 1, 2), torch.ones(3, 1, 2)).mismatch == (0, 0, 0)


def test_known_angle() -> None:
    exact = torch.tensor([[[1.0, 0.0]], [[0.0, 1.0]]])
    wrong = torch.tensor([[[1.0, 1.0]], [[1.0, 2.0]]])
    found = symptoms(exact, wrong)
    assert found.cosine == pytest.approx((math.sqrt(0.5), 2 / math.sqrt(5)))
    assert found.relative_l2 == pytest.approx((1, math.sqrt(2)))


def test_means_over_requests() -> None:
    exact = torch.tensor([[[1.0, 0.0], [1.0, 0.0]]])
    assert symptoms(exact, torch.tensor([[[1.0, 0.0], [0.0, 1.0]]])).cosine == (0.5,)


def test_zero_features_give_numbers() -> None:
    found = symptoms(torch.zeros(2, 1, 3), torch.zeros(2, 1, 3))
    assert all(math.isfinite(v) for v in (*found.cosine, *found.relative_l2))


def test_small_disturbance_is_seen_in_double_precision() -> None:
    """At 8 bits, 1 − cos is near 1e-6, and rounding in float32 is near 1e-7."""
    exact = torch.randn(1, 1, 1000, generator=torch.Generator().manual_seed(0))
    orthogonal = torch.randn(1, 1, 1000, generator=torch.Generator().manual_seed(1))
    orthogonal -= (orthogonal * exact).sum() / exact.square().sum() * exact
    wrong = exact.double() + 1e-5 * exact.double().norm() / orthogonal.double().norm() * orthogonal.double()
    assert 1 - symptoms(exact, wrong).cosine[0] == pytest.approx(0.5e-10, rel=0.01)
