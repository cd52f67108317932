"""TOML to frozen dataclasses.

The shipped `settings.toml` is complete and is the reference; the user's file wins key by key. An unknown key, a wrong
type or a value outside its choices is an error that names the file, the dotted key and, for a typo, the nearest match.
"""
from __future__ import annotations

import dataclasses
import difflib
import logging
import sys
import typing
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

T = TypeVar("T")
Auto = typing.Union[float, str]  # gigabytes, or "auto"
LARGEST = 10**12  # in any unit more than anybody means; TOML also has inf and nan
AUTO: dict[str, Any] = {"choices": ("auto",), "minimum": 0}


class SettingsError(Exception):
    """A settings file that cannot be used. The message names the file, the key and the cure."""


@dataclass(frozen=True)
class Telemetry:
    console: str = field(default="info", metadata={"choices": ("off", "info", "debug")})
    file: str = "telemetry.jsonl"
    max_mb: float = field(default=16, metadata={"minimum": 1})
    keep: int = field(default=4, metadata={"minimum": 1})


@dataclass(frozen=True)
class Memory:
    ram_gb: Auto = field(default="auto", metadata=AUTO)
    pinned_gb: Auto = field(default="auto", metadata=AUTO)
    pad_gb: Auto = field(default="auto", metadata={**AUTO, "old": "system_ram_pad_gb"})


@dataclass(frozen=True)
class Settings:
    """Everything a user can choose. `tables` holds each policy's own settings, by its name."""

    enabled: bool = True
    policies: tuple[str, ...] = ("hybrid_split", "preload_cache", "zero_copy")
    telemetry: Telemetry = Telemetry()
    memory: Memory = Memory()
    tables: Mapping[str, Any] = field(default_factory=dict, metadata={"table": False})
    origin: str = field(default="settings.toml", metadata={"table": False})


def load(files: Iterable[Path], policies: Mapping[str, type[Any]]) -> Settings:
    """Reads the files in order, later ones winning key by key; one that does not exist is skipped.

    Args:
        policies: each policy's name and its settings dataclass.

    Raises:
        SettingsError: a file cannot be read, is no TOML, or holds a key or a value that means nothing.
    """
    merged, origin = dict[str, Any](), "settings.toml"
    for file in files:
        table = _read(file)
        if table is None:
            continue
        origin = str(file)
        _check(table, policies, origin)
        _merge(merged, _renamed(table))
    tables = {name: fill(kind, merged.pop(name, {}), origin, f"{name}.") for name, kind in policies.items()}
    return dataclasses.replace(fill(Settings, merged, origin), tables=tables, origin=origin)


class Watch:
    """The settings in force, and whether the files have changed since.

    Args:
        files: the shipped file, then the user's.

    Raises:
        SettingsError: at first reading only.
    """

    def __init__(self, files: Sequence[Path], policies: Mapping[str, type[Any]]) -> None:
        self._files, self._policies = files, policies
        self._stamps = [*map(_stamp, files)]
        self.now = load(files, policies)

    def changed(self) -> bool:
        """Reads the files again if they were touched. Files that cannot be used keep the last good settings in force."""
        stamps = [*map(_stamp, self._files)]
        if stamps == self._stamps:
            return False
        self._stamps = stamps
        try:
            self.now = load(self._files, self._policies)
        except SettingsError as error:
            logging.getLogger("residency").error("[residency] %s. The last good settings stay.", str(error).rstrip("."))
            return False
        return True


def fill(kind: type[T], table: Mapping[str, Any], origin: str, prefix: str = "") -> T:
    """Makes a settings dataclass from a TOML table.

    Args:
        kind: a frozen dataclass. A field's metadata may hold `choices` (strings), `minimum`, `maximum`, `check`, which raises a
            `ValueError` with the cure, `parse`, which makes the value and raises likewise, `key` where TOML's name is no name
            in Python, and `old`, another name that is taken too.
            A field without a default must be there.
        origin: the file, for messages.
        prefix: the dotted path of the table, with its dot.

    Raises:
        SettingsError: an unknown or missing key, a wrong type, a value outside its choices or its range.
    """
    hints = typing.get_type_hints(kind)
    known = {f.metadata.get("key", f.name): f for f in dataclasses.fields(typing.cast(Any, kind))
             if f.metadata.get("table", True)}
    old = {f.metadata["old"]: f for f in known.values() if "old" in f.metadata}
    values: dict[str, Any] = {}
    for key, value in table.items():
        slot = known.get(key) or old.get(key)
        if slot is None:
            raise SettingsError(f"{origin}: unknown key '{prefix}{key}'{nearest(key, known)}")
        if slot.name in values:
            raise SettingsError(f"{origin}: '{prefix}{slot.name}' is there twice, once as '{slot.metadata['old']}'")
        values[slot.name] = _convert(hints[slot.name], value, slot.metadata, f"{origin}: '{prefix}{key}'", f"{prefix}{key}.")
    missing = [key for key, slot in known.items() if slot.default is slot.default_factory is dataclasses.MISSING
               and slot.name not in values]
    if missing:
        raise SettingsError(f"{origin}: '{prefix}{missing[0]}' is missing")
    return kind(**values)


