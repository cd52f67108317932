"""Installs hooks, removes them, and keeps the ledger of what became of each.

wrapt has no unwrap that minds its neighbours, so removing is ours: where our wrapper is on top the original goes back, and
where somebody wrapped on top of us we stay as a plain pass-through (*retired*).
"""
from __future__ import annotations

import inspect
import time
from collections.abc import Callable, Collection, Generator, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import wrapt

from ..policies.requests import Request
from ..telemetry import emit, log
from .call import HostCall
from .seam import Absent, Declined, Seam, Site

# wrapt keeps names with this prefix on the wrapper; any other would be set on the host's function.
_MARK = "_self_residency_hook"

Answer = Callable[[Request, Callable[[Request], Any]], Any]


@dataclass(frozen=True)
class Hook:
    """A seam, and how its calls become requests.

    Attributes:
        asks: the kind of request.
        translate: the request for a call; None where there is nothing to ask.
        amend: the host's arguments that a changed request stands for.
        instead: another function of the host's, which answers a changed request.
        report: tells telemetry, after the host answered: (call, request, answer, seconds). A hook that reports is always
            installed; one that does not, only while a policy answers its requests.
    """

    seam: Seam
    asks: type[Request]
    translate: Callable[[HostCall], Request | None]
    amend: Callable[[Any], dict[str, Any]] | None = None
    instead: Callable[[Any], Any] | None = None
    report: Callable[[HostCall, Any, Any, float], None] | None = None

    @property
    def name(self) -> str:
        return self.seam.name


@dataclass
class Entry:
    """A line of the ledger. `state` is new, installed, declined, removed or retired."""

    hook: Hook
    state: str = "new"
    reason: str = ""
    hits: int = 0
    armed: bool = False
    shadowed: bool = False
    site: Site | None = field(default=None, repr=False)
    wrapper: Any = field(default=None, repr=False)


