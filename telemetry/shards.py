"""What workers did for each prompt, as tables."""
from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from .cells import MB, Record, Row, Table, mb, number

_SECONDS = ("dispatch_seconds", "compute_seconds", "transfer_seconds")
_BYTES = ("sent_bytes", "received_bytes")
_HELD = ("shared_bytes", "private_bytes")


class Shards:
    """Prompts in which workers took part. What the workers hold is told after the prompt that it is about."""

    def __init__(self) -> None:
        self._prompts: list[tuple[int, Record, Record]] = []  # its number, what was done for it, and what workers held then

    def add(self, event: Record, prompt: int) -> None:
        if event["event"] == "shard.finished":
            self._prompts.append((prompt, event, {}))
        elif self._prompts:
            self._prompts[-1] = *self._prompts[-1][:2], event

    def tables(self) -> list[Table]:
        """Who predicted, with MB of each worker's RAM, where what several share counts in part; and why nobody else did."""
        return [
            Table(("predicted by", "prompt", "dispatch", "compute", "transfer", "sent MB", "received MB", "speed-up",
                   "MB of workers", "private"),
                  [_cells(str(prompt), done, held) for prompt, done, held in self._prompts]),
            Table(("not by", "prompt", "why"),
                  [(way, str(prompt), " ".join(str(reason).split())) for prompt, done, _ in self._prompts
                   for way, reason in _named(done, "why")]),
        ]


def _cells(prompt: str, done: Record, held: Record) -> Row:
    calls = ", ".join(f"{way} {count}" for way, count in _named(done, "calls"))
    return (calls or "unknown", prompt, *(f"{number(done, key):.2f}" if key in done else "-" for key in _SECONDS),
            *(mb(done, key) for key in _BYTES), f"{number(done, 'speedup'):.2f}" if "speedup" in done else "-",
            *(_of_each(held, key) for key in _HELD))


def _of_each(event: Record, key: str) -> str:
    held = dict(_named(event, key))
    return ", ".join(f"{number(held, worker) / MB:.0f}" for worker in held) or "-"


def _named(event: Record, key: str) -> Iterator[tuple[str, Any]]:
    found = event.get(key)
    return iter(found.items() if isinstance(found, dict) else ())
