"""Workers that die, hang, or are left behind; files that change; servers beside each other. Each prompt ends as it should."""
from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from conftest import COMFYUI
from e2e.conftest import wait_for
from e2e.test_ray import FLUX, SD3, TOLERANCE, patched, sampled, settings
from support import workflows
from support.server import PATCHING_NODES, Server
from support.workflows import Workflow

pytestmark = pytest.mark.ray

STEPS = 30
TIMEOUT = 60  # seconds; a worker that takes another's place is ready in a fifth of it


@pytest.fixture
def start(models: Path, tmp_path: Path) -> Iterator[Callable[..., Server]]:
    """Starts servers with workers, and ends them."""
    servers: list[Server] = []

    def make(text: str = settings(2, verify="off"), plugin: bool = True) -> Server:
        folder = tmp_path / str(len(servers))
        servers.append(Server(COMFYUI, folder, models, settings=text, plugin=plugin, packs=[PATCHING_NODES]))
        return servers[-1]

    yield make
    for server in servers:
        server.stop()


def workers(server: Server) -> list[psutil.Process]:
    """The processes that run the workers' program."""
    return [process for process in relatives(server) if named(process) == "ray::Actor"]


def named(process: psutil.Process) -> str:
    try:
        return process.cmdline()[0].split(".")[0]
    except (psutil.Error, IndexError):
        return ""


def _listening(process: psutil.Process) -> list[Any]:
    try:
        return [found for found in process.net_connections() if found.status == psutil.CONN_LISTEN]
    except psutil.Error:
        return []


def relatives(server: Server) -> list[psutil.Process]:
    """Every process that the server started."""
    return psutil.Process(server.process.pid).children(recursive=True)


def all_gone(processes: Sequence[psutil.Process], seconds: float = 10) -> None:
    _, alive = psutil.wait_procs(processes, timeout=seconds)
    assert [process.cmdline()[:2] for process in alive if process.status() != psutil.STATUS_ZOMBIE] == []


def expected(start: Callable[..., Server], *flows: Workflow) -> list[torch.Tensor]:
    server = start(plugin=False)
    found = []
    for flow in flows:
        server.run(flow)
        found.append(server.latents())
    server.stop()
    return found


def error(server: Server, wanted: torch.Tensor) -> float:
    return float((server.latents() - wanted).abs().max() / wanted.abs().max())


# A flow, where the weights lie, and the way in which workers predict it.
WAYS = [
    pytest.param(FLUX, "auto", "rows", id="by rows"),
    pytest.param(sampled(SD3, cfg=1.0), "auto", "tokens", id="by tokens"),
    pytest.param(FLUX, "blocks", "rows, blocks", id="blocks"),
    pytest.param(FLUX, "pipeline", "pipeline", id="a pipeline"),
]


@pytest.mark.parametrize(("flow", "weights", "way"), WAYS)
def test_a_worker_that_dies_is_replaced_and_its_step_is_done_here(start: Callable[..., Server], flow: Workflow, weights: str,
                                                                  way: str) -> None:
    """Before a prompt, and in the middle of a step: the latents are the same, and the next prompt has two workers again."""
    first, second = flows = [sampled(flow, steps=STEPS, seed=seed) for seed in (41, 2)]
    wanted = expected(start, *flows)
    server = start(settings(2, verify="off", weights=weights, timeout_seconds=TIMEOUT))
    server.run(sampled(first, seed=1))
    workers(server)[1].kill()
    assert server.run(first) < TIMEOUT
    assert error(server, wanted[0]) <= TOLERANCE
    wait_for(lambda: len(server.events("worker.replaced")) == 1, 60)

    seen = server.log().count(f"/{STEPS} [")
    prompt = server.queue(second)
    wait_for(lambda: server.log().count(f"/{STEPS} [") > seen + 1)
    stopped = workers(server)[0]
    stopped.suspend()  # the other waits for it, and the host for both
    time.sleep(0.5)
    stopped.kill()
    assert server.finish(prompt) < TIMEOUT
    assert error(server, wanted[1]) <= TOLERANCE
    wait_for(lambda: len(server.events("worker.replaced")) == 2, 60)
    assert server.events("shard.finished")[-1]["calls"]["local"] == 1
    assert [len(server.events(name)) for name in ("worker.lost", "shard.demoted")] == [2, 2]  # each said once

    server.run(sampled(first, seed=3))
    server.run(first)
    assert set(server.events("shard.finished")[-1]["calls"]) == {way}
    assert error(server, wanted[0]) <= TOLERANCE
    assert "Traceback" not in server.log()


@pytest.mark.parametrize(("flow", "weights", "way"), WAYS)
def test_a_worker_that_dies_between_two_steps_costs_the_next_one(start: Callable[..., Server], flow: Workflow, weights: str,
                                                                 way: str) -> None:
    """Which is done here; of the steps after it the worker that took its place has its part again."""
    flow = sampled(flow, steps=5, seed=43)
    wanted, = expected(start, flow)
    server = start(settings(2, verify="off", weights=weights))
    server.run(sampled(flow, seed=1))
    seen = server.log().count(" 1/5 [")
    prompt = server.queue(patched(flow, "PauseAfterStep", 2.0))
    wait_for(lambda: server.log().count(" 1/5 [") > seen)
    time.sleep(1)  # the second step took a tenth of it
    assert server.events("worker.lost") == []
    workers(server)[0].kill()
    server.finish(prompt)
    assert error(server, wanted) <= TOLERANCE
    assert len(server.events("worker.lost")) == len(server.events("worker.replaced")) == 1
    calls = server.events("shard.finished")[-1]["calls"]
    assert calls == {"local": 1, way: 9 if way == "rows" else 4}
    assert "Traceback" not in server.log()


