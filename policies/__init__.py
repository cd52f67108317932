"""Opinions on where weights live. A policy's name is its module's name.

A policy module imports what is heavy or optional when it starts, not before; it has a frozen dataclass `Settings`, filled
from the table of its name, and `create(settings, tools)`.
"""
from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from ..settings import Settings
from ..telemetry import emit
from .files.bank import Bank
from .host import Host
from .memory import Ledger, Limits
from .policy import Policy, Unfit

_VOCABULARY = frozenset({"chain", "chunking", "computing", "files", "host", "memory", "models", "policy", "requests",
                         "sampling", "weights"})


@dataclass(frozen=True)
class Tools:
    """What every policy works with: one of each for the process."""

    bank: Bank
    ledger: Ledger
    host: Host

    @classmethod
    def make(cls, host: Host) -> Tools:
        return cls(Bank(), Ledger(), host)


def tables() -> dict[str, type[Any]]:
    """The policies that are shipped, each with its settings dataclass."""
    names = [module.name for module in pkgutil.iter_modules(__path__) if module.name not in _VOCABULARY]
    return {name: importlib.import_module(f".{name}", __name__).Settings for name in names}


def load(settings: Settings, tools: Tools, running: Iterable[Policy] = ()) -> list[Policy]:
    """Makes and starts the policies that can run here; says of the others why not (`policy.declined`).

    Args:
        running: policies in force; one whose settings are the same is kept as it is.
    """
    tools.ledger.limits = Limits.from_gb(settings.memory.ram_gb, settings.memory.pinned_gb, settings.memory.pad_gb)
    kept = {policy.name: policy for policy in running}
    policies = []
    for name in settings.policies if settings.enabled else ():
        if name in kept and kept[name].settings == settings.tables[name]:
            policies.append(kept[name])
            continue
        try:
            policy: Policy = importlib.import_module(f".{name}", __name__).create(settings.tables[name], tools)
            policy.start()
        except (Unfit, ImportError) as error:
            emit("policy.declined", policy=name, reason=str(error))
            continue
        policies.append(policy)
    return policies

