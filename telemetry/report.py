"""Adds up what telemetry files tell, into tables.

A field that is missing or of another type counts as nothing: an older or newer plugin may have written the line.
"""
from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass

from .cells import MB, Record, Row, Table, mb, number, text, types
from .shards import Shards

# What a user may have to act on.
_TROUBLE = frozenset({"hook.declined", "hook.shadowed", "hook.retired", "hook.failed", "policy.declined", "policy.ineffective",
                      "policy.failed", "file.changed", "file.unreadable", "cache.skipped", "split.insufficient",
                      "donors.refused", "pin.failed", "rescue.failed", "shard.broken", "worker.lost"})


@dataclass
class _Model:
    placed: int = 0
    seconds: float = 0
    last: Row = ("-", "-", "-")  # MB on the device, mapped, and in private RAM
    released: int = 0
    released_bytes: float = 0
    released_seconds: float = 0

    def add(self, event: Record) -> None:
        if event["event"] == "model.placed":
            self.placed += 1
            self.seconds += number(event, "seconds")
            self.last = [mb(event, key) for key in ("device_bytes", "mapped_bytes", "host_bytes")]
        else:
            self.released += 1
            self.released_bytes += number(event, "bytes")
            self.released_seconds += number(event, "seconds")

    def cells(self) -> Row:
        return (str(self.placed), f"{self.seconds:.2f}", *self.last, str(self.released), f"{self.released_bytes / MB:.0f}",
                f"{self.released_seconds:.2f}")


@dataclass
class _File:
    mapped: int = 0
    bytes: float = 0
    copied_bytes: float = 0
    from_bank: int = 0
    released: str = "-"  # nothing was let go of since the last read; else whether that unmapped it: yes, no, unknown

    def add(self, event: Record) -> None:
        if event["event"] == "weights.read":
            self.from_bank += event.get("source") == "bank"
            self.released = "-"
        elif event["event"] == "weights.mapped":
            self.mapped += 1
            self.bytes += number(event, "bytes")
            self.copied_bytes += number(event, "copied_bytes")
        else:
            unmapped = event.get("unmapped")
            self.released = "yes" if unmapped is True else "no" if unmapped is False else "unknown"

    def cells(self) -> Row:
        return (str(self.mapped), f"{self.bytes / MB:.0f}", f"{self.copied_bytes / MB:.0f}", str(self.from_bank), self.released)


@dataclass
class _Kept:
    hits: int = 0
    misses: int = 0
    seconds: float = 0
    evicted: int = 0
    why: str = "-"  # it missed or left last

    def add(self, event: Record) -> None:
        if event["event"] == "cache.hit":
            self.hits += 1
            self.seconds += number(event, "seconds")
        else:
            self.misses += event["event"] == "cache.miss"
            self.evicted += event["event"] == "cache.evicted"
            self.why = text(event, "reason")

    def cells(self) -> Row:
        return str(self.hits), str(self.misses), f"{self.seconds:.2f}", str(self.evicted), self.why


@dataclass
class _Repeated:
    times: int = 0
    freed_bytes: float = 0
    seconds: float = 0

    def add(self, event: Record) -> None:
        self.times += 1
        self.freed_bytes += number(event, "freed_bytes")
        self.seconds += number(event, "seconds")

    def cells(self) -> Row:
        return str(self.times), f"{self.freed_bytes / MB:.0f}", f"{self.seconds:.2f}"


