"""Constant tables, each on a device once.

Several small integers that are looked up together are packed into one wide one: looking up a 64-bit number is many times as
fast as looking up a row of eight bytes.
"""
from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch._subclasses import FakeTensor
from torch.utils._python_dispatch import _disable_current_modes

# (table, device) -> table; what is here stays.
_resident: dict[tuple[object, torch.device], torch.Tensor] = {}

_FP4 = (0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12)  # e2m1, doubled
_IQ4 = (-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113)  # kvalues_iq4nl of ggml-common.h


def table(name: str, like: torch.Tensor) -> torch.Tensor:
    """The table of this name, on the device of `like`: one dimension, contiguous."""
    if torch.compiler.is_compiling():
        constant: torch.Tensor = _CONSTANTS[name](like.device)
        return constant
    return _table(name, _BUILDERS[name], like)


def numbers(values: tuple[int, ...], like: torch.Tensor) -> torch.Tensor:
    """These numbers in the dtype of `like`, on its device."""
    if torch.compiler.is_compiling():
        return torch.tensor(values, dtype=like.dtype, device=like.device)
    dtype = like.dtype
    return _table((values, dtype), lambda: torch.tensor(values, dtype=dtype), like)


def _table(key: object, build: Callable[[], torch.Tensor], like: torch.Tensor) -> torch.Tensor:
    if isinstance(like, FakeTensor):  # belongs to a trace, and ends with it
        return build().to(like.device)
    return _kept(key, build, like.device)


def _kept(key: object, build: Callable[[], torch.Tensor], device: torch.device) -> torch.Tensor:
    found = _resident.get((key, device))
    if found is None:
        # A normal tensor may be used inside of inference mode, an inference tensor not everywhere outside of it. What is built
        # while somebody traces would be part of the trace.
        with _disable_current_modes(), torch.inference_mode(False):
            found = _resident.setdefault((key, device), build().to(device))
    return found


def _constant(name: str) -> Callable[[torch.device], torch.Tensor]:
    """What the compiler takes as a constant, from an ordinary call while it traces. It tells constants apart by the names in
    the code that they come from, and fails on two of one name."""
    def found(device: torch.device) -> torch.Tensor:
        return _kept(name, _BUILDERS[name], device)

    found.__code__ = found.__code__.replace(co_name=f"table_{name}".replace(" ", "_"))
    marked: Callable[[torch.device], torch.Tensor] = torch.compiler.assume_constant_result(found)  # type: ignore[no-untyped-call]
    return marked


def _packed(entries: Any, dtype: torch.dtype) -> torch.Tensor:
    """Rows of 8-bit integers, each as one number of this dtype."""
    return torch.tensor(entries, dtype=torch.int8).view(dtype).view(-1)


def _pairs(values: tuple[int, ...]) -> torch.Tensor:
    """Two 4-bit codes at once: entry `high * 256 + low` is (values[low], values[high])."""
    return _packed([[values[code & 15], values[code >> 8]] for code in range(16 * 256)], torch.int16)


def _grid(name: str) -> Any:
    """The grid of an IQ type: an array of integers, (entries, elements of an entry)."""
    from gguf import quants
    kind = getattr(quants, name)
    kind.init_grid()
    return kind.grid.reshape(kind.grid_shape).astype(int)


def _packed_grid(name: str, dtype: torch.dtype) -> torch.Tensor:
    return _packed(_grid(name).tolist(), dtype)


def _iq1() -> torch.Tensor:
    """IQ1_S's grid plus 1/8, then the grid minus 1/8, both times 8."""
    grid = 8 * _grid("IQ1_S")
    return torch.cat([_packed((grid + sign).tolist(), torch.int64) for sign in (1, -1)])


def _parity_signs() -> torch.Tensor:
    """Eight signs from seven bits, the eighth bit being their parity."""
    from gguf import quants
    return _packed([_expand(byte, 1, -1) for byte in quants.IQ2_XXS.ksigns], torch.int64)


def _expand(byte: int, zero: int, one: int) -> list[int]:
    return [one if byte >> bit & 1 else zero for bit in range(8)]


def _ue4m3(code: int) -> float:
    """NVFP4's scale, halved for the doubled values: four bits of exponent, three of mantissa, no sign."""
    exponent, mantissa = code >> 3 & 15, code & 7
    if code == 0x7F:  # not a number, which `gguf` reads as zero
        return 0.0
    return mantissa * 2.0**-10 if exponent == 0 else (8 + mantissa) * 2.0**(exponent - 11)


_BUILDERS: dict[str, Callable[[], torch.Tensor]] = {
    "fp4": lambda: _pairs(_FP4),
    "iq4": lambda: _pairs(_IQ4),
    "fifth bits": lambda: _packed([_expand(byte, 0, 16) for byte in range(256)], torch.int64),
    "signs": lambda: _packed([_expand(byte, 1, -1) for byte in range(256)], torch.int64),
    "parity signs": _parity_signs,
    "e8m0": lambda: torch.tensor([2.0**(code - 128) for code in range(256)]),  # halved for the doubled values
    "ue4m3": lambda: torch.tensor([_ue4m3(code) for code in range(256)]),
    "IQ1": _iq1,
    **{name: partial(_packed_grid, name, torch.int64) for name in ("IQ2_XXS", "IQ2_XS", "IQ2_S")},
    **{name: partial(_packed_grid, name, torch.int32) for name in ("IQ3_XXS", "IQ3_S")},
}
_CONSTANTS = {name: _constant(name) for name in _BUILDERS}
