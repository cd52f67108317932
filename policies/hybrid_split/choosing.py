"""Which rule holds for a model, and which devices that means for it."""
from __future__ import annotations

import os
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from ...telemetry import emit
from ..policy import Decision, Proceed
from ..requests import LoadModel
from ..weights import Weights
from . import rules
from .allocation import RAM, Allocation, normal
from .settings import Rule, Settings

if TYPE_CHECKING:
    from .. import Tools


class Chooser:
    """Decides on `LoadModel`."""

    def __init__(self, settings: Settings, tools: Tools) -> None:
        self._rules, self._tools, self._everywhere = settings.rules, tools, Allocation.parse(settings.devices)
        self._refused: set[str] = set()

    def rule(self, weights: Weights) -> Rule | None:
        """The rule that holds for a model."""
        if not self._rules:
            return None
        paths = weights.paths
        if not paths:
            mapped = (self._tools.bank.file_of(parameter) for parameter in weights.module.parameters())
            paths = tuple({file.path for file in mapped if file is not None})
        return self._best(weights.component, paths, weights.size())

    def allocation(self, rule: Rule | None) -> Allocation:
        """Where the weights of a model with this rule live; a rule with a budget of its own leaves the table's string out."""
        if rule is not None and rule.devices:
            return Allocation.parse(rule.devices)
        whole = rule is not None and rule.residency == "device"
        return Allocation() if whole or rules.limit(rule) is not None else self._everywhere

    def load(self, request: LoadModel) -> Decision:
        def act(proceed: Proceed) -> Any:
            answer = proceed()
            for part in request.parts(answer):
                rule = self._best(part.component, request.paths, part.size)
                if rule is not None and rule.device:
                    self._run_on(part.run_on, rule.device, os.path.basename(request.paths[0]))
            return answer

        return Decision("", act)

    def _best(self, component: str, paths: tuple[str, ...], size: int) -> Rule | None:
        return rules.best(self._rules, rules.Subject(paths, component, size))

    def _run_on(self, run_on: Callable[[str], None], device: str, name: str) -> None:
        if normal(device) in (RAM, *self._tools.host.memory.devices()):
            run_on(device)
            emit("split.moved", model=name, device=device)
        elif device not in self._refused:
            self._refused.add(device)
            emit("policy.declined", policy=f"hybrid_split, device {device}",
                 reason=f"there is no such device here; {name} runs where ComfyUI chose. Mend 'hybrid_split.rules'")
