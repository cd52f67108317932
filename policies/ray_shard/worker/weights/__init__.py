"""Where the weights lie of a model that is larger than a device: each worker has some of its blocks, or a part
of each. A module for each mode."""
from __future__ import annotations

from .blocks import Blocks
from .fsdp2 import Fsdp2
from .owned import Owned
from .pipeline import Pipeline

MODES: dict[str, type[Owned]] = {"blocks": Blocks, "fsdp2": Fsdp2, "pipeline": Pipeline}
