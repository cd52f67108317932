"""A named place in the host, and what we rely on there.

A seam is guarded by shape, not by version: it resolves where every parameter that we use by name exists, and declines with a
reason otherwise.
"""
from __future__ import annotations

import importlib
import inspect
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any


class Declined(Exception):
    """Why a seam cannot be used here."""


class Absent(Declined):
    """There is no such function."""


@dataclass(frozen=True)
class Site:
    """Where a seam was found: the object that holds the attribute, its name, what was there, and its parameters."""

    owner: Any
    name: str
    original: Callable[..., Any]
    signature: inspect.Signature


@dataclass(frozen=True)
class Seam:
    """
    Attributes:
        module: the host's module.
        path: a function, or `Class.method`.
        needs: parameters that we read or change by name.
        aliases: `module:name` of other places that hold the same function because they imported it by name.
        optional: some versions of the host have no such function, and nothing is lost there.
    """

    module: str
    path: str
    needs: tuple[str, ...] = ()
    aliases: tuple[str, ...] = ()
    optional: bool = False

    @property
    def name(self) -> str:
        return f"{self.module}.{self.path}"

    def resolve(self) -> Site:
        """Finds the attribute where it is defined.

        Raises:
            Declined: the module, the attribute or a parameter is not there, or the parameters cannot be read.
        """
        try:
            owner: Any = importlib.import_module(self.module)
        except ImportError as error:
            raise Declined(f"no module {self.module}: {error}") from None
        *classes, name = self.path.split(".")
        for part in classes:
            owner = vars(owner).get(part)
            if owner is None:
                raise Declined(f"{self.module} has no {part}")
        # vars, not getattr: an inherited method would be wrapped on the subclass, and removing that leaves a stray attribute.
        original = vars(owner).get(name)
        if not callable(original):
            raise Absent(f"{self.module} has no {self.path} of its own")
        try:
            signature = inspect.signature(original)
        except (TypeError, ValueError) as error:  # somebody put a compiled function there
            raise Declined(f"{self.name} does not tell its parameters: {error}") from None
        if classes:
            signature = signature.replace(parameters=list(signature.parameters.values())[1:])
        missing = [need for need in self.needs if need not in signature.parameters]
        if missing:
            raise Declined(f"{self.name} has no parameter {', '.join(missing)}; it takes {signature}")
        return Site(owner, name, original, signature)

    def copies(self) -> Iterator[tuple[Any, str]]:
        """The (module, name) of each alias whose module is imported. The others will import what they find."""
        for alias in self.aliases:
            module, _, name = alias.partition(":")
            if module in sys.modules and hasattr(sys.modules[module], name):
                yield sys.modules[module], name
