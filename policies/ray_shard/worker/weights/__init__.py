"""Where the weights lie of a model that is larger than a device: each worker has some of its blocks. A module for each mode."""
from __future__ import annotations

from .blocks import Blocks
from .owned import Owned
from .pipeline import Pipeline

MODES: dict[str, type[Owned]] = {"blocks": Blocks, "pipeline": Pipeline}
