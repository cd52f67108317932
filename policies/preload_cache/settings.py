"""The table `[preload_cache]`, and the lists of what is loaded at the start."""
from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(frozen=True, kw_only=True)
class Item:
    """What every entry of a list may say.

    Attributes:
        cache_key: how the entry is called in the console and in the status; the files' names where it is empty.
        keep: leaves last where the budget is short.
    """

    enabled: bool = True
    cache_key: str = ""
    description: str = ""
    keep: bool = False


@dataclass(frozen=True, kw_only=True)
class Checkpoint(Item):
    name: str


@dataclass(frozen=True, kw_only=True)
class TextEncoders(Item):
    names: tuple[str, ...]
    type: str = "stable_diffusion"
    device: str = "default"


@dataclass(frozen=True, kw_only=True)
class DiffusionModel(Item):
    name: str
    weight_dtype: str = "default"


@dataclass(frozen=True, kw_only=True)
class VAE(Item):
    name: str


@dataclass(frozen=True)
class Settings:
    when: str = field(default="after", metadata={"choices": ("before", "after")})
    auto_gpu_load: bool = False
    learn: bool = False
    import_: str = field(default="", metadata={"key": "import"})
    snapshot: bool = False
    checkpoints: tuple[Checkpoint, ...] = ()
    text_encoders: tuple[TextEncoders, ...] = ()
    diffusion_models: tuple[DiffusionModel, ...] = ()
    vaes: tuple[VAE, ...] = ()