def test_a_worker_that_hangs_is_replaced(start: Callable[..., Server]) -> None:
    """After the time that the settings give it; the step is done here."""
    flow = sampled(FLUX, steps=4, seed=42)
    wanted, = expected(start, flow)
    server = start(settings(2, verify="off", timeout_seconds=5))
    server.run(sampled(flow, seed=1))
    stopped = workers(server)[0]
    stopped.suspend()
    began = time.monotonic()
    server.run(flow)
    assert error(server, wanted) <= TOLERANCE
    assert time.monotonic() - began < 90
    assert "no answer" in server.events("worker.lost")[0]["reason"]
    wait_for(lambda: len(server.events("worker.replaced")) >= 1, 60)
    wait_for(lambda: not stopped.is_running(), 20)  # Ray asks it to end, before it ends it


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGTERM], ids=lambda how: how.name)
def test_nothing_is_left_of_a_server_that_ends(start: Callable[..., Server], how: signal.Signals) -> None:
    """However it ends, in the middle of a step: no process that it started lives ten seconds later."""
    server = start()
    server.run(FLUX)
    server.queue(patched(sampled(FLUX, steps=50, seed=2), "PauseInModel", 1.0))
    time.sleep(1)
    family = relatives(server)
    assert len(family) > 3
    listening = {connection.laddr.ip.rpartition(":")[2] for process in family for connection in _listening(process)}
    assert listening == {"127.0.0.1"}  # nobody else's machine
    os.kill(server.process.pid, how)
    server.process.wait(30)
    all_gone(family)


def test_two_servers_do_not_meet(start: Callable[..., Server]) -> None:
    """Each has workers of its own, and the end of one does not touch the other."""
    wanted, = expected(start, FLUX)
    one, other = start(), start()
    for server in (one, other):
        server.run(FLUX)
        assert error(server, wanted) <= TOLERANCE
    mine = {process.pid for process in workers(one)}
    assert len(mine) == 2
    assert not mine & {process.pid for process in workers(other)}
    other.stop()
    one.run(sampled(FLUX, seed=2))
    assert {process.pid for process in workers(one)} == mine
    assert "local" not in one.events("shard.finished")[-1]["calls"]


def test_a_file_that_was_replaced_is_not_mapped_by_a_worker(start: Callable[..., Server],
                                                           own_model: Callable[[str, str], Path]) -> None:
    """A worker that is started anew finds another file under the name: the host has the old one still, and computes."""
    file = own_model("ray_replaced", "flux_a_fp32")
    flow = workflows.text_to_latent(file.stem)
    wanted, = expected(start, sampled(FLUX, seed=1))
    server = start()
    server.run(sampled(flow, seed=5))
    other = file.with_suffix(".new")
    other.write_bytes((file.parent / "flux_b_fp32.safetensors").read_bytes())
    os.replace(other, file)
    for worker in workers(server):
        worker.kill()
    server.run(sampled(flow, seed=1))
    assert error(server, wanted) <= TOLERANCE
    wait_for(lambda: len(server.events("worker.replaced")) >= 2, 60)
    server.run(sampled(flow, seed=2))
    server.run(sampled(flow, seed=1))
    assert error(server, wanted) <= TOLERANCE
    assert set(server.events("shard.finished")[-1]["calls"]) == {"local"}
    assert any(file.name in event["reason"] for event in server.events("shard.demoted"))


@pytest.fixture
def cluster(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[str]:
    """A Ray of the user's, and its address."""
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    monkeypatch.setenv("RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER", "0")  # on this machine alone
    port = free_port()
    options = ["--block", "--include-dashboard=false", "--num-cpus=2", "--node-ip-address=127.0.0.1", "--disable-usage-stats"]
    head = subprocess.Popen([sys.executable, "-m", "ray.scripts.scripts", "start", "--head", f"--port={port}", *options])
    wait_for(lambda: _answers(port), 60)
    time.sleep(5)  # it listens before it is ready
    yield f"127.0.0.1:{port}"
    family = psutil.Process(head.pid).children(recursive=True)
    for process in (psutil.Process(head.pid), *family):
        process.kill()
    head.wait()


def _answers(port: int) -> bool:
    with socket.socket() as client:
        return client.connect_ex(("127.0.0.1", port)) == 0


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        return int(server.getsockname()[1])


@pytest.mark.parametrize("detached", [False, True])
def test_a_cluster_of_the_users_is_left(start: Callable[..., Server], cluster: str, detached: bool) -> None:
    """Its workers end with the server, unless they are to outlive it: then the next server finds them."""
    wanted, = expected(start, FLUX)
    text = settings(2, verify="off", address=cluster, detached=detached)
    server = start(text)
    server.run(FLUX)
    assert error(server, wanted) <= TOLERANCE
    assert "local" not in server.events("shard.finished")[-1]["calls"]
    mine = actors()
    assert len(mine) == 2
    server.stop()
    if not detached:
        return all_gone(mine)
    time.sleep(12)
    assert all(process.is_running() for process in mine)
    again = start(text)
    again.run(FLUX)
    assert error(again, wanted) <= TOLERANCE
    assert {process.pid for process in actors()} == {process.pid for process in mine}


def actors() -> list[psutil.Process]:
    """Workers of all clusters on this machine."""
    return [process for process in psutil.process_iter() if named(process) == "ray::Actor"]


def test_free_takes_the_workers_memory_too(start: Callable[..., Server]) -> None:
    """And the next prompt has its model again."""
    server = start()
    server.run(FLUX)
    server.free()
    time.sleep(2)
    server.run(sampled(FLUX, seed=2))
    assert "local" not in server.events("shard.finished")[-1]["calls"]
