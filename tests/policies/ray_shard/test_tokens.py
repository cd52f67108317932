"""Sharing tokens changes nothing but who computes: ComfyUI's models in four processes, with all that tokens carry."""
from __future__ import annotations

from typing import Any

import pytest
from support.flows import CASES
from support.ranks import ranks_of
from support.token_ranks import LONELY, WAYS

TOLERANCE = 2e-5


@pytest.fixture(scope="module")
def ranks() -> list[dict[str, dict[str, Any]]]:
    """What four processes found, each started once for all ways and cases."""
    return ranks_of("token_ranks", 4, len(WAYS) + 1, seconds=600)


@pytest.mark.parametrize("way", WAYS)
def test_ranks_compute_what_one_alone_does(ranks: list[dict[str, dict[str, Any]]], way: str) -> None:
    """Every rank has the whole result, in every case."""
    found = [results[way] for results in ranks[:WAYS[way][0]]]
    wrong = {(rank, name): case["error"] for rank, cases in enumerate(found) for name, case in cases.items()
             if not case["error"] <= TOLERANCE}

    assert wrong == {}
    assert set(found[0]) == set(CASES)


def test_tokens_are_exchanged_in_every_case(ranks: list[dict[str, dict[str, Any]]]) -> None:
    """Twice for each attention, and once more for the result: no rank has the whole sequence in between."""
    counted = {name: (case["shared"], case["collectives"]) for name, case in ranks[0]["three"].items()}

    assert {name: counts for name, counts in counted.items() if counts[0] < 2 or counts[1] < 2 * counts[0] + 1} == {}


def test_ranks_that_do_not_exchange_are_found_out(ranks: list[dict[str, dict[str, Any]]]) -> None:
    """The control: by ten times the tolerance, in every case."""
    assert {name: case["error"] for name, case in ranks[0][LONELY].items() if not case["error"] > 10 * TOLERANCE} == {}
