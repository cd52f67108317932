"""One Triton kernel in the place of several of torch's, for large tensors on the GPUs where it is the faster way.

Which one is decided once in a process for each GPU, type and dtype, when the first such tensor comes: both ways dequantise the
same random blocks, with subnormal, infinite and undefined scales among them, and must agree on every bit before they are timed.
That costs a compilation, which Triton keeps on the disk, some dozens of launches, and about 100 MB of device memory for that
moment. Triton is no requirement: where it is missing, or anything fails, torch's own code stays.
"""
from __future__ import annotations

import logging
import statistics
import threading
from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple

import torch

from ....telemetry import emit, log
from .kinds import Kind

# Writes the numbers: (memory for them, blocks, type), as `kernels.launch` describes it.
Way = Callable[[torch.Tensor, torch.Tensor, Kind], None]
# Median seconds of each of these.
Timer = Callable[[Sequence[Callable[[], None]]], list[float]]

TYPES = frozenset({"Q8_0", "Q4_K", "Q5_K", "Q6_K"})
DTYPES = frozenset({torch.float32, torch.float16, torch.bfloat16})
DEVICE = "cuda"  # which is what torch calls an AMD card too
SMALLEST = 2**20  # elements: of less, launching is most of the time
SAMPLE = 2**23  # elements: 5 to 9 MB of blocks
ROUNDS, BURST = 7, 4  # of how many the median is taken, each of how many launches

# Zeros, a subnormal number, infinities and a NaN, as float16. Every type here has one in its first or in its last two bytes.
_EDGES = (0x0000, -0x8000, 0x0001, 0x7C00, -0x0400, 0x7E00)


class Speeds(NamedTuple):
    """Bytes read and written, in GB/s."""

    torch: float
    fused: float


class Mismatch(Exception):
    """A kernel's result is not torch's."""


def kernel_for(blocks: torch.Tensor, kind: Kind, out: torch.Tensor, plain: Way) -> Way | None:
    """The kernel for these blocks, or None where torch's code is to be used, which is almost always.

    Args:
        blocks: uint8, (n, bytes of a block), contiguous.
        out: (n, elements of a block), contiguous, on the same device.
        plain: torch's code.
    """
    if blocks.device.type != DEVICE or torch.compiler.is_compiling():
        return None
    if kind.name not in TYPES or out.dtype not in DTYPES or out.numel() < SMALLEST or not _ordinary(blocks, out):
        return None
    return _choices.way(kind, out.dtype, out.device, plain)


def _ordinary(blocks: torch.Tensor, out: torch.Tensor) -> bool:
    """Whether this is neither a trace nor a capture, and the memory such that the kernel is the one that was compared: Triton
    compiles others for unaligned memory, and for 2 GB and more on AMD."""
    if type(blocks) is not torch.Tensor or type(out) is not torch.Tensor:  # FakeTensor and its kind
        return False
    if (blocks.data_ptr() | out.data_ptr()) % 16 or torch.cuda.is_current_stream_capturing():
        return False
    return not torch.version.hip or max(each.untyped_storage().nbytes() for each in (blocks, out)) < 2**31


