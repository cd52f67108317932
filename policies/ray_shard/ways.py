"""The ways in which a batch may be shared out among the workers."""
from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from . import rows

ROWS, HEADS, TOKENS, LOCAL = "rows", "heads", "tokens", "local"
ALIKE = "alike"  # each computes all of it, with weights that they have together
PIPELINE = "pipeline"


@dataclass(frozen=True)
class Way:
    """How a batch is shared out.

    Attributes:
        weights: how the weights are, by `worker.weights.MODES`; "" is that every worker has all of them.
    """

    name: str
    shares: Sequence[rows.Share]
    weights: str = ""

    @property
    def label(self) -> str:
        """For telemetry."""
        return f"{self.name}, {self.weights}" if self.weights not in ("", self.name) else self.name

    @property
    def is_by_rows(self) -> bool:
        """Whether each answer is a part of the batch."""
        return self.name == ROWS

    @property
    def shares_attention(self) -> bool:
        return self.name in (TOKENS, HEADS)


def in_order(modes: Sequence[str], apart: Sequence[rows.Share], everywhere: Sequence[rows.Share],
             together: Sequence[str]) -> Iterator[Way]:
    """In the order in which they are tried.

    Args:
        modes: of weights, as `Way.weights`; with any, all workers are asked each time, and the last way is that each has all.
        apart: rows for some or all workers.
        everywhere: all rows for all workers.
        together: ways to share attention, in their order.
    """
    all_busy = len(apart) == len(everywhere) > 1
    for weights in modes:
        alike = (ROWS, *together, ALIKE) if all_busy else (*together, ALIKE)
        order = (PIPELINE,) if weights == PIPELINE else alike
        yield from (Way(name, apart if name == ROWS else everywhere, weights) for name in order)
    if modes:
        yield Way(ROWS, apart)
    else:
        order = (ROWS, TOKENS, HEADS) if all_busy else (TOKENS, ROWS, HEADS) if len(apart) > 1 else (TOKENS, HEADS, ROWS)
        yield from (Way(name, apart if name == ROWS else everywhere) for name in order if name in (ROWS, *together))
