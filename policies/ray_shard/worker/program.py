"""The program that runs in a worker's process: it holds ComfyUI's own models and predicts with them."""
from __future__ import annotations

import gc
import time
from collections.abc import Mapping, Sequence
from typing import Any

import psutil
import ray
import torch

from ...chunking import Chunking
from ...files.identity import Identity
from ...files.likeness import Likeness
from ...files.maps import MAPS
from ...memory import process_memory
from ..memo import Received
from ..parcels import Parcel, pack, unpack
from ..rebuilding import Pieces
from ..tiles import as_it_lay
from .group import Group, PeerLost
from .pace import Pace
from .ports import open_port
from .sharing import TOGETHER, sharing
from .start import become, end_with
from .tokens import Unsuited


class Program:
    """What the host asks of a worker.

    Args:
        twin: `policies.host.Process.twin`.
        device: that it computes on, as torch calls it in this process.
        orphan: whether it does not end with the host's process: it outlives that, or is on another machine, where Ray ends it.
        mates: how many workers share this machine's cores.
        ffn_chunks: the pieces that feed-forwards are run in.
    """

    def __init__(self, twin: Mapping[str, Any], device: str, orphan: bool, mates: int = 1, ffn_chunks: int = 1) -> None:
        become(twin, device, mates)
        if not orphan:
            end_with(*twin["process"])
        import comfy.model_management as management

        from . import attention
        from .models import Models

        self._management, self._attention = management, attention
        self._device = management.get_torch_device()
        self._models = Models(self._device, management.unet_offload_device(), Chunking(ffn_chunks))
        self._received = Received()
        self._group: Group | None = None
        self._shares: Sequence[float] = ()
        self._pace: Pace | None = None
        self._link = 0.0  # bytes per second that come from the others
        self._owned: dict[tuple[str, str], Any] = {}  # by model and mode, what its weights are shared out by in this group

    def about(self) -> dict[str, Any]:
        """Where it runs, and what memory it has: bytes free on its device, bytes of RAM: its own, and its part of all."""
        memory = process_memory()
        info = psutil.Process().memory_full_info()
        return {"pid": psutil.Process().pid, "device": str(self._device), "free_bytes": self._free(),
                "private_bytes": memory.private, "shared_bytes": getattr(info, "pss", 0)}

    def has(self, files: Sequence[tuple[Identity, Likeness]]) -> list[bool]:
        """Whether this machine has files like these, of another machine with identities there. What it has, it will map."""
        return [MAPS.accept(identity, likeness) for identity, likeness in files]

    def load(self, key: str, kind: str, parcel: Parcel, *sent: Pieces) -> None:
        """Takes a model as it was built; `kind` is `policies.models.Remote.kind`, `sent` of files that are not here."""
        with torch.inference_mode():
            self._models.add(key, kind, parcel, sent)
        self._attention.install()

    def patch(self, key: str, digest: str, parcel: Parcel, *sent: Pieces) -> None:
        """Takes what is patched; from then on it predicts with it."""
        with torch.inference_mode():
            self._models[key].patch(digest, parcel, sent)

    def predict(self, key: str, digest: str, parcel: Parcel, way: str, guests: bool, weights: str = "") -> dict[str, Any]:
        """One batch.

        Args:
            way: `sharing.HEADS` or `sharing.TOKENS`, for which all workers are asked at the same time; else it is of this one.
            guests: packs take part, and are looked at for a state of their own.
            weights: how they are shared out, by `weights.MODES`, for which all workers are asked too; "" is not at all.

        Returns:
            The answer, and what it took; or under "unsuited" why it cannot be computed in this way.

        Raises:
            KeyError: the model, or what is patched, is not here.
            PeerLost: another worker did not take part.
        """
        started = time.perf_counter()
        with torch.inference_mode():
            model = self._models[key]
            model.must_have(digest)
            arguments = self._received.open(parcel, self._device)
            options = dict(arguments["transformer_options"])
            before = pack(options, files=False).digest() if guests else ""
            ready = time.perf_counter()
            try:
                if way in TOGETHER or weights:
                    answer, shared = self._together(key, way, weights, model, arguments, apart=not guests)
                else:
                    answer, shared = model.predict(arguments), 0
            except Unsuited as unsuited:
                return {"unsuited": str(unsuited), "free_bytes": self._free()}
            computed = time.perf_counter()
            stateful = guests and pack(options, files=False).digest() != before
            packed = pack(answer, files=False)
        return {"answer": packed, "seconds": time.perf_counter() - started, "compute_seconds": computed - ready,
                "free_bytes": self._free(), "shared": shared, "stateful": stateful, "whole": model.whole}

    def tile(self, key: str, digest: str, function: Parcel, parcel: Parcel, room: float) -> dict[str, Any]:
        """One tile of a VAE's work.

        Args:
            function: of the host's, by what is here.
            parcel: the tile, and its strides.
            room: bytes that the largest tile takes beside the weights.

        Raises:
            KeyError: the VAE, or what is patched, is not here.
            BaseException: it was called off.
        """
        self._management.throw_exception_if_processing_interrupted()
        began = time.perf_counter()
        with torch.inference_mode():
            vae = self._models[key]
            vae.must_have(digest)
            tile = as_it_lay(*unpack(parcel, writable=True))
            started = time.perf_counter()
            answer = vae.tile(function, tile, room)
            computed = time.perf_counter()
            packed = pack(answer, files=False)
        return {"answer": packed, "seconds": time.perf_counter() - began, "compute_seconds": computed - started}

    def _together(self, key: str, way: str, weights: str, model: Any, arguments: dict[str, Any],
                  apart: bool) -> tuple[torch.Tensor, int]:
        """(the prediction, calls of attention that were shared)."""
        if self._group is None or self._pace is None:
            raise PeerLost("the workers have not met")
        try:
            owned = self._owned_of(key, weights, self._group)
            if way not in TOGETHER:
                return model.predict(arguments, owned, apart), 0
            with sharing(way, model.diffusion_model, arguments, self._group, self._shares, self._pace) as parallel, \
                    self._attention.sharing(parallel):
                return model.predict(arguments, owned, apart), parallel.shared
        except Unsuited:  # all workers find it alike
            raise
        except BaseException:
            self._leave()  # the others wait for this one no longer
            raise

    def _owned_of(self, key: str, weights: str, group: Group) -> Any:
        """How a model's weights are shared out in this group; None if they are not."""
        if not weights:
            return None
        from .weights import MODES

        return self._owned.setdefault((key, weights), MODES[weights](group, self._shares))

    def address(self, local: bool) -> str:
        """Where the workers can meet, on this worker's machine. `local`: all of them are there."""
        host = "127.0.0.1" if local else ray.util.get_node_ip_address()
        return f"{host}:{open_port(host)}"

    def join(self, rank: int, address: str, shares: Sequence[float], timeout: float, test: bool) -> None:
        """Meets the other workers there.

        Raises:
            PeerLost: not all came, or the test did not give what it should.
        """
        from .weights.measuring import link_of

        self._leave()
        self._group = Group(rank, len(shares), address, device=self._device, timeout=timeout, interface=_interface(address))
        self._shares, self._pace = shares, Pace(self._group)
        if test:
            mine = torch.full((1, 3), float(rank), device=self._device)
            met = self._group.gather(mine, 0, [1] * len(shares))
            if met[:, 0].tolist() != list(map(float, range(len(shares)))):
                raise RuntimeError(f"the workers exchanged {met[:, 0].tolist()}")
        self._link = link_of(self._group, self._device)

    def measure(self, key: str) -> dict[str, Any]:
        """What decides where a model's weights are to lie: see `weights.measuring`."""
        from .weights.measuring import measure

        with torch.inference_mode():
            self._models.release(key)
            return measure(self._models[key].diffusion_model, self._device, self._link)

    def _leave(self) -> None:
        if self._group is not None:
            self._group.close()
            self._group = None
            self._owned.clear()

    def release(self, key: str | None = None) -> None:
        """Takes a model, or all, off the device; their weights are the file's mapping again."""
        with torch.inference_mode():
            self._models.release(key)
        self._management.soft_empty_cache()

    def forget(self, key: str) -> None:
        """The host has no such model any more."""
        with torch.inference_mode():
            self._models.remove(key)
        self._owned = {name: owned for name, owned in self._owned.items() if name[0] != key}
        gc.collect()
        self._management.soft_empty_cache()

    def cancel(self, cancelled: bool) -> None:
        """The step that is being computed ends at its next layer; told beside it."""
        self._management.interrupt_current_processing(cancelled)
        if cancelled and self._group is not None:
            self._group.close()  # it may wait for another worker there

    def _free(self) -> int:
        return int(self._management.get_free_memory(self._device))


def _interface(address: str) -> str:
    """This machine's own address in the network that the others reach it by; "" where all are on this machine."""
    return "" if address.startswith("127.0.0.1:") else str(ray.util.get_node_ip_address())
