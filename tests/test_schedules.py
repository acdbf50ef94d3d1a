"""Schedules: end points, order, and what they refuse."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sparse_prune.errors import SparsePruneError
from sparse_prune.schedules import SCHEDULES, Schedule

KINDS = sorted(SCHEDULES)


@pytest.mark.parametrize("kind", KINDS)
def test_ends(kind):
    schedule = Schedule(kind, 0.2, total_steps=100, warmup=10, cooldown=30)
    assert [schedule.density_at(step) for step in (0, 5, 10)] == [1.0, 1.0, 1.0]
    assert schedule.density_at(11) < 1.0 and schedule.density_at(69) >= 0.2
    assert [schedule.density_at(step) for step in (70, 71, 100, 1000)] == [0.2] * 4
    assert schedule.progress_at(10) == 0.0 and schedule.progress_at(70) == 1.0


def test_values_between():
    def halfway(kind, **more):
        return Schedule(kind, 0.2, total_steps=110, warmup=10, **more).density_at(60)

    assert halfway("oneshot") == 0.2
    assert halfway("linear") == pytest.approx(0.6)
    assert halfway("cubic") == pytest.approx(0.2 + 0.8 / 8)
    assert halfway("iterative", rounds=4) == pytest.approx(0.2**0.5)
    assert Schedule("iterative", 0.16, 12, rounds=2).density_at(1) == pytest.approx(0.4)
    assert Schedule("iterative", 0.16, 12, rounds=2).density_at(7) == pytest.approx(0.16)


def test_one_step_is_enough():
    assert Schedule("oneshot", 0.5, 1).density_at(1) == 0.5


@given(
    st.sampled_from(KINDS),
    st.floats(0.01, 1.0),
    st.integers(1, 60),
    st.integers(0, 20),
    st.integers(0, 20),
    st.integers(1, 8),
)
def test_never_rises_and_stays_between(kind, density, span, warmup, cooldown, rounds):
    schedule = Schedule(kind, density, span + warmup + cooldown, warmup, cooldown, rounds)
    values = [schedule.density_at(step) for step in range(schedule.total_steps + 1)]
    assert all(b <= a + 1e-12 for a, b in zip(values, values[1:], strict=False))
    assert values[0] == 1.0 and values[-1] == density and min(values) >= density - 1e-12
    assert all(0.0 <= schedule.progress_at(step) <= 1.0 + 1e-9 for step in range(schedule.total_steps + 1))
    assert schedule.progress_at(schedule.total_steps) == 1.0  # at density 1 too, where nothing has to fall


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"kind": "slow"}, "^schedule: expected one of .*got slow"),
        ({"density": 0.0}, "^density"),
        ({"total_steps": 0}, "^total_steps"),
        ({"total_steps": 10.0}, "^total_steps"),
        ({"warmup": -1}, "^warmup"),
        ({"cooldown": True}, "^cooldown"),
        ({"rounds": 0}, "^rounds"),
        ({"warmup": 60, "cooldown": 40}, r"^warmup \+ cooldown: expected less than total_steps=100, got 100"),
    ],
)
def test_refuses(change, message):
    with pytest.raises(SparsePruneError, match=message):
        Schedule(**({"kind": "cubic", "density": 0.2, "total_steps": 100} | change))
