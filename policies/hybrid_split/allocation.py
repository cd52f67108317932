"""Where a model's weights live, as users write it: `cuda:0,8gb;cuda:1,3gb;cpu,*`.

The grammar is the one of ComfyUI-MultiGPU's DisTorch, so that its strings can be carried over. Each part is a device, and how
much of the model it holds at most: bytes (`8gb`, `500mb`), a percentage of the model (`25%`), a fraction of the device's own
memory (`0.5`), or the rest (`*`). What the model's own device does not hold goes to the others in the order of the string, and
in the end to RAM.
"""
from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

RAM = "cpu"
_UNITS = {"b": 1, "k": 2**10, "kb": 2**10, "m": 2**20, "mb": 2**20, "g": 2**30, "gb": 2**30}
_OF_MODEL = ("percent", "rest")
_LARGEST = 2**60  # an exabyte
_DEVICE = re.compile(r"[a-z]+(:\d{1,3})?")
_AMOUNT = re.compile(r"(\d+\.?\d*|\.\d+)([a-z%]*)")
_FORM = "write it like cuda:0,8gb;cuda:1,25%;cpu,*"

TotalOf = Callable[[str], int]  # the bytes of a device's memory; 0 for one that is not there


def normal(device: str) -> str:
    """A device's name with its number, as two names must be written to be compared: `cuda` is `cuda:0`, RAM has no number."""
    kind, _, index = device.partition(":")
    return RAM if kind == RAM else f"{kind}:{int(index or 0)}"


class Share(NamedTuple):
    """What a device holds at most.

    Attributes:
        of_model: this much of each model; else it is a limit for all models together.
    """

    device: str
    bytes: int
    of_model: bool


@dataclass(frozen=True)
class Place:
    """One part of the string.

    Attributes:
        unit: "bytes", "percent" of the model, "fraction" of the device's memory, or "rest".
    """

    device: str
    amount: float
    unit: str

    def bytes_of(self, model_bytes: int, total_of: TotalOf) -> int:
        """What the device holds at most; nothing for the rest."""
        whole = {"bytes": 1, "percent": model_bytes / 100, "fraction": 0, "rest": 0}[self.unit]
        return int(self.amount * (total_of(self.device) if self.unit == "fraction" else whole))


@dataclass(frozen=True)
class Allocation:
    """The parts, in the order of the string. One without parts says nothing, and is false."""

    places: tuple[Place, ...] = ()

    def __bool__(self) -> bool:
        return bool(self.places)

    @classmethod
    def parse(cls, text: str) -> Allocation:
        """Reads a string; spaces and case do not matter.

        Raises:
            ValueError: it means nothing. The message names the part and the cure.
        """
        places: list[Place] = []
        for part in filter(None, "".join(text.lower().split()).split(";")):
            place = _place(part)
            if any(place.device == other.device for other in places):
                raise ValueError(f"'{part}': {place.device} is there twice, name each device once")
            if place.unit == "rest" and any(other.unit == "rest" for other in places):
                raise ValueError(f"'{part}': only one device can hold the rest ('*')")
            places.append(place)
        percent = sum(place.amount for place in places if place.unit == "percent")
        if percent > 100:
            raise ValueError(f"'{text}': the percentages add up to {percent:g}, a model has 100")
        if places and not any(place.device == RAM or place.unit == "rest" for place in places):
            places.append(Place(RAM, 0, "rest"))
        return cls(tuple(places))

    def bytes_for(self, device: str, model_bytes: int, total_of: TotalOf) -> int | None:
        """How much of a model a device holds at most; None where the string does not name it.

        Args:
            device: the one that the model runs on.
        """
        place = next((place for place in self.places if place.device == normal(device)), None)
        if place is None:
            return None
        if place.unit != "rest":
            return place.bytes_of(model_bytes, total_of)
        return model_bytes - min(model_bytes, self._taken(place, model_bytes, total_of))

    def donors(self, compute: str, model_bytes: int, total_of: TotalOf) -> list[Share]:
        """The shares of all places but the model's own device, RAM among them, in the order in which they fill.

        The rest is all that the other places leave, so that a device of its own that stays short of its share costs nothing.
        """
        others = Allocation(tuple(place for place in self.places if place.device != normal(compute)))
        return [Share(place.device, others.bytes_for(place.device, model_bytes, total_of) or 0, place.unit in _OF_MODEL)
                for place in others.places]

    def _taken(self, rest: Place, model_bytes: int, total_of: TotalOf) -> int:
        return sum(place.bytes_of(model_bytes, total_of) for place in self.places if place is not rest)


def _place(part: str) -> Place:
    device, *amounts = part.split(",")
    if len(amounts) != 1:
        raise ValueError(f"'{part}' must be a device, one comma and an amount: {_FORM}")
    if not _DEVICE.fullmatch(device):
        raise ValueError(f"'{part}': '{device}' is no device, write it like cuda:1 or cpu")
    device, text = normal(device), amounts[0]
    if text == "*":
        return Place(device, 0, "rest")
    found = _AMOUNT.fullmatch(text)
    if found is None:
        raise ValueError(f"'{part}': '{text}' is no amount: {_FORM}")
    number, unit = float(found[1]), found[2]
    if unit == "%":
        if number > 100:
            raise ValueError(f"'{part}' is more than the whole model, 100% is all of it")
        return Place(device, number, "percent")
    if not unit:
        if number > 1:
            raise ValueError(f"'{part}': {text} of what? Write {text}gb, {text}%, or a fraction of the device's memory up to 1")
        return Place(device, number, "fraction")
    if unit not in _UNITS:
        raise ValueError(f"'{part}': unknown unit '{unit}'; known are gb, mb, kb, b and %")
    if number * _UNITS[unit] > _LARGEST:
        raise ValueError(f"'{part}' is more than any device has")
    return Place(device, number * _UNITS[unit], "bytes")