class HookRegistry:
    """All hooks of the plugin.

    Args:
        hooks: in the order in which they are installed.
        answer: what to do with a request, given the host's own answer.
        is_oom: tells that a device ran out of memory, after which the host may answer again where the request says so.
    """

    def __init__(self, hooks: Iterable[Hook], answer: Answer,
                 is_oom: Callable[[BaseException], bool] = lambda error: False) -> None:
        self._answer, self._is_oom = answer, is_oom
        self._probing = False
        self.entries = {hook.name: Entry(hook) for hook in hooks}

    def sync(self, wanted: Collection[type[Request]] | None) -> None:
        """Installs what telemetry or a policy needs now, and removes the rest; None is nothing at all."""
        for entry in self.entries.values():
            needed = wanted is not None and (entry.hook.report is not None or entry.hook.asks in wanted)
            if needed and not entry.armed and entry.state != "declined":
                self._install(entry)
            elif not needed and entry.wrapper is not None:
                self._remove(entry)

    def add(self, hooks: Iterable[Hook], wanted: Collection[type[Request]]) -> None:
        """Takes in hooks whose seams came into being later, and installs those that are needed."""
        new = [hook for hook in hooks if hook.name not in self.entries]
        if new:
            self.entries.update({hook.name: Entry(hook) for hook in new})
            self.sync(wanted)

    def remove_all(self) -> None:
        """Leaves nothing behind, where nobody wrapped on top of us."""
        for entry in reversed(self.entries.values()):
            if entry.wrapper is not None:
                self._remove(entry)

    def report(self) -> list[tuple[str, str, str]]:
        """(hook, state, reason) of every hook: the first thing to paste into a bug report."""
        return [(name, entry.state, entry.reason) for name, entry in self.entries.items()]

    def tell(self) -> None:
        """Tells telemetry which hooks are in, and which of them were seen to fire."""
        for entry in self.entries.values():
            if entry.armed:
                emit("hook.installed", hook=entry.hook.name, exercised=entry.hits > 0)

    @contextmanager
    def probing(self) -> Generator[None, None, None]:
        """While inside, hooks count the calls that reach them and do nothing else."""
        self._probing = True
        try:
            yield
        finally:
            self._probing = False

    def check_reach(self) -> None:
        """Says once of each hook that somebody replaced what it wrapped."""
        for entry in self.entries.values():
            if entry.armed and not entry.shadowed and entry.site is not None:
                current = vars(entry.site.owner).get(entry.site.name)
                if not any(layer is entry.wrapper for layer in _layers(current)):
                    entry.shadowed = True
                    emit("hook.shadowed", hook=entry.hook.name, by=getattr(current, "__module__", None) or repr(current))

    def _install(self, entry: Entry) -> None:
        if entry.state != "retired":  # a retired one is still in the chain, under somebody's wrapper
            self._wrap(entry)
        if entry.site is not None and entry.wrapper is not None:
            _replace_copies(entry.hook.seam, entry.site.original, entry.wrapper)
            entry.armed, entry.state = True, "installed"

    def _wrap(self, entry: Entry) -> None:
        try:
            entry.site = site = entry.hook.seam.resolve()
            if any(getattr(layer, _MARK, False) for layer in _layers(site.original)):
                raise Declined("a second copy of this plugin wrapped it already; remove one folder from custom_nodes")
        except Declined as declined:
            entry.state, entry.reason = "declined", str(declined)
            if not (entry.hook.seam.optional and isinstance(declined, Absent)):
                emit("hook.declined", hook=entry.hook.name, reason=entry.reason)
            return
        entry.wrapper = wrapt.FunctionWrapper(site.original, self._intercept(entry), enabled=lambda: entry.armed)
        setattr(entry.wrapper, _MARK, True)
        setattr(site.owner, site.name, entry.wrapper)

    def _remove(self, entry: Entry) -> None:
        entry.armed = False
        site, wrapper = entry.site, entry.wrapper
        if site is None:
            return
        _replace_copies(entry.hook.seam, wrapper, site.original)
        on_top = vars(site.owner).get(site.name) is wrapper
        if on_top:
            setattr(site.owner, site.name, site.original)
            entry.wrapper = None
        if entry.state == "declined":  # it failed: taken out, and not tried again
            return
        if not on_top and entry.state != "retired":
            emit("hook.retired", hook=entry.hook.name)
        entry.state = "removed" if on_top else "retired"

    def _intercept(self, entry: Entry) -> Callable[..., Any]:
        hook, site = entry.hook, entry.site
        assert site is not None
        is_method = inspect.isclass(site.owner)

        def wrapper(wrapped: Callable[..., Any], instance: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            entry.hits += 1
            if is_method and instance is None and args:  # called as it lies in the class, not through an instance
                wrapped, instance, args = partial(wrapped, args[0]), args[0], args[1:]
            if self._probing or (is_method and not isinstance(instance, site.owner)):
                return wrapped(*args, **kwargs)
            call = HostCall(wrapped, instance, args, kwargs, site.signature)
            try:
                request = hook.translate(call)
            except Exception as error:
                answer = call()  # a caller's own mistake is the host's to refuse; where it does not, our reading is wrong
                self._disarm(entry, error)
                return answer
            if request is None:
                return call()
            if request.repeats:
                call.may_repeat(request.repeats, self._is_oom)
            started = time.perf_counter()
            answer = self._answer(request, lambda asked: self._host(entry, call, request, asked))
            if hook.report is not None:
                try:
                    hook.report(call, request, answer, time.perf_counter() - started)
                except Exception as error:  # the host has answered; only our log line is lost
                    self._disarm(entry, error)
            return answer

        return wrapper

    def _host(self, entry: Entry, call: HostCall, request: Request, asked: Request) -> Any:
        if asked is not request and entry.hook.instead is not None:
            return entry.hook.instead(asked)
        return call(**self._changes(entry, request, asked))

    def _changes(self, entry: Entry, request: Request, asked: Request) -> dict[str, Any]:
        """The arguments that a policy changed, by the host's names."""
        if asked is request or entry.hook.amend is None:
            return {}
        try:
            return entry.hook.amend(asked)
        except Exception as error:  # the host answers what it was asked
            self._disarm(entry, error)
            return {}

    def _disarm(self, entry: Entry, error: Exception) -> None:
        entry.armed, entry.state, entry.reason = False, "declined", f"{type(error).__name__}: {error}"
        log.debug("hook %s failed", entry.hook.name, exc_info=error)
        emit("hook.failed", hook=entry.hook.name, error=entry.reason)


def _replace_copies(seam: Seam, old: Any, new: Any) -> None:
    for module, name in seam.copies():
        if getattr(module, name) is old:
            setattr(module, name, new)


def _layers(function: Any) -> Iterator[Any]:
    while function is not None:
        yield function
        yield getattr(function, "_self_parent", None)  # wrapt: the wrapper itself, where it was found through its class
        function = getattr(function, "__wrapped__", None)
