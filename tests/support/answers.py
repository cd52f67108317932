"""Stand-ins for the chain of policies."""
from __future__ import annotations

from collections.abc import Callable
from typing import Any

from residency.policies.requests import Request


class Policies:
    """Lets the host answer, and remembers what was asked."""

    def __init__(self) -> None:
        self.asked: list[Request] = []

    def __call__(self, request: Request, host: Callable[[Request], Any]) -> Any:
        self.asked.append(request)
        return host(request)
