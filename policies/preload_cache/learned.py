"""Remembers what was used, over restarts: a small JSON file beside the user's settings."""
from __future__ import annotations

import dataclasses
import json
import os
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

from ..models import KINDS, Recipe
from .wishes import Wish

MOST = 64  # recipes that are remembered


class Learned:
    """How often each recipe was asked for, and when last (seconds since the epoch)."""

    def __init__(self, file: Path) -> None:
        self._file = file
        self._uses: dict[Recipe, tuple[int, float]] = {}
        self._new = False
        with suppress(OSError, ValueError, TypeError, KeyError, AttributeError):  # nothing learned, or nothing that we wrote
            for item in json.loads(file.read_text(encoding="utf-8")):
                recipe = Recipe(**{**item["recipe"], "names": tuple(map(str, item["recipe"]["names"]))})
                if recipe.kind in KINDS:
                    self._uses[recipe] = int(item["uses"]), float(item["last"])

    def used(self, recipe: Recipe) -> None:
        self._uses[recipe] = self._uses.get(recipe, (0, 0))[0] + 1, time.time()
        self._new = True

    def most_used(self) -> list[Wish]:
        ranked = sorted(self._uses, key=lambda recipe: self._uses[recipe], reverse=True)
        return [Wish(recipe, " + ".join(recipe.names), "learned", learned=True) for recipe in ranked]

    def save(self) -> None:
        """Writes what is new, whole or not at all.

        Raises:
            OSError: it cannot be written.
        """
        if not self._new:
            return
        self._new = False
        ranked = sorted(self._uses.items(), key=lambda pair: pair[1], reverse=True)[:MOST]
        rows: list[Any] = [{"recipe": dataclasses.asdict(recipe), "uses": uses, "last": last}
                           for recipe, (uses, last) in ranked]
        self._file.parent.mkdir(parents=True, exist_ok=True)
        partial = self._file.with_suffix(".partial")
        partial.write_text(json.dumps(rows, indent=1), encoding="utf-8")
        os.replace(partial, self._file)
