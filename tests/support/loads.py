"""Loads without a host: kept models that are numbers, and a loader that counts."""
from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from residency.policies.memory import Residency
from residency.policies.models import Recipe
from residency.policies.policy import Policy
from residency.policies.requests import LoadModel

MB = 2**20


@dataclass
class FakeKept:
    """A kept load whose numbers the test sets."""

    answer: Any = "model"
    where: Mapping[Residency, int] = field(default_factory=dict)
    used: bool = False
    change: str | None = None
    dropped: bool = False
    lent: int = 0
    placed: int = 0
    followed: int = 0

    def lend(self) -> Any:
        self.lent += 1
        return f"{self.answer} {self.lent}"

    def in_use(self) -> bool:
        return self.used

    def modules(self) -> list[torch.nn.Module]:
        return []

    def residency(self) -> Mapping[Residency, int]:
        return self.where

    def altered(self) -> str | None:
        return self.change

    def drop(self) -> None:
        self.dropped = True

    def place(self) -> None:
        self.placed += 1

    def follow_devices(self) -> None:
        self.followed += 1


class Loader:
    """Asks a policy as the chain does, and is the host that loads: `calls` counts what really was loaded."""

    def __init__(self, policy: Policy) -> None:
        self.policy = policy
        self.calls = 0
        self.kept: list[FakeKept] = []
        self.where: Mapping[Residency, int] = {Residency.MAPPED: 0}
        self.meanwhile: Callable[[], None] = lambda: None

    def request(self, *paths: Path, options: Mapping[str, Any] | None = None, recipe: Recipe | None = None) -> LoadModel:
        return LoadModel("diffusion model", tuple(map(str, paths)), options or {}, self._keep, recipe)

    def __call__(self, *paths: Path, **more: Any) -> Any:
        request = self.request(*paths, **more)
        decision = self.policy.decide(request)
        return self._host() if decision is None else decision.act(lambda asked=None: self._host())

    def _host(self) -> str:
        self.calls += 1
        self.meanwhile()
        return "the host's own"

    def _keep(self, answer: Any) -> FakeKept:
        self.kept.append(FakeKept(where=self.where))
        return self.kept[-1]
