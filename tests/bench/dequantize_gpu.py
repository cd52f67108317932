"""How fast weights are dequantised on a GPU, by torch's code and by Triton's kernels: `python dequantize_gpu.py`."""
from __future__ import annotations

import sys
from functools import partial
from pathlib import Path

import torch

sys.path[:0] = [str(Path(__file__).parents[1]), str(Path(__file__).parent)]
from support.loading import load  # noqa: E402
from table import show  # noqa: E402

load()
from residency.policies.files import quants  # noqa: E402
from residency.policies.files.quants import fused  # noqa: E402

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
HEAD = ("type", *(f"{str(dtype).removeprefix('torch.')}: {way}" for dtype in DTYPES for way in ("torch", "fused")))
ELEMENTS = 2**25  # 64 MB of float16: more than a card's cache holds, as a model's weights are


def title() -> str:
    return f"{torch.cuda.get_device_name()}: dequantised, GB/s of bytes read and written (more is better)"


def table(device: torch.device) -> list[tuple[object, ...]]:
    """A row for each type that is not float32 or float16 anyway, as in HEAD; "-" where there is no kernel, and why where it
    cannot be used."""
    return [(kind.name, *(cell for dtype in DTYPES for cell in _speeds(kind, dtype, device)))
            for kind in quants.KINDS.values() if kind.name not in ("F32", "F16")]


def _speeds(kind: quants.Kind, dtype: torch.dtype, device: torch.device) -> tuple[object, object]:
    if kind.name in fused.TYPES:
        try:
            return fused.measure(fused._load(), quants._fill, kind, dtype, device, fused.device_seconds, ELEMENTS)
        except (ImportError, fused.Mismatch) as error:
            return "-", type(error).__name__
    blocks = torch.randint(256, (ELEMENTS // kind.block, kind.size), dtype=torch.uint8, device=device)
    out = torch.empty(len(blocks), kind.block, dtype=dtype, device=device)
    plain = partial(quants._fill, out, blocks, kind)
    plain()
    (seconds,) = fused.device_seconds([plain])
    return 1e-9 * (blocks.nbytes + out.nbytes) / seconds, "-"


if __name__ == "__main__":
    if torch.cuda.is_available():
        show(title(), HEAD, table(torch.device("cuda", torch.cuda.current_device())))
    else:
        print("skipped, it needs a CUDA device")
