"""Workers on two hosts of a cluster: two raylets on this machine, of which the second sees other files under the same paths."""
from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil
import pytest
from conftest import COMFYUI
from e2e.conftest import wait_for
from e2e.test_ray import FLUX, LORA, SD3, TOLERANCE, Pair, pair, sampled, settings
from e2e.test_ray_chaos import all_gone, free_port, named
from support import workflows
from support.server import MB, Server
from support.workflows import Workflow

linux = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="elsewhere one address is the loopback's")
pytestmark = [pytest.mark.ray, linux]

HERE, THERE = "127.0.0.2", "127.0.0.3"


def may_hide() -> bool:
    """Whether processes with mounts of their own may be started."""
    unshare = shutil.which("unshare")
    return unshare is not None and subprocess.run([unshare, "-m", "true"], capture_output=True).returncode == 0


hiding = pytest.mark.skipif(not may_hide(), reason="no mounts of one's own without root")


class Cluster:
    """Two hosts.

    Args:
        hidden: the second host has, under the first of each pair of paths, what is under the second.
    """

    def __init__(self, hidden: Mapping[Path, Path] | None = None) -> None:
        self._env = {**os.environ, "RAY_AUTH_MODE": "disabled", "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "1"}
        self.address = f"{HERE}:{free_port()}"
        ray = [sys.executable, "-m", "ray.scripts.scripts", "start", "--block", "--num-cpus=2", "--disable-usage-stats"]
        head = [*ray, "--head", f"--port={self.address.rpartition(':')[2]}", "--include-dashboard=false",
                f"--node-ip-address={HERE}"]
        other = [*ray, f"--address={self.address}", f"--node-ip-address={THERE}"]
        if hidden:
            mounts = " && ".join(f"mount --bind '{there}' '{here}'" for here, there in hidden.items())
            other = ["unshare", "-m", "sh", "-c", f'{mounts} && exec "$@"', "sh", *other]
        self._processes: list[subprocess.Popen[bytes]] = []
        for count, command in enumerate((head, other), 1):
            self._processes.append(subprocess.Popen(command, env=self._env))
            wait_for(lambda count=count: self._count() == count, 60)  # type: ignore[misc]

    def __enter__(self) -> Cluster:
        return self

    def __exit__(self, *_: object) -> None:
        for process in self._processes:
            for one in (*psutil.Process(process.pid).children(recursive=True), psutil.Process(process.pid)):
                with suppress(psutil.NoSuchProcess):
                    one.kill()
            process.wait()

    def _count(self) -> int:
        """Hosts that are there."""
        command = "import sys, ray; print(len(ray._raylet.GcsClient(address=sys.argv[1]).get_all_node_info()))"
        asked = subprocess.run([sys.executable, "-c", command, self.address], env=self._env, capture_output=True, text=True)
        return int(asked.stdout) if asked.returncode == 0 else 0

    def workers(self) -> list[list[psutil.Process]]:
        """Of each host."""
        return [[one for one in psutil.Process(process.pid).children(recursive=True) if named(one) == "ray::Actor"]
                for process in self._processes]


def on_both(cluster: Cluster, host: str = THERE, **more: Any) -> str:
    """Settings for a worker here, and one there."""
    workers = f'[{{ device = "cpu" }}, {{ device = "cpu", host = "{host}" }}]'
    text = settings(2, address=cluster.address, **{"verify": "off", **more})
    return text.replace("workers = 2", f"workers = {workers}")


def sent(server: Server) -> int:
    """Bytes of files that the other host was sent."""
    return sum(event.get("sent_bytes", {}).get(THERE, 0) for event in server.events("shard.loaded"))


@pytest.fixture(scope="module")
def same(models: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Cluster, Pair]]:
    """The other host has the same files."""
    with Cluster() as cluster, pair(models, tmp_path_factory, on_both(cluster)) as servers:
        yield cluster, Pair(*servers)


@pytest.fixture(scope="module")
def other(models: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pair]:
    """It lacks the checkpoints and the LoRA, has an empty GGUF file, and under the name of a model another one's weights."""
    empty = tmp_path_factory.mktemp("empty")
    (empty / "file").touch()
    files = (models / "diffusion_models").resolve()
    hidden = {(models / "checkpoints").resolve(): empty, (models / "loras").resolve(): empty,
              files / "flux_mixed.gguf": empty / "file",
              files / "flux_a_fp32.safetensors": files / "flux_b_fp32.safetensors"}
    with Cluster(hidden) as cluster, pair(models, tmp_path_factory, on_both(cluster)) as servers:
        yield Pair(*servers)


@pytest.mark.parametrize(("flow", "way"), [
    pytest.param(sampled(FLUX, seed=3), "rows", id="by rows"),
    pytest.param(sampled(SD3, cfg=1.0, seed=3), "tokens", id="by tokens"),
    pytest.param(workflows.text_to_latent("flux_a_fp32", loras=LORA, seed=3), "rows", id="LoRA"),
])
def test_the_other_host_maps_its_own_files(same: tuple[Cluster, Pair], flow: Workflow, way: str) -> None:
    """The latents are those of ComfyUI alone, and no file is sent."""
    cluster, both = same
    assert both.error(flow) <= TOLERANCE
    assert set(both.calls()) == {way}
    assert both.plugin.events("shard.started")[0]["workers"] == ["cpu", f"cpu of {THERE}"]
    assert [len(workers) for workers in cluster.workers()] == [1, 1]
    assert both.plugin.events("shard.loaded")[-1]["mapped_bytes"] > MB
    assert sent(both.plugin) == 0


