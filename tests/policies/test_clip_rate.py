"""The warning about a policy that clips more than half of the steps."""

from __future__ import annotations

import pytest

from distclip.errors import FrequentClippingWarning
from distclip.policies.restart import ClipRate


@pytest.fixture
def messages() -> list[str]:
    return []


@pytest.fixture
def rate(messages: list[str]) -> ClipRate:
    def warn(message: str, category: type[Warning]) -> None:
        assert category is FrequentClippingWarning
        messages.append(message)

    return ClipRate(warn)


def test_warns_once_when_more_than_half_of_the_window_is_clipped(rate: ClipRate, messages: list[str]) -> None:
    for step in range(1, 129):
        rate.record(step, float(step % 2), 0)
    assert messages == [], "exactly half"
    rate.record(129, 1.0, 0)
    rate.record(130, 1.0, 0)
    assert len(messages) == 1
    assert messages[0].startswith("step 130: the policy clipped more than half of the last steps.")
    for step in range(131, 500):
        rate.record(step, 1.0, 0)
    assert len(messages) == 1


def test_does_not_warn_before_the_window_is_full(rate: ClipRate, messages: list[str]) -> None:
    for step in range(1, 128):
        rate.record(step, 1.0, 0)
    assert messages == []
    rate.record(128, 1.0, 0)
    assert len(messages) == 1


def test_counts_the_fraction_of_the_slots(rate: ClipRate, messages: list[str]) -> None:
    for step in range(1, 129):
        rate.record(step, 0.5, 0)
    assert messages == []
    for step in range(129, 131):
        rate.record(step, 0.75, 0)
    assert len(messages) == 1


def test_warns_at_the_first_restart(rate: ClipRate, messages: list[str]) -> None:
    rate.record(1, 0.0, 0)
    rate.record(2, 0.0, 1)
    assert len(messages) == 1
    assert "restarted from their norms before clipping" in messages[0]
    rate.record(3, 0.0, 2)
    assert len(messages) == 1
    assert rate.restarts == 2


def test_restarts_of_a_checkpoint_are_no_new_ones(rate: ClipRate, messages: list[str]) -> None:
    rate.restarts = 3
    rate.record(1, 0.0, 3)
    assert messages == []
    rate.record(2, 0.0, 4)
    assert len(messages) == 1
