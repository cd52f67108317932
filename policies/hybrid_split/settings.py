"""The table `[hybrid_split]`, and its rules."""
from __future__ import annotations

from dataclasses import dataclass, field

from ... import settings as settings_module
from .. import chunking
from .allocation import Allocation

COMPONENTS = ("diffusion_model", "text_encoder", "vae")
_FACTOR = {"minimum": 0.5, "maximum": 0.9}
_DEVICES = {"check": Allocation.parse}


@dataclass(frozen=True, kw_only=True)
class Rule:
    """Which models, and what becomes of them. What is not said is as in the table.

    Attributes:
        name: a glob on the file's name.
        component: one of `COMPONENTS`; "" is any.
        format: the file's extension, without the dot; "" is any.
        larger_than_gb: the weights' size.
        device_gb: weights on the device, at most.
        residency: "device": all of it there; "host": all of it streamed at each use.
        device: where it runs, as torch calls it; for models that are loaded from now on.
        devices: where its weights live, as in the table.
    """

    name: str = "*"
    component: str = field(default="", metadata={"choices": ("", *COMPONENTS)})
    format: str = ""
    larger_than_gb: float = field(default=0, metadata={"minimum": 0})
    smaller_than_gb: float = field(default=settings_module.LARGEST, metadata={"minimum": 0})
    conservative_factor: settings_module.Auto = field(default="auto", metadata={"choices": ("auto",), **_FACTOR})
    device_gb: settings_module.Auto = field(default="auto", metadata=settings_module.AUTO)
    residency: str = field(default="auto", metadata={"choices": ("auto", "device", "host")})
    device: str = ""
    devices: str = field(default="", metadata=_DEVICES)


@dataclass(frozen=True)
class Settings:
    mode: str = field(default="auto", metadata={"choices": ("auto", "conservative")})
    overhead_percent: float = field(default=15, metadata={"minimum": 10, "maximum": 30})
    conservative_factor: float = field(default=0.7, metadata=_FACTOR)
    skip_clip: bool = False
    devices: str = field(default="", metadata=_DEVICES)
    rescue: bool = True
    ffn_chunks: int = field(default=1, metadata=chunking.SETTING)
    rules: tuple[Rule, ...] = ()
