"""Cells of tables, from the fields of events.

A field that is missing or of another type counts as nothing: an older or newer plugin may have written the line.
"""
from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

MB = 2**20
Row = Sequence[str]
Record = Mapping[str, Any]


class Table(NamedTuple):
    """Cells of text, under a head that gives the units."""

    head: Row
    rows: Sequence[Row]


def number(event: Record, key: str) -> float:
    value = event.get(key)
    return value if isinstance(value, (int, float)) and abs(value) < 1e18 else 0  # Python's JSON has Infinity and NaN


def mb(event: Record, key: str) -> str:
    return f"{number(event, key) / MB:.0f}" if key in event else "-"


def types(event: Record) -> str:
    """Types and their bytes, the largest share first."""
    sizes = event.get("types_bytes")
    found = {name: number(sizes, name) for name in sizes} if isinstance(sizes, dict) else {}
    return ", ".join(f"{name} {size / MB:.0f} MB" for name, size in sorted(found.items(), key=lambda item: -item[1])) or "-"


def text(event: Record, *keys: str) -> str:
    """The first of the fields that there is, in one line."""
    return next((" ".join(str(event[key]).split()) for key in keys if event.get(key) is not None), "unknown")
