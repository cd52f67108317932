"""The only code that knows ComfyUI, and the only code that knows wrapt."""
from __future__ import annotations

from ..policies.files.bank import Bank
from . import building, computing, host, loader_nodes, loading, placement, prompts, reading, release, sampling, tiles
from .registry import Hook, HookRegistry
from .selftest import exercise

__all__ = ["HookRegistry", "all_hooks", "exercise", "host", "loader_nodes"]


def all_hooks(bank: Bank, listener: prompts.Listener) -> tuple[Hook, ...]:
    """Every hook, in the order in which they are installed."""
    stopwatch = placement.Stopwatch()
    return (*loading.hooks(bank), *reading.HOOKS, *building.HOOKS, *placement.hooks(bank, stopwatch), *release.HOOKS,
            *computing.HOOKS, *sampling.HOOKS, *tiles.HOOKS, *prompts.hooks(listener, stopwatch))
