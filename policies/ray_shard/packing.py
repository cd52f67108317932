"""Takes objects apart for a parcel: tensors by provenance or into buffers, and what pickle would stumble over."""
from __future__ import annotations

import io
import pickle
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy
import torch
from ray import cloudpickle

from ..files.parameters import is_plain
from ..files.provenance import Finder, extent
from ..files.subclasses import has_own_memory, memory
from . import rebuilding
from .rebuilding import FileName

SMALL = 4096  # bytes; less travels among the pickled bytes
SHARED_FROM = 2**20  # bytes; a parameter by value of this size is read where the store has it
# By these a class says how it is made and pickled.
_HOOKS = ("__new__", "__reduce_ex__", "__reduce__", "__getstate__", "__setstate__", "__getnewargs__", "__getnewargs_ex__")


@dataclass(frozen=True)
class SourceFile:
    """A file that tensors of a parcel lie in.

    Attributes:
        places: (bytes from the file's start, bytes, whether it is a large parameter) of each.
    """

    name: FileName
    places: tuple[tuple[int, int, bool], ...]

    @property
    def size(self) -> int:
        """Bytes of the tensors."""
        return sum(size for _, size, _ in self.places)


class Packer(cloudpickle.Pickler):  # type: ignore[misc]  # Ray's copy of cloudpickle has no types
    """Pickles tensors by provenance, or into buffers, and whatever else needs help."""

    def __init__(self, finder: Finder | None, known: Mapping[int, str]) -> None:
        self.stream = io.BytesIO()
        super().__init__(self.stream, protocol=5, buffer_callback=self._take)
        self._finder, self._known = finder, known
        self._files: dict[FileName, dict[tuple[int, int], bool]] = {}
        self.buffers: list[Any] = []
        self.weights: list[bool] = []
        self.mapped_bytes = self.copied_bytes = 0
        self._parts: set[int] = set()  # ids of tensors that are parts of parameters; the pickler keeps what it has seen
        self._misleading: dict[type, bool] = {}
        self._shared: set[int] = set()  # ids of buffers of large parameters, on their way

    def _take(self, buffer: pickle.PickleBuffer) -> bool:
        """Whether to put the bytes among the pickled ones."""
        raw = buffer.raw()
        if raw.nbytes < SMALL:
            return True
        self.buffers.append(numpy.frombuffer(raw, numpy.uint8))
        self.weights.append(id(buffer) in self._shared)
        self._shared.discard(id(buffer))
        return False

    def files(self) -> tuple[SourceFile, ...]:
        """Those that tensors were found in."""
        return tuple(SourceFile(name, tuple((*place, shared) for place, shared in sorted(places.items())))
                     for name, places in self._files.items())

    def persistent_id(self, value: Any) -> Any:
        return tuple(value) if type(value) is FileName else self._known.get(id(value))

    def reducer_override(self, value: Any) -> Any:
        if isinstance(value, torch.Tensor):
            reduced = self._tensor(value)
            if reduced is not None:
                return reduced
        elif self._is_misleading(type(value)):
            return rebuilding.new, (type(value),), vars(value), None, None, rebuilding.update
        return super().reducer_override(value)

    def _is_misleading(self, kind: type) -> bool:
        """Whether pickle would do its default, but a `__getattr__` may answer when it asks an instance for special methods.

        ComfyUI's model configurations answer None to every name, which pickle then calls.
        """
        if kind not in self._misleading:
            default = all(getattr(kind, name, None) == getattr(object, name, None) for name in _HOOKS)
            self._misleading[kind] = default and hasattr(kind, "__getattr__") and kind.__dictoffset__ != 0 and not _slots(kind)
        return self._misleading[kind]

    def _tensor(self, tensor: torch.Tensor) -> tuple[Any, ...] | None:
        """How a tensor is made again; None for the kinds that torch's own pickling does right, as meta and sparse ones."""
        parameter = isinstance(tensor, torch.nn.Parameter)
        how = tensor.requires_grad, tensor.is_inference()
        if is_plain(tensor) and not tensor.is_quantized:
            made = self._memory(tensor, parameter or id(tensor) in self._parts)
            return rebuilding.plain, (*made, parameter, *how), vars(tensor) or None, None, None, rebuilding.update
        if has_own_memory(tensor):
            own = memory(tensor).detach()
            if parameter:
                self._parts.add(id(own))
            return rebuilding.subclass, (type(tensor), own, *how), vars(tensor), None, None, rebuilding.update
        if hasattr(tensor, "__tensor_flatten__"):
            names, context = tensor.__tensor_flatten__()
            parts = {name: getattr(tensor, name) for name in names}
            if parameter:
                self._parts.update(map(id, parts.values()))
            rest = {name: value for name, value in vars(tensor).items() if name not in parts}
            shape = tuple(tensor.shape), tuple(tensor.stride())
            return rebuilding.wrapper, (type(tensor), parts, context, *shape, *how), rest, None, None, rebuilding.complete
        return None

    def _memory(self, tensor: torch.Tensor, weight: bool) -> tuple[Any, ...]:
        """What holds the bytes, and (byte offset, dtype, shape, stride) of the tensor in it."""
        found = self._finder.find(tensor) if self._finder is not None else None
        if found is not None:
            name, shape, stride = FileName.of(found.path, found.identity), tuple(tensor.shape), tensor.stride()
            places, place = self._files.setdefault(name, {}), (found.offset, extent(tensor.element_size(), shape, stride))
            places[place] = places.get(place, True) and weight and place[1] >= SHARED_FROM
            self.mapped_bytes += tensor.nbytes
            return name, found.offset, tensor.dtype, shape, stride
        flat, stride = _bytes(tensor)
        self.copied_bytes += flat.nbytes
        buffer = pickle.PickleBuffer(flat.numpy())  # type: ignore[arg-type]
        if weight and flat.nbytes >= SHARED_FROM:
            self._shared.add(id(buffer))
        return buffer, 0, tensor.dtype, tuple(tensor.shape), stride


def _slots(kind: type) -> bool:
    return any(vars(base).get("__slots__") for base in kind.__mro__)


def _bytes(tensor: torch.Tensor) -> tuple[torch.Tensor, tuple[int, ...]]:
    """A tensor's bytes in the order of its memory, on the CPU, and its strides there; views with gaps are made dense."""
    tensor = tensor.detach().cpu().resolve_conj().resolve_neg()
    stride = torch.empty_like(tensor, device="meta").stride()
    if stride != tensor.stride():
        tensor = tensor.clone(memory_format=torch.preserve_format)
    return tensor.as_strided((tensor.numel(),), (1,)).view(torch.uint8), stride
