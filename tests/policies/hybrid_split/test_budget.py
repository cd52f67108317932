"""Budgets in numbers."""
from __future__ import annotations

import pytest
from residency.policies.hybrid_split.budget import Verdict, conservative, verdict

GB = 2**30


@pytest.mark.parametrize(("free", "overhead", "factor", "expected"), [
    (20, 15, 0.7, (20 - 3.6) * 0.7), (20, 30, 0.7, (20 - 7.2) * 0.7), (20, 15, 0.5, (20 - 3.6) * 0.5),
    (24, 10, 0.9, 21.6 * 0.9), (3, 15, 0.7, 0),
])
def test_the_conservative_budget_of_a_card_of_24_gb(free: float, overhead: float, factor: float, expected: float) -> None:
    """Other processes' memory is not free; what is less than the overhead is nothing, and not less."""
    assert conservative(24 * GB, int(free * GB), overhead, factor) == pytest.approx(expected * GB, abs=1)


@pytest.mark.parametrize(("size", "device", "ram", "expected"), [
    (10, 10, 0, Verdict("gpu_only")), (10, 4, 6, Verdict("hybrid")), (10, 4, 20, Verdict("hybrid")),
    (10, 4, 5, Verdict("insufficient", 1)), (10, 0, -3, Verdict("insufficient", 10)),
])
def test_a_model_fits_on_the_device_or_with_ram_or_not(size: int, device: int, ram: int, expected: Verdict) -> None:
    """What is missing is told to the byte; RAM that is short already adds nothing to it."""
    assert verdict(size, device, ram) == expected
