"""Asks the policies in order, the host last, and fails open.

Who is acting is in one `ContextVar`: a policy is not asked about what it caused itself. What the host does inside
`proceed` was not caused by the policy, so there the variable is what it was before.
"""
from __future__ import annotations

from collections.abc import Callable, Iterable
from contextvars import ContextVar
from typing import Any

from ..telemetry import emit, log
from .policy import Decision, Effect, OutOfMemory, Policy, Refusal
from .requests import Request

_acting: ContextVar[frozenset[str]] = ContextVar("residency_acting", default=frozenset())
Host = Callable[[Request], Any]


class PolicyChain:
    """The policies in the order of the settings.

    Args:
        policies: in the order in which they are asked.
        is_cancel: tells the host's Cancel, which some hosts raise as an ordinary exception, from a policy's own failure.
        is_oom: tells that a device ran out of memory.
    """

    def __init__(self, policies: Iterable[Policy] = (), is_cancel: Callable[[BaseException], bool] = lambda error: False,
                 is_oom: Callable[[BaseException], bool] = lambda error: False) -> None:
        self.policies = tuple(policies)
        self._is_cancel, self._is_oom = is_cancel, is_oom

    def answer(self, request: Request, host: Host) -> Any:
        """What the host's caller gets. `host` answers a request itself, and runs at most once, or once more after each
        out-of-memory of a request that repeats."""
        return self._ask(0, request, host)

    def is_oom(self, error: BaseException) -> bool:
        """Whether a device ran out of memory, so that what failed may be repeated."""
        return isinstance(error, OutOfMemory) or self._is_oom(error)

    def wanted(self) -> frozenset[type[Request]]:
        """The kinds of request that some policy has an opinion on."""
        return frozenset().union(*(policy.answers for policy in self.policies))

    def names(self) -> list[str]:
        return [policy.name for policy in self.policies]

    def switch(self, policies: Iterable[Policy]) -> None:
        """Puts other policies in force, and closes those that are gone."""
        before, self.policies = self.policies, tuple(policies)
        for policy in before:
            if policy not in self.policies:
                self._tell(policy, policy.close)

    def prompt_ended(self) -> dict[str, Effect]:
        """Tells every policy, and returns the effects they report."""
        effects = {policy.name: self._tell(policy, policy.prompt_ended) for policy in self.policies}
        return {name: effect for name, effect in effects.items() if effect is not None}

    def emptied(self) -> None:
        for policy in self.policies:
            self._tell(policy, policy.emptied)

    def _tell(self, policy: Policy, call: Callable[[], Any]) -> Any:
        try:
            return call()
        except Exception as error:
            self._failed(policy, call.__name__, error)

    def _ask(self, first: int, request: Request, host: Host) -> Any:
        acting = _acting.get()
        for index in range(first, len(self.policies)):
            policy = self.policies[index]
            if type(request) not in policy.answers or policy.name in acting:
                continue
            try:
                decision = policy.decide(request)
            except Exception as error:
                self._failed(policy, type(request).__name__, error)
                continue
            if decision is not None:
                return self._enact(policy, decision, _Next(self, index + 1, request, host))
        return host(request)

    def _enact(self, policy: Policy, decision: Decision, proceed: _Next) -> Any:
        if decision.reason:
            emit("policy.decided", policy=policy.name, request=type(proceed.request).__name__, reason=decision.reason)
        token = _acting.set(proceed.acting | {policy.name})
        try:
            return decision.act(proceed)
        except Exception as error:
            if error is proceed.error or isinstance(error, Refusal) or self._is_cancel(error):
                raise
            self._failed(policy, type(proceed.request).__name__, error)
            if proceed.ran:
                raise
        finally:
            _acting.reset(token)
        return proceed()

    def _failed(self, policy: Policy, request: str, error: Exception) -> None:
        log.debug("policy %s failed", policy.name, exc_info=error)
        emit("policy.failed", policy=policy.name, request=request, error=f"{type(error).__name__}: {error}")


class _Next:
    """`proceed`: the next in line, who remembers whether it ran and what the host raised at last."""

    def __init__(self, chain: PolicyChain, first: int, request: Request, host: Host) -> None:
        self.request = request
        self.acting = _acting.get()
        self.ran = False
        self.error: BaseException | None = None
        self._chain, self._first, self._host = chain, first, host
        self._repeats = request.repeats

    def __call__(self, request: Request | None = None) -> Any:
        if self.ran:
            self._repeat()
        self.ran, self.error = True, None
        token = _acting.set(self.acting)
        try:
            return self._chain._ask(self._first, request or self.request, self._host)
        except BaseException as error:
            self.error = error
            raise
        finally:
            _acting.reset(token)

    def _repeat(self) -> None:
        if self._repeats == 0 or self.error is None or not self._chain.is_oom(self.error):
            raise RuntimeError("proceed may be called once")
        self._repeats -= 1
