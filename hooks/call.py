"""The host's own answer to one intercepted call."""
from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from functools import cached_property
from typing import Any


class HostCall:
    """The original with its arguments, bound by name. Runs at most once.

    Attributes:
        instance: the object whose method it is; None for a function.
        spent: whether it ran.
    """

    def __init__(self, function: Callable[..., Any], instance: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any],
                 signature: inspect.Signature) -> None:
        self.instance = instance
        self.spent = False
        self._function, self._args, self._kwargs, self._signature = function, args, kwargs, signature

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

    def __call__(self, **changes: Any) -> Any:
        """Lets the host answer, with some arguments changed by name. Without changes it gets exactly what it was given.

        Raises:
            RuntimeError: it ran already.
        """
        if self.spent:
            raise RuntimeError("the host answers once")
        self.spent = True
        if not changes:
            return self._function(*self._args, **self._kwargs)
        self._bound.arguments.update(changes)
        return self._function(*self._bound.args, **self._bound.kwargs)
