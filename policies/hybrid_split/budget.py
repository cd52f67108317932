"""How many bytes of a model its device may hold, in numbers."""
from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Verdict:
    """What a budget means for a model.

    Attributes:
        mode: "gpu_only": all of it on the device; "hybrid": device and RAM hold it together; "insufficient": they do not.
        shortfall: bytes that are missing.
    """

    mode: str
    shortfall: int = 0


def conservative(total: int, free: int, overhead_percent: float, factor: float) -> int:
    """Bytes for weights: (free - overhead_percent of total) * factor.

    After ComfyUI-GGUFHybridMemory, which took what its own process had reserved for all that was not free; `free` is what the
    device says, other processes counted.

    Args:
        total: the device's memory, in bytes.
        free: what is free of it, with what the model has there already.
        overhead_percent: of `total`, for everything but weights.
        factor: 0 to 1.
    """
    return max(0, int((free - total * overhead_percent / 100) * factor))


def verdict(size: int, on_devices: int, ram_room: int) -> Verdict:
    """
    Args:
        size: bytes of the model's weights.
        on_devices: bytes that devices may hold of them.
        ram_room: bytes of RAM that the rest may take, with what it takes there already.
    """
    if size <= on_devices:
        return Verdict("gpu_only")
    missing = size - on_devices - max(0, ram_room)
    return Verdict("hybrid") if missing <= 0 else Verdict("insufficient", missing)
