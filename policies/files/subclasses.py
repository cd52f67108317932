"""Tensor subclasses with memory of their own, which packs make for their formats: a dense tensor, and attributes beside it.

GGUF packs have the file's mapping as that memory, so their weights can go home to it like those that we mapped. The attributes
are theirs: only memory is looked at and exchanged, and what the class does when it moves, it still does. Wrappers around other
tensors, such as the host's quantised tensors, are no such thing; they tell their parts.
"""
from __future__ import annotations

from typing import Any

import torch


def has_own_memory(value: Any) -> bool:
    """Whether it is such a tensor. Wrappers must have a dispatcher of their own, which says what the parts do."""
    return (isinstance(value, torch.Tensor) and type(value) not in (torch.Tensor, torch.nn.Parameter)
            and type(value).__torch_dispatch__ is torch.Tensor.__torch_dispatch__
            and value.layout is torch.strided and not value.is_meta)


def memory(value: torch.Tensor) -> torch.Tensor:
    """The same memory as an ordinary tensor, whatever the subclass says of its shape."""
    with torch._C.DisableTorchFunctionSubclass():
        return value.as_subclass(torch.Tensor)


def over(memory: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """A tensor of the class and with the attributes of another, over other memory.

    It is a parameter if the other one is: torch knows those of a subclass by an attribute.
    """
    with torch._C.DisableTorchFunctionSubclass():
        made = memory.as_subclass(type(like))
    made.__dict__.update(like.__dict__)
    return made