def nearest(word: str, known: Iterable[str]) -> str:
    """', perhaps you meant …' for a typo, else the list of what there is."""
    names = sorted(known)
    match = difflib.get_close_matches(word, names, n=1)
    return f", perhaps you meant '{match[0]}'" if match else f"; known are {', '.join(names) or 'none'}"


def _convert(hint: Any, value: Any, limits: Mapping[str, Any], where: str, prefix: str) -> Any:
    if "parse" in limits:
        return _parse(limits["parse"], value, where)
    if dataclasses.is_dataclass(hint):
        if isinstance(value, dict):
            return fill(typing.cast(Any, hint), value, where.rpartition(": '")[0], prefix)
        raise SettingsError(f"{where} is a table, write [{prefix[:-1]}]")
    inner = typing.get_args(hint)[:1]
    if inner and dataclasses.is_dataclass(inner[0]):
        if not isinstance(value, list) or not all(isinstance(item, dict) for item in value):
            raise SettingsError(f"{where} is a list of tables, write [[{prefix[:-1]}]]")
        return tuple(_convert(inner[0], item, {}, where, prefix) for item in value)
    choices = limits.get("choices")
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if hint is Auto:
        unit = "" if "maximum" in limits else " of gigabytes"
        ok, wanted = number or value in (choices or ()), f'"auto" or a number{unit}'
    elif hint is float:
        ok, wanted = number, "a number"
    elif hint is int:
        ok, wanted = number and isinstance(value, int), "a whole number"
    elif hint is bool:
        ok, wanted = isinstance(value, bool), "true or false"
    elif hint is str:
        ok = isinstance(value, str) and (choices is None or value in choices)
        wanted = "one of " + ", ".join(f'"{c}"' for c in choices) if choices else "a string"
    else:
        ok, wanted = isinstance(value, list) and all(isinstance(v, str) for v in value), "a list of strings"
        value = tuple(value) if ok else value
    least, most = limits.get("minimum", -LARGEST), limits.get("maximum", LARGEST)
    if ok and number and not least <= value <= most:
        ok = False
        wanted += f" from {least} to {most}" if "maximum" in limits else f" of at least {least}" if value < least \
            else f" of at most {LARGEST}"
    if not ok:
        raise SettingsError(f"{where} must be {wanted}, not {value!r}")
    if "check" in limits:
        _parse(limits["check"], value, where)
    return value


def _parse(parse: Any, value: Any, where: str) -> Any:
    try:
        return parse(value)
    except ValueError as error:
        raise SettingsError(f"{where}: {error}") from None


def _stamp(file: Path) -> int:
    try:
        return file.stat().st_mtime_ns
    except OSError:  # no such file, or it went away just now
        return 0


def _read(file: Path) -> dict[str, Any] | None:
    try:
        table: dict[str, Any] = tomllib.loads(file.read_text(encoding="utf-8-sig"))
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (ValueError, RecursionError) as error:  # not TOML, not UTF-8, a number too long to read, or nested too deeply
        raise SettingsError(f"{file}: this is not TOML: {error}. "
                            "Mend the line, or delete the file to get the defaults back.") from None
    except OSError as error:
        raise SettingsError(f"{file}: cannot be read: {error.strerror}") from None
    return table


def _check(table: Mapping[str, Any], policies: Mapping[str, type[Any]], origin: str) -> None:
    """Checks one file by itself, so that an error names the file that holds it."""
    own = {name: value for name, value in table.items() if name not in policies}
    fields = [f.name for f in dataclasses.fields(Settings) if f.metadata.get("table", True)]
    for key in own:
        if key not in fields:
            raise SettingsError(f"{origin}: unknown key '{key}'{nearest(key, [*fields, *policies])}")
    fill(Settings, own, origin)
    for name in own.get("policies", ()):
        if name not in policies:
            raise SettingsError(f"{origin}: 'policies' names '{name}', which does not exist{nearest(name, policies)}")
        if own["policies"].count(name) > 1:
            raise SettingsError(f"{origin}: 'policies' names '{name}' twice")
    for name, kind in policies.items():
        if not isinstance(table.get(name, {}), dict):
            raise SettingsError(f"{origin}: '{name}' is a table, write [{name}]")
        fill(kind, table.get(name, {}), origin, f"{name}.")


def _renamed(table: dict[str, Any]) -> dict[str, Any]:
    """The table with today's names, so that files that use different ones are merged."""
    memory = {f.metadata["old"]: f.name for f in dataclasses.fields(Memory) if "old" in f.metadata}
    if "memory" in table:
        table["memory"] = {memory.get(key, key): value for key, value in table["memory"].items()}
    return table


def _merge(into: dict[str, Any], table: Mapping[str, Any]) -> None:
    for key, value in table.items():
        if isinstance(value, dict) and isinstance(into.get(key), dict):
            _merge(into[key], value)
        else:
            into[key] = value
