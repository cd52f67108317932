"""A small group of processes that exchange tensors whose sizes differ from rank to rank.

Made of torch.distributed's process groups directly: its global one (`init_process_group`) is one for a process, and a worker
sees several groups in its life, as others die and are replaced. Each group has a port, and so a rendezvous, of its own: nothing
that an earlier group left there can be mistaken for an answer.

gloo carries what is on the CPU; NCCL what is on CUDA devices, if every rank has one of its own; anything else goes through the
CPU. Tensors travel as bytes, so that every dtype does. A rank that fails closes its group, and the others hear of it at once by
gloo; by NCCL they hear after the timeout, when torch ends their process.
"""
from __future__ import annotations

import datetime
import math
import os
import socket
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch
import torch.distributed

from .ports import interface_of, listen

dist: Any = torch.distributed  # most of what is used here is its C++ half, which has no types
BACKENDS = ("auto", "gloo", "nccl")
_CPU = torch.device("cpu")
# torch records every collective in one table of the process, which two threads that use two groups break (a segmentation fault
# in 2.11's `FlightRecorder::record`). 0 turns that off.
_NO_RECORDER = "TORCH_FR_BUFFER_SIZE", "0"


class Exchange(Protocol):
    """What sharing a computation needs of a group."""

    rank: int
    world: int

    def gather(self, tensor: torch.Tensor, dim: int, sizes: Sequence[int]) -> torch.Tensor: ...

    def all_to_all(self, parts: Sequence[torch.Tensor],
                   shapes: Sequence[Sequence[int]]) -> Callable[[], list[torch.Tensor]]: ...


class PeerLost(RuntimeError):
    """Another rank died, or did not answer in time. The group is closed by it; a new one needs a new port."""


