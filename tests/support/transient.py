"""The most memory that some work takes at a time, by torch's own count of what it allocates and frees on the CPU."""
from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile


def peak_bytes(work: Callable[[], Any]) -> int:
    """Beside what was there before; what the work gives back counts, as it lives until its end."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True, acc_events=True) as seen:
        answer = work()
    del answer
    events = [(event.start_ns(), event.nbytes()) for event in seen.profiler.kineto_results.events()
              if event.name() == "[memory]" and event.device_type() == torch.autograd.DeviceType.CPU]
    now = most = 0
    for _, size in sorted(events):
        now += size
        most = max(most, now)
    return most
