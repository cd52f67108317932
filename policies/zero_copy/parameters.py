"""Where a parameter's bytes are at home in a file, and whether the copy on the device is still the same.

A parameter on the device may be pointed back at its home only if nobody wrote to it there. Tensors made in inference mode
have no version counter, so the proof is a fingerprint of the bytes, taken right after they arrived and compared before they
leave: one pass at the device's own memory speed each, and eight bytes a parameter across the bus.
"""
from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, cast
from weakref import WeakKeyDictionary

import torch

from ..files.bank import Bank, MappedFile


def is_plain(value: Any) -> bool:
    """An ordinary dense tensor, not one of the subclasses that packs use for their formats."""
    return type(value) in (torch.Tensor, torch.nn.Parameter) and value.layout is torch.strided and not value.is_meta


def parts(tensor: torch.Tensor) -> list[torch.Tensor]:
    """The plain tensors that hold a tensor's bytes: itself, or what a wrapper (a quantised tensor) is made of.

    A subclass that does not tell its parts has none.
    """
    if is_plain(tensor):
        return [tensor]
    data = tensor.data if type(tensor) is torch.nn.Parameter else tensor
    if not hasattr(data, "__tensor_flatten__"):
        return []
    return [getattr(data, name) for name in data.__tensor_flatten__()[0]]


def fingerprint(tensor: torch.Tensor) -> torch.Tensor | None:
    """The sum of a tensor's bytes read as integers, modulo 2**64: shape (), int64, on the tensor's device.

    Any change of one element is seen; exchanging elements is not, which no patch does. None where it cannot be taken.
    """
    total = None
    for part in parts(tensor):
        if not part.is_contiguous():
            return None
        flat = part.detach().reshape(-1)
        words = next(kind for kind in (torch.int64, torch.int32, torch.int16, torch.uint8) if flat.nbytes % kind.itemsize == 0)
        if flat.storage_offset() * flat.element_size() % words.itemsize:
            flat = flat.clone()  # torch reads no words from a view that begins in the middle of one
        summed = flat.view(words).sum(dtype=torch.int64)
        total = summed if total is None else total * 31 + summed
    return total


def fingerprints(tensors: Sequence[torch.Tensor]) -> list[int | None]:
    """The fingerprints of many tensors, with one wait for each device."""
    sums = [fingerprint(tensor) for tensor in tensors]
    found: dict[int, int] = {}
    for device in {total.device for total in sums if total is not None}:
        there = [index for index, total in enumerate(sums) if total is not None and total.device == device]
        found.update(zip(there, torch.stack([cast(torch.Tensor, sums[index]) for index in there]).tolist(), strict=True))
    return [found.get(index) for index in range(len(sums))]


def put(leaf: torch.nn.Module, name: str, tensor: torch.Tensor) -> None:
    """Makes `tensor` the module's parameter, in the same Parameter object where torch allows it."""
    parameter = leaf._parameters[name]
    # A host and a device tensor of some backends (NPU, XLA) are not of the same kind below Python, and `.data =` raises.
    if (parameter is not None and is_plain(parameter) and is_plain(tensor)
            and torch._has_compatible_shallow_copy_type(parameter.data, tensor)):
        parameter.data = tensor
    else:
        with torch.inference_mode(tensor.is_inference()):  # a wrapper that was made outside cannot be detached inside
            leaf._parameters[name] = torch.nn.Parameter(tensor, requires_grad=False)


@dataclass
class Home:
    """The mapped tensor that a parameter was, its file, and the fingerprint of its bytes once they were on a device."""

    tensor: torch.Tensor
    file: MappedFile
    mark: int | None = None

    def fits(self, parameter: torch.Tensor) -> bool:
        """Whether the tensor could be this parameter's."""
        return parameter.shape == self.tensor.shape and parameter.dtype == self.tensor.dtype

    def holds(self, parameter: torch.Tensor) -> bool:
        """Whether the parameter is the mapped tensor itself."""
        return all(one.data_ptr() == other.data_ptr() for one, other in zip(parts(parameter), parts(self.tensor), strict=True))


def _alias(tensor: torch.Tensor) -> torch.Tensor:
    """The same memory as an inference tensor: only that can become the data of a parameter that was made in either mode."""
    if not is_plain(tensor):
        return tensor.data if isinstance(tensor, torch.nn.Parameter) else tensor
    with torch.inference_mode():
        return torch.empty(0, dtype=tensor.dtype).set_(  # type: ignore[no-any-return]
            tensor.untyped_storage(), tensor.storage_offset(), tensor.size(), tensor.stride())


class Homes:
    """Every home that is known, by the (leaf) module that owns the parameter and the parameter's name there."""

    def __init__(self, bank: Bank) -> None:
        self._bank = bank
        self._homes: WeakKeyDictionary[torch.nn.Module, dict[str, Home]] = WeakKeyDictionary()

    def note(self, leaf: torch.nn.Module, name: str, tensor: torch.Tensor) -> None:
        """Remembers a tensor as a parameter's home, if its bytes are in a file's mapping."""
        files = [self._bank.file_of(part) for part in parts(tensor)]
        # A quantised weight's scales may be private; its bulk decides.
        if files and files[0] is not None:
            self._homes.setdefault(leaf, {}).setdefault(name, Home(_alias(tensor), files[0]))

    def note_all(self, module: torch.nn.Module) -> None:
        """Remembers every parameter of a model that is a file's mapping now."""
        for leaf in module.modules():
            known = self._homes.get(leaf, {})
            for name, parameter in leaf._parameters.items():
                if parameter is not None and name not in known and parameter.device.type == "cpu":
                    self.note(leaf, name, parameter)

    def forget(self, leaf: torch.nn.Module, name: str) -> None:
        self._homes.get(leaf, {}).pop(name, None)

    def get(self, leaf: torch.nn.Module) -> dict[str, Home]:
        return self._homes.get(leaf, {})

    def of(self, module: torch.nn.Module) -> Iterator[tuple[str, torch.nn.Module, str, torch.nn.Parameter, Home]]:
        """(qualified name, leaf, name, parameter, home) of every parameter of a model that has a home and could be there."""
        for prefix, leaf in module.named_modules():
            for name, home in self.get(leaf).items():
                parameter = leaf._parameters.get(name)
                if parameter is not None and home.fits(parameter):
                    yield (f"{prefix}.{name}" if prefix else name), leaf, name, parameter, home

    def files(self, module: torch.nn.Module) -> set[MappedFile]:
        return {home.file for leaf in module.modules() for home in self.get(leaf).values()}
