"""What workers have of a model: weights as built, and what is patched. Sent when it changed, acknowledged before a step."""
from __future__ import annotations

import itertools
import pickle
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any
from weakref import WeakKeyDictionary, finalize

import ray
import torch

from ...telemetry import emit
from ..files.bank import Bank
from ..files.provenance import FileChanged
from ..models import Remote
from .abroad import Supply, sent_bytes
from .crew import Crew
from .packing import SourceFile
from .parcels import Parcel, pack
from .workers import Worker

_LOADING = 600.0  # seconds
# What objects of packs raise when they are pickled, and what Ray raises when its store is full.
UNSENDABLE = (pickle.PicklingError, TypeError, AttributeError, ValueError, RuntimeError, FileChanged, ray.exceptions.RayError)


@dataclass
class Freight:
    """One model.

    Attributes:
        key: what the workers call it.
        kind: `Remote.kind`.
        stored: a reference to its parcel, once it is in Ray's store.
        supply, patched: of its files, and of those of what is patched, for workers that lack them.
        digest: of what is patched.
        token: what the host said when that was pickled.
    """

    key: str
    kind: str
    name: str
    model: Parcel
    stored: Any = None
    supply: Supply = field(default_factory=Supply)
    patches: Any = None
    patched: Supply = field(default_factory=Supply)
    digest: str = ""
    token: object = field(default_factory=object)


class Freighter:
    """Packs models, and brings them to the workers."""

    def __init__(self, crew: Crew, bank: Bank) -> None:
        self._crew, self._bank = crew, bank
        self._freights: WeakKeyDictionary[torch.nn.Module, Freight] = WeakKeyDictionary()
        self._numbers = itertools.count(1)

    def pack(self, remote: Remote) -> None:
        """Packs a model, once, while nothing of it is patched or on a device.

        What no file backs is the host's own memory, to which hooks write in place: it is stored before that.

        Raises:
            Exception: it cannot be pickled, or stored.
            BaseException: the host's Cancel.
        """
        if remote.module in self._freights:
            return
        name = type(remote.module).__name__
        key = f"{name}-{next(self._numbers)}"
        with remote.unpaged():
            parcel = pack(remote.as_built(), self._bank)
        freight = Freight(key, remote.kind, name, parcel, supply=Supply(parcel.files))
        if parcel.copied_bytes and self._crew.ready():
            freight.stored = ray.put(parcel)
        self._freights[remote.module] = freight
        finalize(remote.module, self._crew.tell, "forget", key)

    def of(self, remote: Remote) -> Freight | None:
        """The freight of a model; None where it was not packed."""
        return self._freights.get(remote.module)

    def __contains__(self, module: torch.nn.Module) -> bool:
        return module in self._freights

    def key(self, module: torch.nn.Module) -> str:
        """What the workers call it."""
        return self._freights[module].key

    def deliver(self, remote: Remote, workers: Sequence[Worker]) -> Freight:
        """Sees to it that these workers have the model, and what is patched.

        Raises:
            Lost, Failed: a worker could not take it.
            Exception: what is patched cannot be pickled.
        """
        freight = self._freights[remote.module]
        self._repack(remote, freight)
        without = [worker for worker in workers if freight.key not in worker.models]
        if without:
            self._load(freight, without)
        other = [worker for worker in workers if worker.models[freight.key] != freight.digest]
        if other:
            started = time.perf_counter()
            self._send(freight.patched, other, "patch", freight.key, freight.digest, freight.patches)
            for worker in other:
                worker.models[freight.key] = freight.digest
            emit("shard.patched", model=freight.name, workers=len(other), seconds=time.perf_counter() - started)
        return freight

    def _repack(self, remote: Remote, freight: Freight) -> None:
        token = remote.token()
        if token == freight.token:
            return
        parcel = pack(remote.patches(), self._bank, known=remote.known())
        digest = parcel.digest()
        if digest != freight.digest:
            freight.patches, freight.patched, freight.digest = ray.put(parcel), Supply(parcel.files), digest
        freight.token = token

    def _load(self, freight: Freight, workers: Sequence[Worker]) -> None:
        started = time.perf_counter()
        if freight.stored is None:
            freight.stored = ray.put(freight.model)
        lacking = self._send(freight.supply, workers, "load", freight.key, freight.kind, freight.stored)
        for worker in workers:
            worker.models[freight.key] = ""
        emit("shard.loaded", model=freight.name, workers=len(workers), mapped_bytes=freight.model.mapped_bytes,
             copied_bytes=freight.model.copied_bytes, seconds=time.perf_counter() - started,
             **({"sent_bytes": sent_bytes(lacking)} if any(lacking.values()) else {}))

    def _send(self, supply: Supply, workers: Sequence[Worker], what: str,
              *arguments: Any) -> Mapping[Worker, Sequence[SourceFile]]:
        """Asks workers to take a parcel, each with what it lacks of the parcel's files, which is returned."""
        lacking = supply.lacking(self._crew, workers)
        asked = {worker: worker.ask(what, *arguments, *map(supply.reference, lacking.get(worker, ()))) for worker in workers}
        self._crew.gather(asked, _LOADING)
        return lacking
