"""One frozen fact.

Names form a closed list: a typo in a name is a bug that a test should find, not a line that a user's `grep` misses.
Byte counts are fields that end in `bytes`, durations end in `seconds`, speeds in `gb_s`.
"""
from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

NAMES = frozenset({
    "plugin.started",       # version, host, policies, settings, folder
    "settings.changed",     # policies
    "hook.installed",       # hook, exercised: did the self-test see it called
    "hook.declined",        # hook, reason
    "hook.retired",         # hook: someone wrapped on top of us, so we became a pass-through
    "hook.shadowed",        # hook, by: somebody replaced what we wrapped
    "hook.failed",          # hook, error: our reading of the seam was wrong, the hook disarmed itself
    "policy.declined",      # policy, reason
    "policy.decided",       # policy, request, reason
    "policy.failed",        # policy, request, error
    "policy.ineffective",   # policy, reason, predicted_bytes, observed_bytes
    "weights.read",         # file, bytes, seconds, source: bank | file
    "weights.read_ahead",   # file, bytes, seconds
    "gguf.read",            # file, architecture, header_seconds, types_bytes by type
    "gguf.dequantised",     # prompt, bytes of dense weights, seconds: about, from a sample; null where the device has no clock
    "gguf.kernel_chosen",   # type, dtype, device, torch_gb_s, fused_gb_s, chosen: torch | fused
    "weights.mapped",       # file, bytes, copied_bytes, seconds
    "weights.restored",     # model, bytes, copied_bytes, seconds
    "weights.released",     # file, bytes, unmapped: true | false | null where the system cannot tell
    "file.changed",         # file, reason
    "file.unreadable",      # file, reason
    "cache.hit",            # model, bytes, seconds
    "cache.miss",           # model, reason
    "cache.evicted",        # model, bytes, private_bytes, reason
    "cache.preloaded",      # model, bytes, seconds, description
    "cache.skipped",        # model, reason: it was to be preloaded
    "cache.ready",          # models, bytes, seconds, skipped: the preload list is done
    "cache.stopped",        # reason: the rest of the preload list is not loaded
    "cache.imported",       # file, wishes, auto_gpu_load, skipped: entries that cannot be used
    "snapshot.ready",       # devices that the host chose, by kind of model
    "snapshot.restored",    # devices that it chose anew
    "split.planned",        # model, device, mode: gpu_only | hybrid | insufficient, figure, rule if one holds, predicted_bytes
                            # on the device, streamed_bytes, budget_bytes if there is one
    "split.insufficient",   # model, device, shortfall_bytes, reason
    "split.capped",         # model, device, figure, budget_bytes: of the pages that ComfyUI keeps on the device itself
    "split.moved",          # model, device: it runs there, as a rule says
    "model.built",          # model, seconds
    "model.placed",         # model, device, seconds, device_bytes, mapped_bytes, host_bytes; donor_bytes by other device
    "model.released",       # model, device, seconds, bytes, partly
    "donors.placed",        # model, seconds, predicted_bytes and observed_bytes by device that is not the model's own
    "donors.refused",       # model, device, bytes that stay in RAM, reason
    "donors.left",          # device, bytes, seconds, reason
    "pin.failed",           # model, bytes, reason
    "rescue.repeated",      # what, model, attempt, freed_bytes, seconds to free them, error: a device had run out of memory
    "rescue.failed",        # what, model, attempts, freed_bytes, error: repeating did not help
    "shard.started",        # workers: their devices, grouped: whether they exchange tensors, seconds
    "shard.broken",         # reason: there are no workers, and everything is computed here
    "shard.loaded",         # model, workers, mapped_bytes, copied_bytes, seconds; sent_bytes by other host that lacks files
    "shard.patched",        # model, workers, seconds
    "shard.weights",        # model, mode: where its weights lie, reason; what was measured: weights_bytes, link_mb_per_second
                            # among the workers; if it does not fit each device room_bytes, file_mb_per_second
    "shard.demoted",        # model, way: rows, heads or tiles, which is not taken, or local, which was; reason
    "shard.finished",       # of a prompt: calls by way, sent_bytes, received_bytes; of the slowest worker compute_seconds and
                            # transfer_seconds of tensors in and out of it; dispatch_seconds: the rest; speedup against the last
                            # predictions of the same shape by this process, if there were any; why by way that was passed over
    "shard.workers",        # by worker: private_bytes, shared_bytes: its part of all RAM, free_bytes on its device
    "worker.lost",          # worker, device, reason
    "worker.replaced",      # worker, device, seconds
    "memory.freed",         # device, wanted_bytes, models, seconds
    "memory.emptied",       # seconds
    "prompt.finished",      # prompt, ok, seconds, placing_seconds, read_bytes, private_bytes, file_bytes,
                            # device_bytes by device, policies: predicted_bytes and observed_bytes by policy
})


@dataclass(frozen=True)
class Event:
    """What happened.

    Attributes:
        name: one of `NAMES`.
        fields: what a reader needs to know, JSON-able.
        at: seconds since the epoch.

    Raises:
        ValueError: the name is not in the list.
    """

    name: str
    fields: Mapping[str, Any]
    at: float = field(default_factory=time.time)

    def __post_init__(self) -> None:
        if self.name not in NAMES:
            raise ValueError(f"unknown event {self.name!r}")

    def as_dict(self) -> dict[str, Any]:
        return {"at": round(self.at, 3), "event": self.name, **self.fields}
