"""The host's own answer to one intercepted call."""
from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from functools import cached_property, partial
from typing import Any


class HostCall:
    """The original with its arguments, bound by name. Runs at most once, if nobody lets it run again after an error.

    Attributes:
        instance: the object whose method it is; None for a function.
        spent: whether it ran, and may not run again.
    """

    def __init__(self, function: Callable[..., Any], instance: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any],
                 signature: inspect.Signature) -> None:
        self.instance = instance
        self.spent = False
        self._function, self._args, self._kwargs, self._signature = function, args, kwargs, signature
        self._repeats = 0
        self._may_repeat: Callable[[BaseException], bool] = lambda error: False

    @cached_property
    def _bound(self) -> inspect.BoundArguments:
        bound = self._signature.bind(*self._args, **self._kwargs)
        bound.apply_defaults()
        return bound

    def __getitem__(self, name: str) -> Any:
        """An argument by its name, or its default.

        Raises:
            KeyError: the host's function has no such parameter.
        """
        return self._bound.arguments[name]

    def arguments(self) -> Mapping[str, Any]:
        """All arguments, with defaults, by name."""
        return dict(self._bound.arguments)

    def may_repeat(self, times: int, after: Callable[[BaseException], bool]) -> None:
        """Lets it run again, so many times, each time after an error of this kind."""
        self._repeats, self._may_repeat = times, after

    def part(self, **changes: Any) -> Callable[[], Any]:
        """The host's answer to a part of what it was asked: with some arguments changed, once, instead of the whole.

        It does not run before it is called, which may be in another thread.
        """
        return partial(HostCall(self._function, self.instance, self._args, self._kwargs, self._signature), **changes)

    def __call__(self, **changes: Any) -> Any:
        """Lets the host answer, with some arguments changed by name. Without changes it gets exactly what it was given.

        Raises:
            RuntimeError: it ran already.
        """
        if self.spent:
            raise RuntimeError("the host answers once")
        self.spent = True
        try:
            return self._run(changes)
        except BaseException as error:
            if self._repeats and self._may_repeat(error):
                self._repeats -= 1
                self.spent = False
            raise

    def _run(self, changes: Mapping[str, Any]) -> Any:
        if not changes:
            return self._function(*self._args, **self._kwargs)
        arguments = {**self._bound.arguments, **changes}
        bound = inspect.BoundArguments(self._signature, arguments)
        return self._function(*bound.args, **bound.kwargs)
