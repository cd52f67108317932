"""Where models came from, so that rules can ask for file names, and the device that a rule wants them to run on."""
from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

import torch

from ...telemetry import emit
from ..policy import Decision, Proceed
from ..requests import LoadModel
from ..weights import Weights
from . import rules
from .settings import Rule, Settings

if TYPE_CHECKING:
    from .. import Tools


class Origins:
    """Decides on `LoadModel`, and remembers what came of it."""

    def __init__(self, settings: Settings, tools: Tools) -> None:
        self._settings, self._tools = settings, tools
        self._known: WeakKeyDictionary[torch.nn.Module, tuple[str, tuple[str, ...]]] = WeakKeyDictionary()
        self._refused: set[str] = set()

    def load(self, request: LoadModel) -> Decision:
        def act(proceed: Proceed) -> Any:
            answer = proceed()
            for part in request.parts(answer):
                self._known[part.module] = part.component, request.paths
                rule = self._best(part.component, request.paths, part.size)
                if rule is not None and rule.device:
                    self._run_on(part.run_on, rule.device, os.path.basename(request.paths[0]))
            return answer

        return Decision("", act)

    def _run_on(self, run_on: Any, device: str, name: str) -> None:
        if self._tools.host.memory.has_device(device):
            run_on(device)
            emit("split.moved", model=name, device=device)
        elif device not in self._refused:
            self._refused.add(device)
            emit("policy.declined", policy=f"hybrid_split, device {device}",
                 reason=f"there is no such device here; {name} runs where ComfyUI chose. Mend 'hybrid_split.rules'")

    def rule(self, weights: Weights) -> Rule | None:
        """The rule that holds for a model."""
        if not self._settings.rules:
            return None
        component, paths = self._known.get(weights.module, ("text_encoder" if weights.is_text_encoder else "", ()))
        return self._best(component, paths, weights.size())

    def _best(self, component: str, paths: tuple[str, ...], size: int) -> Rule | None:
        return rules.best(self._settings.rules, rules.Subject(paths, component, size))