class Group:
    """`world` processes, of which this one is `rank`. Every rank makes it, and calls the same methods in the same order.

    Args:
        address: "host:port" that rank 0 listens on, and nobody used for a group before.
        backend: "gloo", "nccl", or "auto": NCCL where every rank has a CUDA device of its own, else gloo. One rank that asks
            for gloo decides for all.
        device: that this rank computes on.
        interface: this rank's own address, which the others reach; "" where all are on one machine.
        timeout: seconds that a rank waits for the others, in the rendezvous and in each collective.

    Attributes:
        backend: what carries tensors of CUDA devices: "nccl" or "gloo".
        collectives: exchanges so far.
        sent: bytes that this rank gave to others in them.

    Raises:
        ValueError: the arguments make no group.
        OSError: rank 0 cannot listen there.
        PeerLost: not all ranks came in time.
    """

    def __init__(self, rank: int, world: int, address: str, backend: str = "auto", *, device: torch.device = _CPU,
                 timeout: float = 60.0, interface: str = "") -> None:
        host, _, port = address.rpartition(":")
        if not (0 <= rank < world and host and port.isdigit() and backend in BACKENDS):
            raise ValueError(f"no group: rank {rank} of {world} at {address!r} by {backend!r}, which is one of {BACKENDS}")
        self.rank, self.world = rank, world
        self.collectives = self.sent = 0
        self._gloo: Any = None
        self._nccl: Any = None
        host, patience = host.strip("[]"), datetime.timedelta(seconds=timeout)
        server = listen(host, int(port)) if rank == 0 else None
        os.environ.setdefault(*_NO_RECORDER)
        if name := interface_of(interface):  # NCCL's choice among several may be one that the others do not reach
            os.environ.setdefault("NCCL_SOCKET_IFNAME", f"={name}")
        try:
            store = dist.TCPStore(host, int(port), world, rank == 0, patience, wait_for_workers=False,
                                  master_listen_fd=server, use_libuv=False)  # libuv is not in every build of torch
            cards = _cards(store, rank, world, _card(device, rank) if backend != "gloo" else "")
            self._gloo = dist.ProcessGroupGloo(dist.PrefixStore("gloo", store), rank, world,
                                               _options(interface or host, patience))
            if all(cards) and len(set(cards)) == world:
                options = dist.ProcessGroupNCCL.Options()
                options._timeout = patience
                self._nccl = dist.ProcessGroupNCCL(dist.PrefixStore("nccl", store), rank, world, options)
        except RuntimeError as error:
            raise PeerLost(f"rank {rank} of {world} did not meet all others at {address} in {timeout:g} s: {error}") from error
        if backend == "nccl" and self._nccl is None:
            self.close()
            raise ValueError(f"NCCL needs a CUDA device of its own for every rank, and these are there: {cards}")
        self.backend = "gloo" if self._nccl is None else "nccl"

    def gather(self, tensor: torch.Tensor, dim: int, sizes: Sequence[int]) -> torch.Tensor:
        """Every rank's tensor, one after the other along `dim`, where rank r's is `sizes[r]` long; in all else they are alike.

        Raises:
            ValueError: this rank's is not as long as it says.
            PeerLost: another rank did not take part.
        """
        dim %= tensor.ndim
        if len(sizes) != self.world or tensor.shape[dim] != sizes[self.rank]:
            raise ValueError(f"rank {self.rank} has {tuple(tensor.shape)} to gather along {dim} as {list(sizes)}")
        carrier, device = self._carrier(tensor)
        mine = tensor.detach().to(device).contiguous()
        if math.prod(mine.shape[:dim]) == 1:  # the parts are whole pieces of the result, and are received in their places
            whole = mine.new_empty((*mine.shape[:dim], sum(sizes), *mine.shape[dim + 1:]))
            parts = list(torch.split(whole, list(sizes), dim))
            parts[self.rank].copy_(mine)
        else:
            whole = None
            parts = [mine if rank == self.rank else mine.new_empty((*mine.shape[:dim], size, *mine.shape[dim + 1:]))
                     for rank, size in enumerate(sizes)]
        self._count(mine.nbytes * (self.world - 1))
        self._wait([carrier.broadcast([_as_bytes(part)], _from(rank)) for rank, part in enumerate(parts) if part.numel()])
        return (torch.cat(parts, dim) if whole is None else whole).to(tensor.device)

    def all_to_all(self, parts: Sequence[torch.Tensor], shapes: Sequence[Sequence[int]]) -> Callable[[], list[torch.Tensor]]:
        """Begins to exchange; what is returned waits, and has what every rank has for this one, in the order of ranks.

        Args:
            parts: for rank r, `parts[r]`. All of one dtype, which is that of the result.
            shapes: of what rank r has for this rank, `shapes[r]`.

        Raises:
            ValueError: not one part and one shape for each rank.
            PeerLost: another rank did not take part; here or while it is waited for.
        """
        if not len(parts) == len(shapes) == self.world:
            raise ValueError(f"{len(parts)} parts and {len(shapes)} shapes for {self.world} ranks")
        carrier, device = self._carrier(parts[0])
        out = [_as_bytes(part.detach().to(device).contiguous()) for part in parts]
        sizes = [math.prod(shape) * parts[0].element_size() for shape in shapes]
        received = torch.empty(sum(sizes), dtype=torch.uint8, device=device)
        self._count(sum(part.nbytes for rank, part in enumerate(out) if rank != self.rank))
        work = carrier.alltoall_base(received, torch.cat(out), sizes, [part.numel() for part in out])
        dtype, where = parts[0].dtype, parts[0].device

        def arrived() -> list[torch.Tensor]:
            self._wait([work])
            return [part.view(dtype).view(*shape).to(where)
                    for part, shape in zip(torch.split(received, sizes), shapes, strict=True)]

        return arrived

    def place(self, device: torch.device) -> torch.device:
        """Where bytes of a device are to be while they travel."""
        return self._carrier(torch.empty(0, device=device))[1]

    def begin(self, how: str, data: torch.Tensor, rank: int) -> Callable[[], None]:
        """Begins to move bytes: to "broadcast" them from a rank to all, to "send" them to it, or to "recv" them from it.

        Returns:
            What waits until they have moved, and may raise `PeerLost`.
        """
        carrier, _ = self._carrier(data)
        self._count(data.nbytes if how == "send" or (how == "broadcast" and rank == self.rank) else 0)
        work = getattr(carrier, how)([data], *((_from(rank),) if how == "broadcast" else (rank, 0)))
        return lambda: self._wait([work])

    def begin_gather(self, whole: torch.Tensor, part: torch.Tensor) -> Callable[[], None]:
        """Begins to bring every rank's part to all, of parts that are as long: into `whole`, in the order of ranks.

        Returns:
            What waits until they are there, and may raise `PeerLost`.
        """
        carrier, device = self._carrier(whole)
        there = whole if whole.device == device else torch.empty_like(whole, device=device)
        mine = part.to(device)
        self._count(part.nbytes * (self.world - 1))
        works = [carrier._allgather_base(there, mine)] if device.type == "cuda" else self._broadcasts(carrier, there, mine)

        def arrived() -> None:
            self._wait(works)
            if there is not whole:
                whole.copy_(there)

        return arrived

    def _broadcasts(self, gloo: Any, whole: torch.Tensor, part: torch.Tensor) -> list[Any]:
        """gloo gathers by way of memory that its threads keep; these are received in their places."""
        parts = torch.chunk(whole, self.world)
        if part.data_ptr() != parts[self.rank].data_ptr():
            parts[self.rank].copy_(part)
        return [gloo.broadcast([_as_bytes(one)], _from(rank)) for rank, one in enumerate(parts)]

    def close(self) -> None:
        """Lets go of the connections, whatever is still under way. The others find out at their next exchange."""
        if self._nccl is not None and hasattr(self._nccl, "abort"):
            self._nccl.abort()
        self._gloo = self._nccl = None

    def _carrier(self, tensor: torch.Tensor) -> tuple[Any, torch.device]:
        """The process group for a tensor, and where it wants it."""
        gloo, nccl = self._gloo, self._nccl  # another thread may close it
        if gloo is None:
            raise PeerLost(f"rank {self.rank} of {self.world} has closed this group")
        return (nccl, tensor.device) if nccl is not None and tensor.is_cuda else (gloo, _CPU)

    def _count(self, sent: int) -> None:
        self.collectives += 1
        self.sent += sent

    def _wait(self, works: list[Any]) -> None:
        try:
            for work in works:
                work.wait()
        except RuntimeError as error:
            self.close()
            raise PeerLost(f"rank {self.rank} of {self.world} lost another in exchange {self.collectives}: {error}") from error


def _as_bytes(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.view(-1).view(torch.uint8)


def _from(rank: int) -> Any:
    options = dist.BroadcastOptions()
    options.rootRank, options.rootTensor = rank, 0
    return options


def _options(host: str, patience: datetime.timedelta) -> Any:
    """gloo's, which listens on this address; ranks on one machine do not leave it."""
    gloo = dist.ProcessGroupGloo
    options = gloo._Options()
    options._timeout = patience
    options._devices = [gloo.create_device(hostname=host)]
    return options


def _card(device: torch.device, rank: int) -> str:
    """Which card a device is, of all in the world; "" if NCCL cannot use it."""
    if device.type != "cuda" or not dist.is_nccl_available():
        return ""
    return f"{socket.gethostname()} {getattr(torch.cuda.get_device_properties(device), 'uuid', rank)}"


def _cards(store: Any, rank: int, world: int, card: str) -> list[str]:
    """Every rank's card; all ranks see the same list, and so decide alike."""
    store.set(f"card/{rank}", f"={card}")  # to get an empty value takes torch's store 0.2 s
    return [store.get(f"card/{other}").decode()[1:] for other in range(world)]
