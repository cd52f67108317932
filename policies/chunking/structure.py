"""Which modules of a diffusion model are feed-forwards, told by their structure.

Their classes and names are many (`ffn`, `img_mlp`, `ff`, `feed_forward`; Sequentials, GEGLU, SwiGLU), what they consist of is
not: linear layers that widen a token, one that makes it as wide as it was, and between them what has no weights or normalises
the last dimension. Attention can look the same from here; `run.check` tells it by what it computes.
"""
from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch.nn.modules.dropout import _DropoutNd

_TORCHS_OWN = frozenset(vars(torch.nn.Module()))
_CONSTANT = (type(None), bool, int, float, complex, str, tuple, torch.dtype, torch.device)


def feed_forwards(model: torch.nn.Module) -> Iterator[torch.nn.Module]:
    """The outermost ones, each once. Nothing of what is compiled: its code is fixed."""
    pending, seen = [model], {id(model)}
    while pending:
        module = pending.pop()
        if _compiled(module):
            continue
        if is_feed_forward(module):
            yield module
            continue
        for child in module._modules.values():
            if child is not None and id(child) not in seen:
                seen.add(id(child))
                pending.append(child)


def is_feed_forward(module: torch.nn.Module) -> bool:
    """Whether it consists of what a feed-forward consists of, takes one tensor, keeps nothing between calls that could be seen,
    and nobody has replaced a part's `forward` or hung a hook on it."""
    if not module._modules or not _takes_one(type(module).forward):
        return False
    parts = list(module.modules())
    linears = [part for part in parts if _is_linear(part)]
    return (_widen_and_narrow(linears) and not any(map(_altered, parts))
            and all(_is_linear(part) or _normalises_a_token(part) or _holds_nothing(part) for part in parts))


def notes(module: torch.nn.Module) -> list[tuple[torch.nn.Module, dict[str, Any]]]:
    """What the parts of a feed-forward without weights have noted in themselves, by part."""
    return [(part, dict(vars(part))) for part in module.modules() if not part._parameters]


def _compiled(module: torch.nn.Module) -> bool:
    return "_orig_mod" in module._modules or getattr(module, "_compiled_call_impl", None) is not None


@functools.cache
def _takes_one(forward: Callable[..., Any]) -> bool:
    """One argument is enough, and there has to be one."""
    try:
        _, first, *more = inspect.signature(forward).parameters.values()
    except (TypeError, ValueError):  # it has no signature, or takes nothing
        return False
    return first.kind is first.POSITIONAL_OR_KEYWORD and first.default is first.empty and all(
        one.default is not one.empty or one.kind in (one.VAR_POSITIONAL, one.VAR_KEYWORD) for one in more)


def _is_linear(part: Any) -> bool:
    """Quantised ones need not be torch's class."""
    return isinstance(getattr(part, "in_features", None), int) and isinstance(getattr(part, "out_features", None), int) and (
        not part._modules)


def _widen_and_narrow(linears: list[Any]) -> bool:
    """Any number from d to more than d, and one from more than d back to d."""
    narrowing = [one for one in linears if one.in_features > one.out_features]
    if len(narrowing) != 1 or len(linears) < 2:
        return False
    width = narrowing[0].out_features
    return all(one.in_features == width < one.out_features for one in linears if one is not narrowing[0])


def _altered(part: torch.nn.Module) -> bool:
    return "forward" in vars(part) or bool(part._forward_hooks) or bool(part._forward_pre_hooks) or _compiled(part)


def _normalises_a_token(part: Any) -> bool:
    shape = getattr(part, "normalized_shape", None)
    return isinstance(shape, tuple) and len(shape) == 1 and not part._modules and not part._buffers


def _holds_nothing(part: torch.nn.Module) -> bool:
    """No weights, no tensors, nothing that could be changed in place, and no random numbers."""
    if isinstance(part, _DropoutNd) and part.training and part.p:
        return False
    if any(tensor is not None for tensor in (*part._parameters.values(), *part._buffers.values())):
        return False
    return all(name in _TORCHS_OWN or isinstance(value, _CONSTANT) or callable(value) for name, value in vars(part).items())
