"""Workers become processes, on this machine or on other hosts of a cluster, and meet."""
from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import ray

from . import actor, cluster
from .settings import Settings
from .workers import Worker, answer_of

_START = 240.0  # seconds
_ANSWER = 10.0  # seconds


def launch(settings: Settings, twin: dict[str, Any], crew: Sequence[Worker], new: Sequence[Worker]) -> None:
    """Starts some workers of a crew, all at the same time.

    Args:
        twin: `policies.host.Process.twin`.

    Raises:
        Lost, Failed: one could not start.
        LookupError: there is no such host, or no such device.
    """
    ray.cloudpickle.register_pickle_by_value(actor)
    made = ray.remote(num_cpus=0, max_restarts=0, concurrency_groups={"beside": 2})(actor.Actor)
    nodes, starting = cluster.nodes(worker.host for worker in new), dict[Worker, Any]()
    for worker in new:
        node = nodes[worker.host]
        environment, device = _environment(worker, node)
        named = {"name": "-".join(filter(None, ["worker", str(worker.rank), worker.host])), "lifetime": "detached",
                 "get_if_exists": True}
        worker.handle = made.options(**(named if settings.detached else {}), scheduling_strategy=cluster.on(node)).remote(
            dict(environment))
        options = {"device": device, "orphan": settings.detached or bool(worker.host), "mates": _mates(worker, crew),
                   "ffn_chunks": settings.ffn_chunks}
        starting[worker] = worker.handle.start.remote(_twin_for(worker, twin), options)
    for worker, reference in starting.items():
        worker.about = answer_of(worker, reference, _START)


def meet(settings: Settings, workers: Sequence[Worker]) -> None:
    """Has the workers make a group: over an address of the machine that they are on, or of the network between the hosts.

    Raises:
        RayError, GetTimeoutError: one is dead, or they cannot reach each other.
    """
    ray.get([worker.tell("about") for worker in workers], timeout=_ANSWER)  # none is dead, and replaced later
    local = len({worker.host for worker in workers}) == 1
    address = ray.get(workers[0].tell("address", local), timeout=_ANSWER)
    shares = [worker.weight for worker in workers]
    joining = [worker.ask("join", rank, address, shares, settings.timeout_seconds, settings.self_test)
               for rank, worker in enumerate(workers)]
    ray.get(joining, timeout=settings.timeout_seconds)


def _environment(worker: Worker, node: str) -> tuple[Mapping[str, str | None], str]:
    """`cluster.environment`, by what another host's environment shows of its devices where the worker is on one."""
    if not worker.host or worker.device == "cpu":
        return cluster.environment(worker.device)
    asked = ray.remote(num_cpus=0)(actor.surroundings).options(scheduling_strategy=cluster.on(node)).remote()
    around = answer_of(worker, asked, _START)
    try:
        return cluster.environment(worker.device, around)
    except IndexError:
        hidden = ", ".join(f"{name} is {value!r}" for name, value in around.items() if name.endswith("_VISIBLE_DEVICES"))
        raise LookupError(f"{worker.place} cannot be had: {hidden} there") from None


def _mates(worker: Worker, crew: Sequence[Worker]) -> int:
    """Workers that share a host's cores; one on a device needs few."""
    mates = [one for one in crew if one.host == worker.host]
    return len(mates) if all(one.device == "cpu" for one in mates) else 1


def _twin_for(worker: Worker, twin: dict[str, Any]) -> dict[str, Any]:
    """On another host the worker takes as many threads as torch does there, and looks whether all is as it is here."""
    return twin if not worker.host else {**twin, "threads": 0, "sources": actor.sources(twin), "host": worker.host}
