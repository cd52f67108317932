"""A feed-forward's work in pieces of the tokens, once it was seen that tokens do not know of each other."""
from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from .structure import notes

Forward = Callable[..., Any]

LEAST = 64  # tokens of a piece: fewer save nothing worth having, and some processors round short sums in another way
_SAMPLE = 16  # tokens that the check looks at
_FLOATS = (torch.float16, torch.bfloat16, torch.float32)
_ERRORS = (RuntimeError, TypeError, ValueError, IndexError)
_OTHERWISE = -11.0  # no power of two, which a scale that all tokens share would hide


def fits(arguments: tuple[Any, ...], named: dict[str, Any]) -> bool:
    """One plain tensor, (batch, ..., width), that nobody wants gradients of."""
    if named or len(arguments) != 1 or torch.is_grad_enabled():
        return False
    x = arguments[0]
    return type(x) is torch.Tensor and x.ndim > 1 and x.dtype in _FLOATS


def flat(x: torch.Tensor) -> torch.Tensor:
    """A view with the tokens of all rows in a line, (1, ..., tokens, width), whose pieces are contiguous: a linear layer rounds
    otherwise where they are not. What is not contiguous itself stays as it is."""
    return x.view(*(1,) * (x.ndim - 2), -1, x.shape[-1]) if x.is_contiguous() else x


def along(x: torch.Tensor) -> int:
    """The dimension of the tokens: the longest but for the width, which is not pieced."""
    return max(range(x.ndim - 1), key=lambda dim: x.shape[dim])


def count(x: torch.Tensor, pieces: int) -> int:
    """Into how many pieces it is cut; fewer where these would be too short."""
    return min(pieces, x.shape[along(x)] // LEAST)


def check(module: torch.nn.Module, forward: Forward, x: torch.Tensor) -> str:
    """Why the module is not to be run in pieces, found with a few of its tokens; "" if it may be.

    What it makes of a token must be the same bit for bit whatever the other tokens are, and but for rounding also without
    them. A quantised layer whose scale is found from all tokens together fails, as attention and mixtures of experts do.
    """
    dim = along(x)
    kept, others = (x.narrow(dim, start, _SAMPLE) for start in (0, _SAMPLE))
    before = notes(module)
    try:
        whole = forward(torch.cat((kept, others), dim))
        among = forward(torch.cat((kept, others * _OTHERWISE + 1), dim))
        alone = forward(kept)
    except _ERRORS as error:
        return f"it cannot be run on some of its tokens: {type(error).__name__}: {error}"
    if _changed(before):
        return "it keeps a state"
    if not isinstance(whole, torch.Tensor) or whole.shape[:-1] != (*x.shape[:dim], 2 * _SAMPLE, *x.shape[dim + 1:-1]):
        return "what it makes is not a token for each token"
    first = whole.narrow(dim, 0, _SAMPLE)
    if not torch.equal(first, among.narrow(dim, 0, _SAMPLE)):
        return "tokens know of each other in it"
    return "" if _close(alone, first) else "a token's place matters in it"


def _changed(before: list[tuple[torch.nn.Module, dict[str, Any]]]) -> bool:
    """Whether a part has noted something; it gets back what it had."""
    found = False
    for part, noted in before:
        now = vars(part)
        if now.keys() != noted.keys() or any(now[name] is not value for name, value in noted.items()):
            found = True
            now.clear()
            now.update(noted)
    return found


def _close(one: torch.Tensor, other: torch.Tensor) -> bool:
    """By the root of the mean square, to a unit in the last place of the dtype; sums of float32 vary by more."""
    if one.shape != other.shape:
        return False
    error, size = (tensor.float().square().mean().sqrt().item() for tensor in (one - other, other))
    return error <= max(1e-5, torch.finfo(other.dtype).eps) * size


def in_pieces(forward: Forward, x: torch.Tensor, pieces: int) -> torch.Tensor:
    """The same as `forward(x)`, (batch, ..., width), from so many pieces one after the other."""
    dim, at = along(x), 0
    answer: torch.Tensor | None = None
    for piece in x.tensor_split(pieces, dim):
        made = forward(piece)
        if answer is None:
            answer = made.new_empty((*x.shape[:-1], made.shape[-1]))
        answer.narrow(dim, at, piece.shape[dim]).copy_(made)
        at += piece.shape[dim]
        del made  # before the next one is made
    assert answer is not None
    return answer
