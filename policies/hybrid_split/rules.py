"""Which rule holds for a model: the one that says most about it."""
from __future__ import annotations

import fnmatch
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from ..memory import GB
from .settings import Rule

_WILD = "*?["


@dataclass(frozen=True)
class Subject:
    """What rules ask of a model.

    Attributes:
        names: of its files; none where nobody saw it being loaded.
        component: one of `settings.COMPONENTS`, or "".
        size: bytes of its weights.
    """

    names: tuple[str, ...]
    component: str
    size: int


def best(rules: Sequence[Rule], subject: Subject) -> Rule | None:
    """The most specific rule that holds; of equal ones, the first in the file."""
    return max((rule for rule in rules if _holds(rule, subject)), key=_weight, default=None)


def label(rule: Rule) -> str:
    """A rule as the log calls it: what it asks, in the words of the settings."""
    asked = [rule.name, rule.component, rule.format and f".{rule.format}",
             rule.larger_than_gb and f"> {rule.larger_than_gb:g} GB",
             rule.smaller_than_gb != Rule().smaller_than_gb and f"< {rule.smaller_than_gb:g} GB"]
    return ", ".join(part for part in asked if part and part != "*") or "*"


def limit(rule: Rule | None) -> int | None:
    """Bytes of weights on the device that a rule states by itself; None where it does not."""
    if rule is not None and rule.residency == "host":
        return 0
    return None if rule is None or isinstance(rule.device_gb, str) else int(rule.device_gb * GB)


def _holds(rule: Rule, subject: Subject) -> bool:
    return (rule.component in ("", subject.component) and rule.larger_than_gb * GB <= subject.size
            and subject.size <= rule.smaller_than_gb * GB
            and (rule.name == "*" or any(_matches(name, rule.name) for name in subject.names))
            and (not rule.format or rule.format.lower().lstrip(".") in _formats(subject.names)))


def _matches(name: str, glob: str) -> bool:
    """Case does not matter, as on most users' file systems; nor does the folder, unless the glob has one."""
    name, glob = name.replace("\\", "/").lower(), glob.replace("\\", "/").lower()
    return fnmatch.fnmatchcase(name, glob) or fnmatch.fnmatchcase(name.rpartition("/")[2], glob)


def _formats(names: Iterable[str]) -> set[str]:
    return {os.path.splitext(name)[1].lower().lstrip(".") for name in names}


def _weight(rule: Rule) -> tuple[bool, int, int]:
    """A whole name says more than a glob, a long glob more than a short one, and two conditions more than one."""
    letters = sum(letter not in _WILD for letter in rule.name)
    other = sum((rule.component != "", rule.format != "", rule.larger_than_gb > 0,
                 rule.smaller_than_gb != Rule().smaller_than_gb))
    return not any(letter in _WILD for letter in rule.name), letters, other