class Report:
    """What happened, added up.

    Attributes:
        events: how many there were.
        broken: how many lines were no event.
    """

    def __init__(self, events: Iterable[Record | None]) -> None:
        self.events = self.broken = 0
        self._prompts: list[Record] = []
        self._models: dict[str, _Model] = {}
        self._files: dict[str, _File] = {}
        self._kept: dict[str, _Kept] = {}
        self._gguf: dict[str, Record] = {}
        self._splits: dict[Row, Record] = {}
        self._repeated: dict[tuple[str, str], _Repeated] = {}
        self._shards = Shards()
        self._restored_bytes = self._copied_bytes = self._dense_bytes = self._dense_seconds = 0.0
        self._trouble: Counter[Row] = Counter()
        for event in events:
            if event is None:
                self.broken += 1
            else:
                self.events += 1
                self._add(event["event"], event)

    def _add(self, name: str, event: Record) -> None:
        if name == "prompt.finished":
            self._prompts.append(event)
        elif name in ("model.placed", "model.released"):
            self._models.setdefault(text(event, "model"), _Model()).add(event)
        elif name in ("weights.read", "weights.mapped", "weights.released"):
            self._files.setdefault(text(event, "file"), _File()).add(event)
        elif name in ("split.planned", "split.capped"):
            self._splits[text(event, "model"), text(event, "device")] = event
        elif name == "gguf.read":
            self._gguf.setdefault(text(event, "file"), event)
        elif name == "gguf.dequantised":
            self._dense_bytes += number(event, "bytes")
            self._dense_seconds += number(event, "seconds")
        elif name in ("cache.hit", "cache.miss", "cache.evicted"):
            self._kept.setdefault(text(event, "model"), _Kept()).add(event)
        elif name in ("shard.finished", "shard.workers"):
            self._shards.add(event, len(self._prompts) + 1)  # it is told just before its prompt's end
        elif name == "rescue.repeated":
            self._repeated.setdefault((text(event, "what"), text(event, "model")), _Repeated()).add(event)
        elif name == "weights.restored":
            self._restored_bytes += number(event, "bytes")
            self._copied_bytes += number(event, "copied_bytes")
        elif name in _TROUBLE:
            about = "workers" if name == "shard.broken" else text(event, "hook", "policy", "file", "model", "device")
            why = text(event, "reason", "error", "by") if name != "hook.retired" else "another plugin wrapped on top of it"
            self._trouble[name, about, why] += 1

    def tables(self) -> list[Table]:
        """Prompts, what workers did for them, models, their last splits, files, GGUF files, kept loads, what was repeated, what
        to act on, totals."""
        return [
            self._prompt_table(),
            *self._shards.tables(),
            Table(("model", "placed", "seconds", "device MB", "mapped MB", "host MB", "released", "released MB", "seconds"),
                  [(name, *model.cells()) for name, model in self._models.items()]),
            Table(("split", "device", "mode", "figure", "rule", "budget MB", "device MB", "streamed MB"),
                  [(*about, text(event, "mode") if "mode" in event else "pages", text(event, "figure"),
                    text(event, "rule") if "rule" in event else "-",
                    *(mb(event, key) for key in ("budget_bytes", "predicted_bytes", "streamed_bytes")))
                   for about, event in self._splits.items()]),
            Table(("file", "mapped", "mapped MB", "copied MB", "from bank", "released"),
                  [(name, *file.cells()) for name, file in self._files.items()]),
            Table(("GGUF", "architecture", "header seconds", "types"),
                  [(name, text(event, "architecture"), f"{number(event, 'header_seconds'):.2f}", types(event))
                   for name, event in self._gguf.items()]),
            Table(("kept", "hits", "misses", "seconds of hits", "evicted", "why it missed or left last"),
                  [(name, *kept.cells()) for name, kept in self._kept.items()]),
            Table(("out of memory in", "model", "repeated", "freed MB", "seconds to free"),
                  [(*key, *repeated.cells()) for key, repeated in self._repeated.items()]),
            Table(("event", "about", "times", "why"),
                  [(name, about, str(times), why) for (name, about, why), times in self._trouble.items()]),
            self._totals(),
        ]

    def _prompt_table(self) -> Table:
        held = [event["device_bytes"] if isinstance(event.get("device_bytes"), dict) else {} for event in self._prompts]
        devices = sorted({device for one in held for device in one})
        rows = [(str(place), text(event, "prompt")[:8], "yes" if event.get("ok") is True else "no",
                 *(f"{number(event, key):.2f}" for key in ("seconds", "placing_seconds")),
                 *(mb(event, key) for key in ("read_bytes", "private_bytes", "file_bytes")),
                 *(mb(one, device) for device in devices))
                for place, (event, one) in enumerate(zip(self._prompts, held, strict=True), 1)]
        return Table(("prompt", "id", "ok", "seconds", "placing", "read MB", "private MB", "file MB",
                      *(f"{device} MB" for device in devices)), rows)

    def _totals(self) -> Table:
        prompts = self._prompts
        seconds, placing, size = (sum(number(event, key) for event in prompts)
                                  for key in ("seconds", "placing_seconds", "read_bytes"))
        return Table(("total", ""), [
            ("prompts", str(len(prompts))),
            ("prompts that failed", str(sum(event.get("ok") is not True for event in prompts))),
            ("seconds", f"{seconds:.2f}"),
            ("seconds placing models", f"{placing:.2f}"),
            ("MB read from storage", f"{size / MB:.0f}"),
            ("MB restored without a copy", f"{self._restored_bytes / MB:.0f}"),
            ("MB restored with a copy", f"{self._copied_bytes / MB:.0f}"),
            ("MB dequantised", f"{self._dense_bytes / MB:.0f}"),
            ("seconds dequantising, about", f"{self._dense_seconds:.2f}"),
        ])
