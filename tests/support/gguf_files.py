"""Writes GGUF files with the gguf package."""
from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import gguf


def save(path: Path, architecture: str, tensors: Mapping[str, Any], more: Callable[[Any], None] = lambda writer: None) -> str:
    """Writes a file and returns its path.

    Args:
        tensors: arrays, or (array, type) where the array holds blocks of a type; None as type is the array's own.
        more: adds key-value pairs, or what else, to the writer.
    """
    writer = gguf.GGUFWriter(str(path), architecture)
    more(writer)
    for name, value in tensors.items():
        array, kind = value if isinstance(value, tuple) else (value, None)
        writer.add_tensor(name, array, raw_dtype=kind)
    finish(writer)
    return str(path)


def finish(writer: Any) -> None:
    """Writes everything that was added, and closes the file."""
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
