"""Where a parameter's bytes are at home in a file, and whether the copy on the device is still the same.

A parameter on the device may be pointed back at its home only if nobody wrote to it there. Tensors made in inference mode
have no version counter, so the proof is a fingerprint of the bytes: the home's, taken once, and the device's, taken before
each offload in one pass at the device's own memory speed, with eight bytes a parameter across the bus.
"""
from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate, chain, pairwise
from typing import Any
from weakref import WeakKeyDictionary

import torch

from . import subclasses
from .bank import Bank, MappedFile
from .subclasses import has_own_memory

_BATCH = 2**17  # words that are mixed at once: 1 MB, and a few times that in temporary memory
_ODD = -7046029254386353131  # 2**64 divided by the golden ratio, as a signed word: spreads low bits over the high ones


def is_plain(value: Any) -> bool:
    """An ordinary dense tensor, not one of the subclasses that packs use for their formats."""
    return type(value) in (torch.Tensor, torch.nn.Parameter) and value.layout is torch.strided and not value.is_meta


def parts(tensor: torch.Tensor) -> list[torch.Tensor]:
    """The plain tensors that hold a tensor's bytes: itself, or what a wrapper (a quantised tensor) is made of.

    A wrapper that does not tell its parts has none.
    """
    if is_plain(tensor):
        return [tensor]
    if has_own_memory(tensor):
        return [subclasses.memory(tensor)]
    data = tensor.data if type(tensor) is torch.nn.Parameter else tensor
    if not hasattr(data, "__tensor_flatten__"):
        return []
    return [getattr(data, name) for name in data.__tensor_flatten__()[0]]


def size(tensor: torch.Tensor) -> int:
    """Bytes of all its parts."""
    return sum(part.nbytes for part in parts(tensor))


def fingerprint(tensor: torch.Tensor) -> int | None:
    """A 64-bit checksum of a tensor's bytes; None where it cannot be taken.

    The bytes are read as 64-bit integers, and short stretches of each row are summed, then mixed and summed modulo 2**64.
    Mixing is one-to-one, so a change of one element is seen; it is not linear, so the changed signs of a row or a column do
    not cancel out; and it depends on the place, so exchanged rows or stretches are seen.
    """
    return fingerprints([tensor])[0]


def fingerprints(tensors: Sequence[torch.Tensor]) -> list[int | None]:
    """The fingerprints of many tensors. Batches keep the kernels few and the temporary memory small."""
    found: list[int | None] = [None] * len(tensors)
    try:
        for device in {tensor.device for tensor in tensors}:
            batch: dict[int, list[torch.Tensor]] = {}
            words = 0
            for index, tensor in enumerate(tensors):
                sums = _sums(tensor) if tensor.device == device else []
                if sums:
                    batch[index] = sums
                    words += sum(map(len, sums))
                if batch and (index == len(tensors) - 1 or words > _BATCH):
                    for done, mark in zip(batch, _mixed(list(batch.values())), strict=True):
                        found[done] = mark
                    batch, words = {}, 0
    except (RuntimeError, TypeError):  # no such kernel on this backend, or no memory for it: then it is a copy
        return [None] * len(tensors)
    return found


def _sums(tensor: torch.Tensor) -> list[torch.Tensor]:
    """The sums of short stretches, for each part of a tensor; nothing for what does not show its bytes."""
    sums = []
    for part in parts(tensor):
        if not part.is_contiguous():
            return []
        if not part.numel():
            continue
        row = part.nbytes // (part.shape[0] if part.ndim > 1 else 1)
        word = next(kind for kind in (torch.int64, torch.int32, torch.int16, torch.uint8) if row % kind.itemsize == 0)
        flat = part.detach().view(-1)
        if flat.storage_offset() * flat.element_size() % word.itemsize:
            flat = flat.clone()  # torch reads no words from a view that begins in the middle of one
        # A stretch never spans two rows: two changes in one column would meet in it. Small weights can afford short ones.
        stretch = math.gcd(row // word.itemsize, 128 if part.nbytes > 2**20 else 16)
        sums.append(flat.view(word).view(-1, stretch).sum(1, dtype=torch.int64))
    return sums


def _mixed(sums: list[list[torch.Tensor]]) -> list[int]:
    """Stirs each word with its place in its tensor, and adds up each tensor's. Twice multiplied and folded, as in the finalizer
    of SplitMix64 (Steele, Lea and Flood, 2014): after one round a flipped top bit still moves just two bits, which can
    cancel."""
    sizes = [sum(map(len, pieces)) for pieces in sums]
    words = torch.cat(list(chain.from_iterable(sums)))
    odd = torch.arange(1, 2 * max(sizes) + 1, 2, device=words.device).mul_(_ODD)
    words *= torch.cat([odd[:size] for size in sizes])
    words ^= (words >> 32).bitwise_and_(0xFFFFFFFF)  # the shift keeps the sign, so the mask
    words *= _ODD
    words ^= (words >> 29).bitwise_and_(0x7FFFFFFFF)
    # One running sum, read where each tensor ends: few kernels, however many tensors.
    ends = torch.tensor(list(accumulate(sizes)), device=words.device) - 1
    totals = words.cumsum(0).index_select(0, ends).tolist()
    return [(total - before) % 2**64 for before, total in pairwise([0, *totals])]


def put(leaf: torch.nn.Module, name: str, tensor: torch.Tensor) -> None:
    """Makes `tensor` the module's parameter, in the same Parameter object where torch allows it.

    A subclass with memory of its own stays one, with the attributes that it has now: a LoRA may be among them.
    """
    parameter = leaf._parameters[name]
    if has_own_memory(parameter) and is_plain(tensor):
        leaf._parameters[name] = subclasses.over(tensor, parameter)  # type: ignore[arg-type, assignment]
        return
    # A host and a device tensor of some backends (NPU, XLA) are not of the same kind below Python, and `.data =` raises.
    if (parameter is not None and is_plain(parameter) and is_plain(tensor)
            and torch._has_compatible_shallow_copy_type(parameter.data, tensor)):
        parameter.data = tensor
    else:
        with torch.inference_mode(tensor.is_inference()):  # a wrapper that was made outside cannot be detached inside
            leaf._parameters[name] = torch.nn.Parameter(tensor, requires_grad=False)


@dataclass
class Home:
    """The mapped tensor that a parameter was, its file, and the fingerprint of its bytes once somebody asked."""

    tensor: torch.Tensor
    file: MappedFile
    mark: int | None = None

    def fits(self, parameter: torch.Tensor) -> bool:
        """Whether the tensor could be this parameter's."""
        now = subclasses.memory(parameter) if has_own_memory(parameter) else parameter
        return now.shape == self.tensor.shape and now.dtype == self.tensor.dtype


def _alias(tensor: torch.Tensor) -> torch.Tensor:
    """The same memory as an inference tensor: only that can become the data of a parameter that was made in either mode."""
    if has_own_memory(tensor):
        tensor = subclasses.memory(tensor)
    if not is_plain(tensor):
        return tensor.data if isinstance(tensor, torch.nn.Parameter) else tensor
    with torch.inference_mode():
        return torch.empty(0, dtype=tensor.dtype).set_(
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
        """Remembers every parameter of a model that is a file's mapping now, of those too that a pack mapped by itself."""
        new = [(leaf, name, parameter) for leaf in module.modules() for name, parameter in leaf._parameters.items()
               if parameter is not None and name not in self.get(leaf) and parameter.device.type == "cpu"]
        self._bank.recognise([subclasses.memory(parameter) for *_, parameter in new if has_own_memory(parameter)])
        for leaf, name, parameter in new:
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
