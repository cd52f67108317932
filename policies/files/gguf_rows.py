"""The order of rows in which llama.cpp keeps the queries and keys of its Llama architectures.

Source: https://github.com/ggml-org/llama.cpp/blob/master/convert_hf_to_gguf.py, LlamaModel.permute.
"""
from __future__ import annotations

import torch


def apart(tensor: torch.Tensor, heads: int) -> torch.Tensor:
    """Undoes the interleaving: of every head first the rows that were even, then the odd ones.

    Args:
        tensor: (rows, ...), as llama.cpp rotates them, in pairs of neighbours.
        heads: which divide the rows.

    Returns:
        the same shape, for a rotation that pairs a head's first half with its second. New memory.
    """
    pairs = tensor.reshape(heads, -1, 2, *tensor.shape[1:])
    return pairs.transpose(1, 2).reshape(tensor.shape)
