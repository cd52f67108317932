"""Files of weights that workers on other hosts lack: asked for, and sent once for each host.

Where the file is there, the worker maps its own. What is missing travels through Ray's store, of which all workers of a host
read the same one. Workers on this machine are asked nothing.
"""
from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import ray
import torch

from ..files.likeness import Likeness
from ..files.maps import MAPS
from .crew import Crew
from .packing import SourceFile
from .rebuilding import Pieces
from .workers import Worker

_COMPARING = 120.0  # seconds


@dataclass
class Supply:
    """What has to be sent of a parcel's files.

    Attributes:
        files: of the parcel.
        stored: references to what is in Ray's store.
    """

    files: Sequence[SourceFile] = ()
    stored: dict[SourceFile, Any] = field(default_factory=dict)

    def lacking(self, crew: Crew, workers: Sequence[Worker]) -> Mapping[Worker, Sequence[SourceFile]]:
        """The files that a worker does not have; the others it has looked at, and will map.

        Raises:
            FileChanged: a file is not here any more.
            Lost, Failed: a worker cannot say.
        """
        others = [worker for worker in workers if worker.host] if self.files else []
        if not others:
            return {}
        known = [(file.name.identity, Likeness.of(file.name.path, file.name.identity, [place[:2] for place in file.places]))
                 for file in self.files]
        answers = crew.gather({worker: worker.ask("has", known) for worker in others}, _COMPARING)
        return {worker: [file for file, there in zip(self.files, answer, strict=True) if not there]
                for worker, answer in zip(others, answers, strict=True)}

    def reference(self, file: SourceFile) -> Any:
        """To the pieces of a file, in the store."""
        if file not in self.stored:
            self.stored[file] = ray.put(pieces(file))
        return self.stored[file]


def pieces(file: SourceFile) -> Pieces:
    """What is used of a file, over this process's mapping of it until it is stored.

    Raises:
        FileChanged: it is another file by now.
    """
    whole = torch.empty(0, dtype=torch.uint8).set_(MAPS.file(file.name.path, file.name.identity)).numpy()
    return Pieces(file.name, {(offset, size): whole[offset:offset + size] for offset, size, _ in file.places},
                  frozenset((offset, size) for offset, size, shared in file.places if shared))


def sent_bytes(lacking: Mapping[Worker, Sequence[SourceFile]]) -> dict[str, int]:
    """By host; several workers of one read the same."""
    files = {worker.host: set[SourceFile]() for worker in lacking}
    for worker, missing in lacking.items():
        files[worker.host].update(missing)
    return {host: sum(file.size for file in missing) for host, missing in files.items() if missing}
