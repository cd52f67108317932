"""`gguf.GGUFReader`, but for what nobody asks: it makes four objects for each string of a vocabulary, we make none.

Whatever is asked for is built by the original's own code, from the same bytes. What our parser refuses, or the original
would, is the original's to read from the start, so that its errors are the caller's.
"""
from __future__ import annotations

import sys
from collections import OrderedDict
from collections.abc import Callable, ItemsView, Mapping, ValuesView
from functools import cached_property, partial
from typing import Any

import numpy as np

from .gguf_header import GGUFError, Header
from .gguf_values import ARRAY, Place

_PARTS = ("_build_fields", "_build_tensor_info", "_build_tensors")


def lazy_reader(original: type[Any]) -> type[Any]:
    """A subclass of `gguf.GGUFReader`, as 0.19 has it, that builds fields and tensors when they are looked at.

    A reader of another make comes back as it is, and so does a lazy one. Files opened for writing are the original's.
    """
    if hasattr(original, "_table") or not all(hasattr(original, name) for name in _PARTS):
        return original
    names = original._build_fields.__globals__
    array_field, types = _array_field(names["ReaderField"]), names["GGUFValueType"]

    class LazyReader(original):  # type: ignore[misc]
        _table: Any = None  # where the tensors' entries begin, and how many
        _end: Any = None  # where they end; None where the original reads
        fields: Any

        # The original's __init__ calls these three in turn, with what it has checked: magic, version and counts.
        def _build_fields(self, offs: int, count: int) -> int:
            header = _header(self)
            if header is None:
                return super()._build_fields(offs, count)  # type: ignore[no-any-return]
            self.fields = LazyFields(self.fields)
            self.fields.defer(header.kv.places, _builder(original, array_field, types, self.data))
            self._table, self._end = (header.table, len(header.tensors)), header.end
            return header.table

        def _build_tensor_info(self, offs: int, count: int) -> tuple[Any, list[Any]]:
            return super()._build_tensor_info(offs, count) if self._end is None else (self._end, [])

        def _build_tensors(self, start_offs: int, fields: list[Any]) -> None:
            if self._end is None:
                super()._build_tensors(start_offs, fields)
            else:
                del self.tensors  # the empty list that the original began with

        @cached_property
        def tensors(self) -> list[Any]:
            super()._build_tensors(self.data_offset, super()._build_tensor_info(*self._table)[1])  # which assigns `tensors`
            return self.__dict__["tensors"]  # type: ignore[no-any-return]

    return LazyReader


def _header(reader: Any) -> Header | None:
    """What we read in the reader's own mapping; None for what is the original's to read."""
    if sys.byteorder != "little" or getattr(reader.data, "mode", "") != "r":
        return None
    try:
        header = Header.parse(memoryview(reader.data), "", reader.data.nbytes)
    except GGUFError:
        return None
    # The original keeps counts among the fields, and fails at tensors without dimensions of types that it views as bytes.
    twice = header.kv.places.keys() & reader.fields.keys()
    return None if twice or any(not tensor.shape for tensor in header.tensors.values()) else header


def _builder(original: type[Any], array_field: type[Any], types: Any, data: Any) -> Callable[[str, Place], Any]:
    """Builds one field. It knows the mapping and not the reader, which would keep itself alive."""

    def real(key: str, place: Place) -> Any:
        scratch = object.__new__(original)
        # A memmap takes most of the time to slice; parts of arrays are plain views of it instead.
        scratch.data, scratch.fields = np.asarray(data) if place.kind == ARRAY else data, OrderedDict()
        scratch._build_fields(place.pair, 1)
        return scratch.fields[key]

    def build(key: str, place: Place) -> Any:
        if place.kind != ARRAY or not place.length:
            return real(key, place)
        field = array_field(place.pair, key, [], [], [types(place.kind), types(place.element)])
        field.build = partial(real, key, place)
        return field

    return build


def _array_field(base: type[Any]) -> type[Any]:
    """A `ReaderField` whose parts are built when they are looked at: its name and types alone are looked at more often."""

    class ArrayField(base):  # type: ignore[misc]
        build: Callable[[], Any]

        @cached_property
        def _real(self) -> Any:
            return self.build()

        @property
        def parts(self) -> Any:
            return self._real.parts

        @property
        def data(self) -> Any:
            return self._real.data

        def __iter__(self) -> Any:
            return iter(self._real)

        def __getitem__(self, index: Any) -> Any:
            return self._real[index]

        def _replace(self, **changes: Any) -> Any:
            return self._real._replace(**changes)

        def __repr__(self) -> str:
            return repr(self._real)

        def __reduce__(self) -> Any:
            return base, tuple(self)

    return ArrayField


class LazyFields(OrderedDict[str, Any]):
    """A reader's fields; each is built once it is looked at. Keys, length and order cost nothing."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self._deferred: dict[str, tuple[Place, Callable[[str, Place], Any]]] = {}
        super().__init__(*args, **kwargs)

    def defer(self, places: Mapping[str, Place], build: Callable[[str, Place], Any]) -> None:
        """Adds fields to be built later."""
        for key, place in places.items():
            self[key] = None
            self._deferred[key] = place, build

    def __getitem__(self, key: str) -> Any:
        if key in self._deferred:
            place, build = self._deferred[key]
            self[key] = build(key, place)
        return super().__getitem__(key)

    def __setitem__(self, key: str, value: Any) -> None:
        super().__setitem__(key, value)
        self._deferred.pop(key, None)

    def __delitem__(self, key: str) -> None:
        super().__delitem__(key)
        self._deferred.pop(key, None)

    def get(self, key: str, default: Any = None) -> Any:
        return self[key] if key in self else default  # noqa: SIM401  it is what `get` does

    def values(self) -> ValuesView[Any]:  # type: ignore[override]
        self._build()
        return super().values()

    def items(self) -> ItemsView[str, Any]:  # type: ignore[override]
        self._build()
        return super().items()

    def pop(self, key: str, *default: Any) -> Any:
        self.get(key)
        return super().pop(key, *default)

    def popitem(self, last: bool = True) -> tuple[str, Any]:
        self._build()
        return super().popitem(last)

    def clear(self) -> None:
        super().clear()
        self._deferred.clear()

    def copy(self) -> Any:
        return OrderedDict(self.items())

    def __eq__(self, other: object) -> bool:
        self._build()
        return super().__eq__(other)

    def __reduce__(self) -> Any:
        return OrderedDict, (list(self.items()),)

    def _build(self) -> None:
        for key in list(self._deferred):
            self[key]
