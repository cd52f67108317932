"""Groups of ranks: what they exchange, what happens when one is missing. A rank is a thread here: groups know no process."""
from __future__ import annotations

import json
import socket
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import psutil
import pytest
import torch
from residency.policies.ray_shard.worker.group import Group, PeerLost
from residency.policies.ray_shard.worker.ports import interface_of, open_port

DTYPES = [torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.int64, torch.uint8, torch.bool]


def everywhere(world: int, work: Callable[[Group], Any], **options: Any) -> list[Any]:
    """What each rank of a new group makes of `work`."""
    address = f"127.0.0.1:{open_port()}"

    def rank(number: int) -> Any:
        group = Group(number, world, address, timeout=20, **options)
        try:
            return work(group)
        finally:
            group.close()

    with ThreadPoolExecutor(world) as pool:
        return list(pool.map(rank, range(world)))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_ranks_gather_what_differs_in_size(dtype: torch.dtype) -> None:
    """Nothing is padded, and one may have nothing; any dtype."""
    sizes = [3, 0, 2]
    whole = torch.arange(2 * 5 * 4).reshape(2, 5, 4).to(dtype)
    parts = torch.split(whole, sizes, 1)

    for result in everywhere(3, lambda group: group.gather(parts[group.rank], 1, sizes)):
        assert result.dtype == dtype and torch.equal(result.float(), whole.float())


@pytest.mark.parametrize("dim", [0, 1, 2, -1])
def test_ranks_gather_along_any_dimension(dim: int) -> None:
    """Views included, and tensors made for inference."""
    whole = torch.randn(1, 6, 6).transpose(1, 2) if dim else torch.randn(6, 1, 6)
    sizes = [4, 2]

    def work(group: Group) -> torch.Tensor:
        with torch.inference_mode():
            return group.gather(torch.split(whole, sizes, dim)[group.rank], dim, sizes)

    for result in everywhere(2, work):
        assert torch.equal(result, whole)


@pytest.mark.parametrize("lies_there", [True, False])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_parts_that_are_as_long_come_while_ranks_go_on(dtype: torch.dtype, lies_there: bool) -> None:
    """Into memory that is there; a rank's own part may lie in it already."""
    everything = torch.arange(12).to(dtype)

    def work(group: Group) -> tuple[torch.Tensor, int, int]:
        whole = torch.zeros(12, dtype=dtype)
        part = torch.chunk(whole, 3)[group.rank] if lies_there else torch.zeros(4, dtype=dtype)
        part.copy_(torch.chunk(everything, 3)[group.rank])
        arrived = group.begin_gather(whole, part)
        arrived()
        return whole, group.collectives, group.sent

    for whole, collectives, sent in everywhere(3, work):
        assert torch.equal(whole.float(), everything.float())
        assert (collectives, sent) == (1, 2 * 4 * dtype.itemsize)


def test_ranks_exchange_parts() -> None:
    """Each rank has a part of its own size for each other."""
    def part(source: int, target: int) -> torch.Tensor:
        return torch.full((source, target + 1), 10.0 * source + target)

    def work(group: Group) -> tuple[list[torch.Tensor], int, int]:
        received = group.all_to_all([part(group.rank, target) for target in range(3)],
                                    [(source, group.rank + 1) for source in range(3)])()
        return received, group.collectives, group.sent

    for rank, (received, collectives, sent) in enumerate(everywhere(3, work)):
        assert all(torch.equal(got, part(source, rank)) for source, got in enumerate(received))
        assert collectives == 1
        assert sent == sum(part(rank, target).nbytes for target in range(3) if target != rank)


def test_torch_keeps_no_record_of_what_is_exchanged() -> None:
    """Threads that use two groups break its table of them, and the process ends."""
    def work(group: Group) -> Any:
        group.gather(torch.zeros(1), 0, [1, 1])
        return json.loads(torch._C._distributed_c10d._dump_fr_trace_json())

    assert all("entries" not in kept for kept in everywhere(2, work))


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="elsewhere one address is the loopback's")
def test_ranks_on_two_machines_listen_on_their_own_addresses(monkeypatch: pytest.MonkeyPatch) -> None:
    """Not on what a machine's name stands for, nor on all addresses."""
    monkeypatch.delenv("NCCL_SOCKET_IFNAME", raising=False)
    address = f"127.0.0.2:{open_port('127.0.0.2')}"
    listening: list[set[str]] = []
    met = threading.Barrier(2)

    def rank(number: int) -> list[int]:
        group = Group(number, 2, address, timeout=20, interface=f"127.0.0.{number + 2}")
        if met.wait(20) == 0:
            listening.append({found.laddr.ip for found in psutil.Process().net_connections("tcp")
                              if found.laddr.ip.startswith("127.0.0.") and found.laddr.ip != "127.0.0.1"})
        met.wait(20)
        gathered: list[int] = group.gather(torch.tensor([number]), 0, [1, 1]).tolist()
        group.close()
        return gathered

    with ThreadPoolExecutor(2) as pool:
        assert list(pool.map(rank, range(2))) == [[0, 1]] * 2
    assert listening == [{"127.0.0.2", "127.0.0.3"}]


