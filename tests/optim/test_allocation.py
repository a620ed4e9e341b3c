"""Who gets bits: one rung at a time, the neediest first, and never more than the budget."""

from __future__ import annotations

import pytest

from tfqc.optim.allocation import FIRST, RUNGS, Allocation, Factors

SCALES = {"exp_avg": 0.125, "exp_avg_sq": 0.1875}
PLAIN = Factors(rms=1.0, dispersion=3.0, spread=10.0)


def of(*values: int, budget: float = 4.99, **others: int) -> Allocation:
    return Allocation(values, SCALES, budget, **others)


def test_all_start_alike() -> None:
    allocation = of(1000, 3000)
    assert set(allocation.bits.values()) == {FIRST} and allocation.mean() == FIRST + (0.125 + 0.1875) / 2


def test_layers_that_are_alike_keep_what_they_have() -> None:
    allocation = of(1000, 1000)
    allocation.look({0: PLAIN, 1: PLAIN})
    assert set(allocation.bits.values()) == {FIRST}


def test_one_rung_at_a_look() -> None:
    allocation = of(1000, 1000, budget=8.5)
    seen = {0: Factors(10.0, 3.0, 10.0), 1: Factors(0.1, 3.0, 10.0)}
    found = []
    for _ in range(5):
        allocation.look(seen)
        found.append((allocation.bits[0, "exp_avg"], allocation.bits[1, "exp_avg"]))
    assert found == [(5, 3), (6, 3), (8, 3), (8, 3), (8, 3)]
    assert allocation.bits[0, "exp_avg_sq"] == FIRST


def test_a_wide_second_moment_gets_bits_for_itself() -> None:
    allocation = of(1000, 1000, budget=8.5)
    allocation.look({0: Factors(1.0, 3.0, 30.0), 1: Factors(1.0, 3.0, 10.0)})
    assert allocation.bits == {(0, "exp_avg"): 4, (0, "exp_avg_sq"): 5, (1, "exp_avg"): 4, (1, "exp_avg_sq"): 3}


@pytest.mark.parametrize("budget", [4.25, 4.4, 4.99])
def test_never_more_than_the_budget(budget: float) -> None:
    allocation = of(5000, 1000, 1000, budget=budget)
    for _ in range(20):
        allocation.look({0: PLAIN, 1: Factors(9.0, 3.0, 30.0), 2: Factors(5.0, 3.0, 30.0)})
        assert allocation.mean() <= budget and set(allocation.bits.values()) <= set(RUNGS)
    if budget > 4.25:
        assert allocation.bits[1, "exp_avg"] > FIRST  # the neediest


def test_what_is_kept_whole_is_counted() -> None:
    assert of(1000, whole=1000).mean() == pytest.approx((FIRST + 0.15625 + 32) / 2)


def test_averages_move_slowly() -> None:
    allocation = of(1000)
    allocation.look({0: PLAIN})
    allocation.look({0: Factors(11.0, 3.0, 10.0)})
    assert allocation.averages["rms"] == pytest.approx(2.0)
