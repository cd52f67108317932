"""What is to be loaded at the start: the lists of the settings, the community's `preload_config.json`, and what was learned."""
from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ...settings import SettingsError, fill
from ..models import Recipe
from .settings import VAE, Checkpoint, DiffusionModel, Item, Settings, TextEncoders

_OUR_WORDS: dict[str, str] = {"clip_names": "names", "model_name": "name", "vae_name": "name"}  # by the community's
_LISTS: dict[str, type[Item]] = {"checkpoints": Checkpoint, "text_encoders": TextEncoders,
                                 "diffusion_models": DiffusionModel, "vaes": VAE}


@dataclass(frozen=True)
class Wish:
    """One model to load at the start, and what its entry says of it."""

    recipe: Recipe
    label: str
    description: str = ""
    keep: bool = False
    learned: bool = False


@dataclass(frozen=True)
class Imported:
    """What a `preload_config.json` says. `skipped` has a sentence for each entry that cannot be used."""

    wishes: tuple[Wish, ...]
    auto_gpu_load: bool
    verbose: bool
    skipped: tuple[str, ...]


def listed(settings: Settings) -> list[Wish]:
    """The enabled entries of the settings' lists."""
    return [wish for kind in _LISTS for item in getattr(settings, kind) for wish in _wish(kind, item)]


def without_duplicates(wishes: Iterable[Wish]) -> tuple[list[Wish], list[Wish]]:
    """(each recipe once, the others)."""
    first: dict[Recipe, Wish] = {}
    again = [wish for wish in wishes if first.setdefault(wish.recipe, wish) is not wish]
    return list(first.values()), again


def read(file: Path) -> Imported:
    """Reads the format of ComfyUI-ModelMemorySnapshot.

    Raises:
        SettingsError: the file cannot be read or is no such file; the message names it.
    """
    try:
        config = json.loads(file.read_text(encoding="utf-8-sig"))
        models, settings = config["models"], config.get("settings", {})
        lists = {kind: list(models.get(kind, ())) for kind in _LISTS}
    except OSError as error:
        raise SettingsError(f"{file}: cannot be read: {error.strerror}") from None
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise SettingsError(f"{file}: this is no preload_config.json: {type(error).__name__}: {error}") from None
    wishes: list[Wish] = []
    skipped: list[str] = []
    for kind, items in lists.items():
        for index, item in enumerate(items):
            try:
                wishes += _wish(kind, fill(_LISTS[kind], _translated(item), str(file), f"{kind}[{index}]."))
            except SettingsError as error:
                skipped.append(str(error))
    flags = settings if isinstance(settings, Mapping) else {}
    return Imported(tuple(wishes), flags.get("auto_gpu_load") is True, flags.get("verbose") is True, tuple(skipped))


def _translated(item: Any) -> Mapping[str, Any]:
    return {_OUR_WORDS.get(str(key), str(key)): value for key, value in item.items()} if isinstance(item, Mapping) else {}


def _wish(kind: str, item: Any) -> Iterator[Wish]:
    names = item.names if kind == "text_encoders" else (item.name,)
    if item.enabled:
        own = {key: getattr(item, key) for key in ("type", "device", "weight_dtype") if hasattr(item, key)}
        yield Wish(Recipe(kind, names, **own), item.cache_key or " + ".join(names), item.description, item.keep)