class Choices:
    """What was decided in this process.

    Args:
        load: imports Triton and returns `kernels.launch`.
        seconds: times the ways.
        elements: of the tensor that both ways are tried on.
    """

    def __init__(self, load: Callable[[], Way], seconds: Timer, elements: int = SAMPLE) -> None:
        self._load, self._seconds, self._elements = load, seconds, elements
        self._ways: dict[tuple[torch.device, str, torch.dtype], Way | None] = {}
        self._refused: set[tuple[torch.device, str]] = set()
        self._measuring = threading.Lock()

    def way(self, kind: Kind, dtype: torch.dtype, device: torch.device, plain: Way) -> Way | None:
        """The kernel if it is faster than `plain`, else None; also None while another thread measures."""
        key = (device, kind.name, dtype)
        if (device, kind.name) in self._refused:
            return None
        if key not in self._ways and self._measuring.acquire(blocking=False):
            try:
                if key not in self._ways:
                    self._ways[key] = self._choose(kind, dtype, device, plain)
            finally:
                self._measuring.release()
        return self._ways.get(key)

    def _choose(self, kind: Kind, dtype: torch.dtype, device: torch.device, plain: Way) -> Way | None:
        try:
            kernel = self._load()
            speeds = measure(kernel, plain, kind, dtype, device, self._seconds, self._elements)
        except torch.cuda.OutOfMemoryError:
            log.info("[residency] no memory to time Triton's kernel for %s on %s, so torch's code stays", kind.name, device)
            return None
        except Mismatch:
            self._refused.add((device, kind.name))
            log.warning("[residency] Triton's kernel for %s on %s does not give torch's numbers, so torch's code stays. The "
                        "images are not affected.", kind.name, device)
            return None
        except Exception as error:  # Triton, its compiler or its driver; it would be the same for the other types
            self._refused |= {(device, name) for name in TYPES}
            level = logging.DEBUG if isinstance(error, ImportError) else logging.INFO
            log.log(level, "[residency] no Triton on %s, so torch's code stays: %s: %s", device, type(error).__name__, error)
            return None
        faster = speeds.fused > speeds.torch
        emit("gguf.kernel_chosen", type=kind.name, dtype=str(dtype).removeprefix("torch."), device=str(device),
             torch_gb_s=round(speeds.torch, 1), fused_gb_s=round(speeds.fused, 1), chosen="fused" if faster else "torch")
        return kernel if faster else None


def measure(kernel: Way, plain: Way, kind: Kind, dtype: torch.dtype, device: torch.device, seconds: Timer,
            elements: int) -> Speeds:
    """Both ways' speeds on the same random blocks, which are freed afterwards.

    Raises:
        Mismatch: the results differ in a bit; any NaN equals any.
    """
    generator = torch.Generator(device).manual_seed(kind.number)  # the images' noise may come from the device's own
    count = elements // kind.block - 1  # the last program has blocks that do not exist
    blocks = torch.randint(256, (count, kind.size), dtype=torch.uint8, device=device, generator=generator)
    edges, words = torch.tensor(_EDGES, dtype=torch.int16, device=device), blocks.view(torch.int16)
    words[:len(edges), 0] = words[:len(edges), -1] = edges
    results = [torch.zeros((count, kind.block), dtype=dtype, device=device) for _ in range(2)]
    runs = [partial(way, out, blocks, kind) for way, out in zip((plain, kernel), results, strict=True)]
    with torch.cuda.device_of(blocks):  # type: ignore[no-untyped-call]  # its streams
        for run in runs:
            run()
        if not _same(*results):
            raise Mismatch
        return Speeds(*(1e-9 * (blocks.nbytes + results[0].nbytes) / each for each in seconds(runs)))


def _same(one: torch.Tensor, other: torch.Tensor) -> bool:
    word = torch.int32 if one.dtype == torch.float32 else torch.int16
    return bool(((one.view(word) == other.view(word)) | (one.isnan() & other.isnan())).all())


def device_seconds(runs: Sequence[Callable[[], None]]) -> list[float]:
    """Median seconds of each, in turns, on the current stream: several launches at once, so that the device need not wait for
    Python more than it does while an image is made."""
    took: list[list[float]] = [[] for _ in runs]
    for _ in range(ROUNDS):
        for run, times in zip(runs, took, strict=True):
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
            start.record()
            for _ in range(BURST):
                run()
            end.record()
            end.synchronize()
            times.append(start.elapsed_time(end) / 1000 / BURST)
    return [statistics.median(times) for times in took]


def _load() -> Way:
    from .kernels import launch
    return launch


_choices = Choices(_load, device_seconds)
