"""What a policy is, and what it answers with.

`decide` is quick and touches nothing, so most of a policy is tested with numbers; `act` is the part that does things.
"""
from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol

import torch

from .requests import Request


class Proceed(Protocol):
    """The answer of the next in line: the other policies, and at last the host.

    Call it at most once; once more after the device ran out of memory, if the request `repeats`. Pass an amended request
    (`dataclasses.replace`) to change what the next in line is asked; the hook translates the change back into the host's
    arguments.
    """

    def __call__(self, request: Request | None = None) -> Any: ...


@dataclass(frozen=True)
class Decision:
    """What a policy will do, and why.

    Attributes:
        reason: a sentence for the user; "" for decisions that come once per module and would drown the log.
        act: does it. Gets `proceed`, returns what the host's caller gets.
    """

    reason: str
    act: Callable[[Proceed], Any]


class Refusal(RuntimeError):
    """An error that a policy raises for the user to read: going on would crash the server or make a wrong image.

    The one error of a policy that is not answered by the host instead.
    """


class OutOfMemory(Refusal, torch.cuda.OutOfMemoryError):
    """A device's memory ran out, and the host is about to go on in another way. It is torch's own to the host too."""


@dataclass(frozen=True)
class Effect:
    """What a policy said it would do since the last prompt, and what was found."""

    predicted_bytes: int
    observed_bytes: int


class Policy:
    """An opinion on the requests that `answers` lists. All methods are optional.

    Attributes:
        name: the module's name, which is also the name in the settings.
        answers: the kinds of request to be asked about; hooks that nobody needs are not installed.
        settings: what it was made with.
    """

    name: ClassVar[str]
    answers: frozenset[type[Request]] = frozenset()
    settings: Any = None

    def start(self) -> None:
        """Called once, before the first request. May raise `Unfit`."""

    def decide(self, request: Request) -> Decision | None:
        """None is no opinion."""
        return None

    def prompt_ended(self) -> Effect | None:
        """Called after each prompt."""
        return None

    def emptied(self) -> None:
        """The user asked for all memory back (`POST /free`)."""

    def close(self) -> None:
        """The policy was turned off."""


class Unfit(Exception):
    """Why a policy cannot run here."""
