"""What makes two loads the same: the files by identity, and every option that the result depends on."""
from __future__ import annotations

from collections.abc import Hashable, Mapping
from enum import Enum
from pathlib import PurePath
from typing import Any

import torch

from ..files.identity import Identity
from ..requests import LoadModel

Key = tuple[Hashable, ...]


class Incomparable(Exception):
    """An option that cannot be compared with another load's. The message names it."""


def identities(paths: tuple[str, ...]) -> tuple[Identity, ...]:
    """The files as they are now, links followed: two names of one file are one.

    Raises:
        OSError: there is no such file.
    """
    return tuple(Identity.of(path) for path in paths)


def of(request: LoadModel, files: tuple[Hashable, ...]) -> Key:
    """
    Raises:
        Incomparable: an option is an object of a kind that we do not know.
    """
    options = {name: value for name, value in request.options.items() if name != "disable_dynamic"}
    return (request.kind, files, plain(options, "options"))


def plain(value: Any, name: str) -> Hashable:
    """A value as something that can be compared; `1`, `1.0` and `True` differ.

    Raises:
        Incomparable: it, or something in it, is of another kind.
    """
    if value is None or isinstance(value, (bool, int, float, str, bytes)):
        return (type(value).__name__, value)
    if isinstance(value, (torch.dtype, torch.device, PurePath)):
        return (type(value).__name__, str(value))
    if isinstance(value, Enum):
        return (type(value).__qualname__, value.name)
    if isinstance(value, (list, tuple)):
        return ("list", *(plain(item, f"{name}[{index}]") for index, item in enumerate(value)))
    if isinstance(value, Mapping):
        return ("table", *sorted((str(key), plain(item, f"{name}.{key}")) for key, item in value.items()))
    raise Incomparable(f"{name} is a {type(value).__name__}, which cannot be compared")
