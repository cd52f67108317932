"""For machines that are frozen with everything in RAM and thawed elsewhere: weights in anonymous memory, and no need of files.

A memory snapshot holds what is private to the process; a file's mapping is not in it. So what is read is copied out of the
mapping, the opposite of what helps elsewhere. After the thaw the files may be on another device, or not be there yet: they
are told by path, size and modification time, and one that is missing is taken for what it was.
"""
from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping
from typing import Any

import torch

from ...telemetry import emit
from ..files.bank import Bank
from ..files.identity import Identity
from ..models import Models, Recipe
from ..policy import Decision, Proceed
from ..requests import FindFile, ListFiles, ReadWeights

_FOLDERS = {"vaes": "vae"}  # where the host's folder is not called as the kind


class Snapshot:
    """Decides on reads and on looking for files."""

    def __init__(self, models: Models, bank: Bank) -> None:
        self._models, self._bank = models, bank
        self._identities: dict[str, Identity] = {}
        self._paths: dict[tuple[str, str], str] = {}
        self._devices: Mapping[str, str] | None = None

    def identities(self, paths: tuple[str, ...]) -> tuple[Identity, ...]:
        """The files as they are, or as they were where they are missing now.

        Raises:
            OSError: one is missing, and was never seen.
        """
        for path in paths:
            try:
                self._identities[path] = Identity.of(path)
            except OSError:
                if path not in self._identities:
                    raise
        return tuple(self._identities[path] for path in paths)

    def same(self, path: str, then: Identity) -> bool:
        """Whether a file is what it was, or missing."""
        return self.mark(path, self.identities((path,))[0]) == self.mark(path, then)

    @staticmethod
    def mark(path: str, identity: Identity) -> Hashable:
        return (path, identity.size, identity.mtime_ns)

    def note(self, recipe: Recipe | None, paths: tuple[str, ...]) -> None:
        """Remembers where the files of something that is kept were."""
        if recipe is not None and len(recipe.names) == len(paths):
            folder = _FOLDERS.get(recipe.kind, recipe.kind)
            self._paths |= {(folder, name): path for name, path in zip(recipe.names, paths, strict=True)}

    def remember_devices(self) -> None:
        """Takes down what the host chose, to be compared after the thaw."""
        self._devices = self._models.devices()
        emit("snapshot.ready", devices=self._devices)

    def restored(self) -> bool:
        """Lets the host choose again; whether any device is another one now. Only the first call does something."""
        if self._devices is None:
            return False
        before, self._devices = self._devices, None
        changed = dict(self._models.wake())
        now = self._models.devices()
        changed |= {kind: now[kind] for kind in now if now[kind] != before.get(kind)}
        if changed:
            emit("snapshot.restored", devices=changed)
        return bool(changed)

    def read(self, request: ReadWeights) -> Decision | None:
        if not request.on_cpu:
            return None

        def act(proceed: Proceed) -> Any:
            answer = proceed()
            state_dict = answer[0] if request.with_metadata else answer
            if not isinstance(state_dict, dict):
                return answer
            for key, value in state_dict.items():
                if isinstance(value, torch.Tensor):
                    state_dict[key] = materialised(value)
            self._bank.empty()  # the mapping that it was copied from
            return answer

        return Decision(f"{request.path}: copied into RAM, for a snapshot", act)

    def list_files(self, request: ListFiles) -> Decision | None:
        held = [name for folder, name in self._paths if folder == request.folder]
        if not held:
            return None

        def act(proceed: Proceed) -> Any:
            try:
                names = proceed()
            except FileNotFoundError:  # the whole folder is gone, or not mounted yet
                names = []
            return [*names, *(name for name in held if name not in names)]

        return Decision("", act)

    def find_file(self, request: FindFile) -> Decision | None:
        path = self._paths.get((request.folder, request.name))
        if path is None:
            return None
        held: Callable[[Proceed], Any] = lambda proceed: proceed() or path  # noqa: E731
        return Decision("", held)


def materialised(tensor: torch.Tensor) -> torch.Tensor:
    """The same tensor in private memory, whatever it is made of."""
    if not hasattr(tensor, "__tensor_flatten__"):
        return tensor.clone()
    names, context = tensor.__tensor_flatten__()
    inner = {name: getattr(tensor, name).clone() for name in names}
    made: torch.Tensor = type(tensor).__tensor_unflatten__(  # type: ignore[attr-defined]
        inner, context, tensor.size(), tensor.stride())
    return made