def test_what_workers_hold_is_told_of_each(same: tuple[Cluster, Pair]) -> None:
    """The other host's too."""
    _, both = same
    seen = len(both.plugin.events("shard.workers"))
    both.plugin.run(sampled(FLUX, seed=8))
    wait_for(lambda: len(both.plugin.events("shard.workers")) > seen)
    told = both.plugin.events("shard.workers")[-1]
    assert all(told[name][f"worker {rank}"] > 0 for name in ("private_bytes", "shared_bytes", "free_bytes") for rank in (0, 1))


def test_a_worker_of_the_other_host_is_replaced_there(same: tuple[Cluster, Pair]) -> None:
    """Its step is done here."""
    cluster, both = same
    both.plugin.run(sampled(FLUX, seed=4))
    cluster.workers()[1][0].kill()
    assert both.error(sampled(FLUX, seed=5)) <= TOLERANCE
    wait_for(lambda: len(both.plugin.events("worker.replaced")) == 1, 60)
    assert both.plugin.events("worker.replaced")[0]["device"] == f"cpu of {THERE}"
    assert both.error(sampled(FLUX, seed=6)) <= TOLERANCE
    assert "local" not in both.calls()
    assert [len(workers) for workers in cluster.workers()] == [1, 1]


def test_no_worker_outlives_a_server_that_is_killed(same: tuple[Cluster, Pair]) -> None:
    """On either host, within ten seconds; nobody there can see ComfyUI's process, and Ray ends them."""
    cluster, both = same
    workers = [one for workers in cluster.workers() for one in workers]
    assert len(workers) == 2
    time.sleep(3)  # a worker that looked for ComfyUI's process would be gone
    assert all(one.is_running() for one in workers)
    both.plugin.process.kill()
    all_gone(workers)


def test_a_device_that_is_not_there(same: tuple[Cluster, Pair], models: Path, tmp_path: Path) -> None:
    """Only the worker can tell; it says so, and ComfyUI computes by itself."""
    cluster, _ = same
    text = on_both(cluster).replace(f'device = "cpu", host = "{THERE}"', f'device = "cuda:7", host = "{THERE}"')
    with Server(COMFYUI, tmp_path, models, settings=text) as server:
        server.run(FLUX)
        (broken,) = server.events("shard.broken")
        assert f"worker 1 on cuda:7 of {THERE}" in broken["reason"]
        assert server.latents().isfinite().all()


@hiding
@pytest.mark.parametrize(("flow", "way"), [
    pytest.param(sampled(FLUX, seed=3), "rows", id="another file under the name"),
    pytest.param(sampled(SD3, cfg=1.0, seed=3), "tokens", id="no such folder"),
    pytest.param(workflows.text_to_latent("flux_b_fp32", loras=LORA, seed=3), "rows", id="no LoRA"),
])
def test_what_the_other_host_lacks_is_sent(other: Pair, flow: Workflow, way: str) -> None:
    """Once, and no more than that; the latents are those of ComfyUI alone."""
    before = sent(other.plugin)
    assert other.error(flow) <= TOLERANCE
    assert set(other.calls()) == {way}
    model = other.plugin.events("shard.loaded")[-1]
    expected = 0 if "flux_b" in str(flow) else model["mapped_bytes"]
    assert sent(other.plugin) - before == expected
    assert other.error(sampled(flow, seed=4)) <= TOLERANCE
    assert sent(other.plugin) - before == expected
    assert "local" not in other.calls()


@hiding
def test_gguf_blocks_are_sent(other: Pair) -> None:
    """They stay what they are."""
    flow, twin = workflows.text_to_latent("flux_mixed.gguf"), workflows.text_to_latent("flux_mixed_fp32")
    before = sent(other.plugin)
    assert other.error(flow, like=twin) <= TOLERANCE
    assert "local" not in other.calls()
    assert sent(other.plugin) - before > MB


@hiding
def test_a_host_that_will_not_do(models: Path, tmp_path: Path) -> None:
    """ComfyUI is not there, or nobody knows the host: the line names the cure, and ComfyUI computes by itself."""
    (tmp_path / "empty").mkdir()
    with Cluster({COMFYUI.resolve(): tmp_path / "empty"}) as cluster:
        for host, words in ((THERE, [f"ComfyUI is not at {COMFYUI.resolve()}", f"on host {THERE}", "share the folder"]),
                            ("192.0.2.77", ["192.0.2.77", HERE, THERE])):
            with Server(COMFYUI, tmp_path / host, models, settings=on_both(cluster, host)) as server:
                server.run(FLUX)
                (broken,) = server.events("shard.broken")
                assert all(word in broken["reason"] for word in words)
                assert all(set(event["calls"]) == {"local"} for event in server.events("shard.finished"))
                assert server.latents().isfinite().all()