def test_an_interface_by_its_address() -> None:
    """For NCCL, which knows names alone."""
    name = interface_of("127.0.0.1")
    assert "127.0.0.1" in [found.address for found in psutil.net_if_addrs()[name]]
    assert (interface_of("192.0.2.99"), interface_of("")) == ("", "")


def test_a_process_is_in_several_groups_one_after_the_other() -> None:
    """And torch's global group is still the user's to make."""
    for world in (2, 3, 1):
        results = everywhere(world, lambda group: group.gather(torch.tensor([group.rank]), 0, [1] * group.world).tolist())
        assert results == [list(range(world))] * world
    assert not torch.distributed.is_initialized()


def test_a_lost_peer_is_named_in_time() -> None:
    """The one that is left does not wait for ever, and its group is closed."""
    def work(group: Group) -> Any:
        if group.rank == 1:
            return None
        with pytest.raises(PeerLost, match=r"rank 0 of 2 lost another in exchange 1"):
            group.gather(torch.zeros(1), 0, [1, 1])
        with pytest.raises(PeerLost, match="closed this group"):
            group.gather(torch.zeros(1), 0, [1, 1])
        return time.monotonic()

    started = time.monotonic()

    assert everywhere(2, work)[0] - started < 20


def test_a_peer_that_does_not_answer_is_given_up() -> None:
    """After the timeout, though its connection is there."""
    address = f"127.0.0.1:{open_port()}"

    with ThreadPoolExecutor(2) as pool:
        one, other = pool.map(lambda rank: Group(rank, 2, address, timeout=1), range(2))
        started = time.monotonic()
        with pytest.raises(PeerLost):
            one.gather(torch.zeros(1), 0, [1, 1])
    assert 0.5 < time.monotonic() - started < 10
    other.close()


def test_a_rank_that_meets_nobody_says_so() -> None:
    """Rank 0 that never came, and rank 0 alone."""
    for rank in (0, 1):
        address = f"127.0.0.1:{open_port()}"
        with pytest.raises(PeerLost, match=f"rank {rank} of 2 did not meet all others at {address} in 0.5 s"):
            Group(rank, 2, address, timeout=0.5)


def test_a_port_that_is_taken_is_an_error() -> None:
    """Of the system's, with its own words."""
    with socket.create_server(("127.0.0.1", 0)) as taken, pytest.raises(OSError):
        Group(0, 1, f"127.0.0.1:{taken.getsockname()[1]}", timeout=1)


@pytest.mark.parametrize(("rank", "world", "address", "backend"), [
    (2, 2, "127.0.0.1:1", "auto"), (-1, 2, "127.0.0.1:1", "auto"), (0, 1, "127.0.0.1", "auto"), (0, 1, "host:port", "auto"),
    (0, 1, "127.0.0.1:1", "mpi"),
])
def test_what_makes_no_group_is_refused(rank: int, world: int, address: str, backend: str) -> None:
    with pytest.raises(ValueError, match="no group"):
        Group(rank, world, address, backend)


def test_nccl_without_cards_is_refused() -> None:
    """In words; "auto" goes by gloo there."""
    with pytest.raises(ValueError, match="NCCL needs a CUDA device of its own for every rank"):
        everywhere(1, lambda group: group, backend="nccl")
    assert everywhere(1, lambda group: group.backend) == ["gloo"]


def test_sizes_that_do_not_fit_are_refused() -> None:
    """Before anything is sent."""
    def work(group: Group) -> int:
        with pytest.raises(ValueError, match=r"rank 0 has \(2, 3\) to gather along 1 as \[2\]"):
            group.gather(torch.zeros(2, 3), 1, [2])
        with pytest.raises(ValueError, match="2 parts and 1 shapes for 1 ranks"):
            group.all_to_all([torch.zeros(1)] * 2, [(1,)])
        return group.collectives

    assert everywhere(1, work) == [0]
