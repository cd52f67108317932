"""Which worker computes which rows of a batch.

A batch is made of chunks, one for each conditioning, each with a row for each latent. Packs' patches and some models count the
chunks, so a worker has whole chunks, or the same rows of every chunk; what it gets is a batch of the same kind, only smaller.
"""
from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

# Arguments of models whose rows are the frames of one video: these belong together.
_FRAMES = ("num_video_frames", "image_only_indicator")
# The host's options that have an entry for each chunk.
_BY_CHUNK = ("cond_or_uncond", "uuids")
_OPTIONS = "transformer_options"


@dataclass(frozen=True)
class Share:
    """One worker's part.

    Attributes:
        worker: its place among the workers.
        rows: of the batch, in order.
        chunks: that these rows belong to, in order.
    """

    worker: int
    rows: tuple[int, ...]
    chunks: tuple[int, ...]


def apportion(count: int, weights: Sequence[float]) -> list[int]:
    """Splits a number of equal things by weights, so that who is last to finish finishes soonest."""
    shares = [0] * len(weights)
    for _ in range(count):
        next_one = min(range(len(weights)), key=lambda index: ((shares[index] + 1) / weights[index], index))
        shares[next_one] += 1
    return shares


def split(rows: int, chunks: int, weights: Sequence[float], whole_chunks: bool = False) -> list[Share]:
    """Shares for those workers that get any.

    Args:
        rows: of the whole batch, a multiple of `chunks`.
        weights: of the workers.
        whole_chunks: the rows of a chunk belong together.
    """
    each = rows // chunks
    by_chunk = apportion(chunks, weights)
    by_row = apportion(each, weights)
    slowest_by_chunk = max(count * each / weight for count, weight in zip(by_chunk, weights, strict=True))
    slowest_by_row = max(count * chunks / weight for count, weight in zip(by_row, weights, strict=True))
    if whole_chunks or slowest_by_chunk <= slowest_by_row:
        parts = [(range(start, stop), range(each)) for start, stop in _ranges(by_chunk)]
    else:
        parts = [(range(chunks), range(start, stop)) for start, stop in _ranges(by_row)]
    return [Share(worker, tuple(chunk * each + row for chunk in which for row in of_each), tuple(which))
            for worker, (which, of_each) in enumerate(parts) if len(which) and len(of_each)]


def belong_together(arguments: Mapping[str, Any], rows: int) -> bool:
    """Whether the rows of a chunk are computed together: the frames of a video, and rows of chunks that nobody can tell."""
    return any(arguments.get(name) is not None for name in _FRAMES) or rows % _named(arguments) != 0


def part(arguments: Mapping[str, Any], share: Share, rows: int) -> dict[str, Any]:
    """A share's part of a prediction's arguments: of every tensor with a row for each of the batch.

    The options' tensors are of the schedule, whose length may be anything.
    """
    if len(share.rows) == rows:
        return dict(arguments)
    return {name: _options(value, share) if name == _OPTIONS else _take(value, share, rows)
            for name, value in arguments.items()}


def _take(value: Any, share: Share, rows: int) -> Any:
    if isinstance(value, torch.Tensor):
        if value.ndim == 0 or value.shape[0] != rows:
            return value
        return value[share.rows[0]:share.rows[-1] + 1] if _is_range(share.rows) else value[list(share.rows)]
    if isinstance(value, dict):
        return {name: _take(one, share, rows) for name, one in value.items()}
    if type(value) in (list, tuple):
        return type(value)(_take(one, share, rows) for one in value)
    return value


def _options(options: Mapping[str, Any], share: Share) -> dict[str, Any]:
    whole = {name: options[name] for name in _BY_CHUNK if name in options}
    return {**options, **{name: [value[chunk] for chunk in share.chunks] for name, value in whole.items()}}


def chunks_of(arguments: Mapping[str, Any], rows: int) -> int:
    """How many chunks a batch has; it is one where the options name chunks of another."""
    count = _named(arguments)
    return count if rows % count == 0 else 1


def _named(arguments: Mapping[str, Any]) -> int:
    return len(arguments[_OPTIONS].get(_BY_CHUNK[0]) or (0,))


def join(shares: Sequence[Share], parts: Sequence[torch.Tensor]) -> torch.Tensor:
    """The batch, from the shares' answers."""
    order = [row for share in shares for row in share.rows]
    whole = torch.cat(list(parts))
    return whole if order == sorted(order) else whole[sorted(range(len(order)), key=order.__getitem__)]


def _is_range(rows: Sequence[int]) -> bool:
    return rows[-1] - rows[0] + 1 == len(rows)


def _ranges(counts: Sequence[int]) -> list[tuple[int, int]]:
    ends = [sum(counts[:index + 1]) for index in range(len(counts))]
    return [(end - count, end) for end, count in zip(ends, counts, strict=True)]
