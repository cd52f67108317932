"""The table `[ray_shard]`."""
from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from .. import chunking

_LOCAL = "local"
WHOLE = ("replicate", "stream")  # every worker has all of a model; ComfyUI streams what does not fit its device
_WORKERS = 'write "auto", a number from 1 to 64, or a list: [{ device = "cuda:0" }, { device = "cuda:1", weight = 0.6 }]'
_HOST = 'host is the address or the name of a machine of the Ray cluster, as `ray status` has it'


@dataclass(frozen=True)
class WorkerSettings:
    """A worker.

    Attributes:
        device: that it computes on, as torch calls it here; "" is the next that nobody has.
        weight: its share of the work, beside the others'.
        host: another machine of the cluster, by its address or name; "" is ComfyUI's own.
    """

    device: str = ""
    weight: float = 1.0
    host: str = ""


def parse_workers(value: Any) -> tuple[WorkerSettings, ...]:
    """What `workers` stands for; () is "auto": one for each accelerator.

    Raises:
        ValueError: it is none of what it may be.
    """
    if value == "auto":
        return ()
    if isinstance(value, int) and not isinstance(value, bool) and 1 <= value <= 64:
        return (WorkerSettings(),) * value
    if isinstance(value, list) and value and len(value) <= 64:
        return tuple(map(_worker, value))
    raise ValueError(f"{_WORKERS}; this is {value!r}")


def _worker(table: Any) -> WorkerSettings:
    if not isinstance(table, Mapping) or set(table) - {"device", "weight", "host"}:
        raise ValueError(f"{_WORKERS}; one of them is {table!r}")
    device, weight, host = table.get("device", ""), table.get("weight", 1.0), table.get("host", "")
    if not isinstance(device, str):
        raise ValueError(f'device is a name such as "cuda:0", not {device!r}')
    if isinstance(weight, bool) or not isinstance(weight, (int, float)) or not 0 < weight <= 1000:
        raise ValueError(f"weight is a number above 0, and at most 1000, not {weight!r}")
    if not isinstance(host, str) or (not host and "host" in table):
        raise ValueError(f"{_HOST}, not {host!r}; without it the worker is on ComfyUI's own machine")
    if host and not device:
        raise ValueError(f'a worker on another host says on which device: {{ device = "cuda:0", host = "{host}" }}')
    return WorkerSettings(device, float(weight), host)


@dataclass(frozen=True)
class Settings:
    workers: tuple[WorkerSettings, ...] = field(default=(), metadata={"parse": parse_workers})
    address: str = _LOCAL
    detached: bool = False
    rows: bool = True
    heads: bool = True
    tokens: bool = True
    tiles: bool = True
    weights: str = field(default="auto", metadata={"choices": ("auto", *WHOLE, "pipeline", "blocks", "fsdp2")})
    ffn_chunks: int = field(default=1, metadata=chunking.SETTING)
    verify: str = field(default="first_step", metadata={"choices": ("off", "first_step", "always")})
    self_test: bool = True
    timeout_seconds: float = field(default=120, metadata={"minimum": 5})

    @property
    def together(self) -> tuple[str, ...]:
        """The ways in which all workers compute one prediction."""
        return tuple(name for name in ("tokens", "heads") if getattr(self, name))

    @property
    def meets(self) -> bool:
        """Whether the workers exchange anything."""
        return bool(self.together) or self.weights not in WHOLE

    @property
    def is_local(self) -> bool:
        """Whether Ray is started and stopped here."""
        return self.address == _LOCAL
