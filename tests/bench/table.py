"""Plain tables, and the one statistic that is quoted."""
from __future__ import annotations

import math
import statistics
from collections.abc import Sequence

# Student's t, two-sided 90 % (one-sided 95 %), by degrees of freedom.
_T95 = {2: 2.920, 3: 2.353, 4: 2.132, 5: 2.015, 7: 1.895, 9: 1.833, 11: 1.796, 14: 1.761, 19: 1.729, 29: 1.699, 39: 1.685}


def show(title: str, head: Sequence[str], rows: Sequence[Sequence[object]]) -> None:
    """Prints a Markdown table with its title."""
    print(f"\n{title}\n")
    cells = [list(head), *([_text(cell) for cell in row] for row in rows)]
    widths = [max(len(row[column]) for row in cells) for column in range(len(head))]
    for index, row in enumerate(cells):
        first, *rest = (cell.ljust(width) if column == 0 else cell.rjust(width)
                        for column, (cell, width) in enumerate(zip(row, widths, strict=True)))
        print("| " + " | ".join([first, *rest]) + " |")
        if index == 0:
            print("|" + "|".join("-" * (width + 2) if column == 0 else "-" * (width + 1) + ":"
                                 for column, width in enumerate(widths)) + "|")
    print(flush=True)


def ratio(numbers: Sequence[float], others: Sequence[float]) -> tuple[float, float]:
    """The geometric mean of the ratios pair by pair, and its upper one-sided 95 % bound (t interval on the logarithms)."""
    logs = [math.log(one / other) for one, other in zip(numbers, others, strict=True)]
    mean = statistics.fmean(logs)
    degrees = len(logs) - 1
    quantile = next((t for df, t in sorted(_T95.items(), reverse=True) if df <= degrees), 6.314)
    return math.exp(mean), math.exp(mean + quantile * statistics.stdev(logs) / math.sqrt(len(logs)))


def _text(cell: object) -> str:
    if not isinstance(cell, float):
        return str(cell)
    return f"{cell:.0f}" if cell >= 10 else f"{cell:.2f}" if cell >= 0.1 else f"{cell:.2g}"
