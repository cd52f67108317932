"""What a worker sees of devices, how much memory Ray may take, and whose Ray it is."""
from __future__ import annotations

import os
from types import SimpleNamespace
from typing import Any

import pytest
import torch

pytest.importorskip("ray")

from residency.policies.ray_shard import cluster
from residency.policies.ray_shard.actor import Actor
from residency.policies.ray_shard.settings import Settings

MB, GB = 2**20, 2**30


class TestDevices:
    @pytest.mark.parametrize(("visible", "device", "seen"), [
        (None, "cuda:0", "0"), (None, "cuda:3", "3"), (None, "cuda", "0"), ("", "cuda:1", "1"),
        ("2,3", "cuda:0", "2"), ("2,3", "cuda:1", "3"), ("2, 3", "cuda:1", "3"), ("2,3", "cuda", "2"),
        ("GPU-8a1c,MIG-77f0", "cuda:1", "MIG-77f0"),
    ])
    def test_one_of_cudas(self, monkeypatch: pytest.MonkeyPatch, visible: str | None, device: str, seen: str) -> None:
        """The host counts those that it was given itself; the worker's is the first of its own."""
        monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
        if visible is not None:
            monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
        assert cluster.environment(device) == ({"RESIDENCY_DISABLE": "1", "CUDA_VISIBLE_DEVICES": seen}, "cuda:0")

    def test_names_of_amds_say_nothing_to_nvidia(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Whatever they are set to, and left at."""
        monkeypatch.setattr(torch.version, "hip", None)
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,5")
        monkeypatch.setenv("HIP_VISIBLE_DEVICES", "2,3")
        monkeypatch.setenv("ROCR_VISIBLE_DEVICES", "1")
        assert cluster.environment("cuda:1") == ({"RESIDENCY_DISABLE": "1", "CUDA_VISIBLE_DEVICES": "5"}, "cuda:0")

    @pytest.mark.parametrize(("visible", "device", "seen"), [
        ({}, "cuda:2", "2"), ({"CUDA": "2,3"}, "cuda:1", "3"), ({"HIP": "2,3"}, "cuda:1", "3"),
        ({"HIP": "2, 3", "CUDA": "0,1"}, "cuda:1", "3"), ({"HIP": "", "CUDA": "4,5"}, "cuda:1", "5"),
        ({"HIP": "", "CUDA": ""}, "cuda", "0"), ({"HIP": "GPU-8a1c,GPU-77f0"}, "cuda:1", "GPU-77f0"),
        ({"HIP": "1,0,2,3"}, "cuda:0", "1"),  # as with ComfyUI's --default-device 1
        ({"ROCR": "6,7"}, "cuda:1", "1"), ({"ROCR": "5,6,7", "HIP": "0,2"}, "cuda:1", "2"),
        ({"ROCR": "GPU-8a1c,GPU-77f0", "CUDA": "1,0"}, "cuda:0", "1"),
    ])
    def test_one_of_amds(self, monkeypatch: pytest.MonkeyPatch, visible: dict[str, str], device: str, seen: str) -> None:
        """HIP's own name outranks CUDA's, so both say the same in a worker. ROCr hides more below them, there as here."""
        monkeypatch.setattr(torch.version, "hip", "6.4")
        for name in ("CUDA", "HIP", "ROCR"):
            monkeypatch.delenv(f"{name}_VISIBLE_DEVICES", raising=False)
        for name, value in visible.items():
            monkeypatch.setenv(f"{name}_VISIBLE_DEVICES", value)
        assert cluster.environment(device) == ({
            "RESIDENCY_DISABLE": "1", "HIP_VISIBLE_DEVICES": seen, "CUDA_VISIBLE_DEVICES": seen,
            "ROCR_VISIBLE_DEVICES": visible.get("ROCR")}, "cuda:0")

    @pytest.mark.parametrize("name", ["HIP_VISIBLE_DEVICES", "CUDA_VISIBLE_DEVICES"])
    def test_a_device_of_amds_that_is_not_there(self, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
        """No other one is taken for it."""
        monkeypatch.setattr(torch.version, "hip", "6.4")
        monkeypatch.delenv("HIP_VISIBLE_DEVICES", raising=False)
        monkeypatch.setenv(name, "0,1")
        with pytest.raises(IndexError):
            cluster.environment("cuda:2")

    def test_a_worker_takes_over_what_is_not_set_too(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """A cluster of the user's may have been started with other devices hidden."""
        monkeypatch.setenv("ROCR_VISIBLE_DEVICES", "3")
        monkeypatch.setenv("HIP_VISIBLE_DEVICES", "0")
        Actor({"ROCR_VISIBLE_DEVICES": None, "HIP_VISIBLE_DEVICES": "1", "RESIDENCY_NEW": None})
        assert "ROCR_VISIBLE_DEVICES" not in os.environ
        assert os.environ["HIP_VISIBLE_DEVICES"] == "1"
    def test_another_hosts_environment_counts_there(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Not the one here."""
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "2,3")
        for around, seen in (({}, "1"), ({"CUDA_VISIBLE_DEVICES": "5,7"}, "7")):
            assert cluster.environment("cuda:1", around)[0]["CUDA_VISIBLE_DEVICES"] == seen

    @pytest.mark.parametrize("device", ["cpu", "npu:1", "xpu:0"])
    def test_another_kind_keeps_its_name(self, device: str) -> None:
        """The worker chooses it among all."""
        assert cluster.environment(device) == ({"RESIDENCY_DISABLE": "1"}, device)

    def test_a_device_that_is_not_there(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """No other one is taken for it."""
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1")
        with pytest.raises(IndexError):
            cluster.environment("cuda:2")


class TestStore:
    @pytest.mark.parametrize(("available", "shared", "expected"), [
        (64 * GB, 64 * GB, 32 * GB), (4 * GB, 32 * GB, 2 * GB), (64 * GB, 100 * MB, 90 * MB), (64 * GB, 64 * MB, 80 * MB),
        (100 * MB, GB, 80 * MB),
    ])
    def test_as_much_as_is_there(self, monkeypatch: pytest.MonkeyPatch, available: int, shared: int, expected: int) -> None:
        """At most half of the memory, or nine tenths of /dev/shm; Ray takes nothing below 80 MB."""
        monkeypatch.setattr(cluster.psutil, "virtual_memory", lambda: SimpleNamespace(available=available))
        monkeypatch.setattr(cluster.os.path, "isdir", lambda path: True)
        monkeypatch.setattr(cluster.shutil, "disk_usage", lambda path: SimpleNamespace(free=shared))
        assert cluster._store() == expected

    def test_without_shared_memory_in_files(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """As on Windows."""
        monkeypatch.setattr(cluster.psutil, "virtual_memory", lambda: SimpleNamespace(available=64 * GB))
        monkeypatch.setattr(cluster.os.path, "isdir", lambda path: False)
        assert cluster._store() == 32 * GB

    def test_the_folders_path_leaves_room_for_sockets(self) -> None:
        """Ray appends a session and a name, some 80 characters."""
        assert len(cluster._folder()) < 27 or os.name == "nt"


class FakeRay:
    def __init__(self, running: bool = False) -> None:
        self.running, self.options = running, dict[str, Any]()
        self.shutdowns = 0

    def is_initialized(self) -> bool:
        return self.running

    def init(self, **options: Any) -> None:
        self.options, self.running = options, True

    def shutdown(self) -> None:
        self.running, self.shutdowns = False, self.shutdowns + 1


def node(name: str, address: str, host: str, alive: bool = True) -> dict[str, Any]:
    return {"NodeID": name, "NodeManagerAddress": address, "NodeManagerHostname": host, "NodeName": address, "Alive": alive}


class TestHosts:
    @pytest.fixture(autouse=True)
    def asked(self, monkeypatch: pytest.MonkeyPatch) -> list[int]:
        """How often the cluster was asked for its hosts: this one, two others of one name, and one that is gone."""
        asked: list[int] = []

        def nodes() -> list[dict[str, Any]]:
            asked.append(1)
            return [node("a", "10.0.0.1", "desk"), node("b", "10.0.0.2", "box"), node("c", "10.0.0.3", "twin"),
                    node("d", "10.0.0.4", "twin"), node("e", "10.0.0.5", "gone", alive=False)]

        here = SimpleNamespace(get_node_id=lambda: "a")
        monkeypatch.setattr(cluster, "ray", SimpleNamespace(nodes=nodes, get_runtime_context=lambda: here))
        return asked

    def test_by_address_and_by_name(self) -> None:
        """This machine has no name of its own, and may be called by one."""
        assert cluster.nodes(["", "10.0.0.2", "box", "10.0.0.4", "desk"]) == {
            "": "a", "10.0.0.2": "b", "box": "b", "10.0.0.4": "d", "desk": "a"}
        assert cluster.others(["", "box", "desk"]) == {"": "", "box": "10.0.0.2", "desk": ""}

    def test_without_other_hosts_nobody_is_asked(self, asked: list[int]) -> None:
        """It costs nothing."""
        assert (cluster.nodes(["", ""]), cluster.others(["", ""])) == ({"": "a"}, {"": ""})
        assert asked == []

    @pytest.mark.parametrize(("host", "words"), [("10.0.0.9", "no host is called '10.0.0.9'"), ("10.0.0.5", "no host is"),
                                                 ("gone", "no host is"), ("twin", "several hosts are called 'twin'")])
    def test_a_host_that_is_not_there(self, host: str, words: str) -> None:
        """The user reads which there are."""
        for ask in (cluster.nodes, cluster.others):
            with pytest.raises(LookupError, match=words) as caught:
                ask([host])
            assert all(there in str(caught.value) for there in ("10.0.0.1 (desk)", "10.0.0.2 (box)", "10.0.0.4 (twin)"))
            assert "10.0.0.5 (" not in str(caught.value)


class TestConnecting:
    @pytest.fixture(autouse=True)
    def outlived(self, monkeypatch: pytest.MonkeyPatch) -> list[str]:
        """Whether somebody looks after Ray's processes."""
        for name in cluster._QUIET:
            monkeypatch.setenv(name, "0")
        looked: list[str] = []
        monkeypatch.setattr(cluster, "_outlive", lambda: looked.append("ours"))
        return looked

    def test_ours_is_local_and_quiet(self, monkeypatch: pytest.MonkeyPatch, outlived: list[str]) -> None:
        """It has no dashboard, leaves the host's logging as it is, and ends with the host."""
        fake = FakeRay()
        monkeypatch.setattr(cluster, "ray", fake)
        assert cluster.connect(Settings(), "residency-1")
        assert outlived == ["ours"]
        assert fake.options["address"] == "local"
        assert fake.options["namespace"] == "residency-1"
        assert not any(fake.options[name] for name in ("include_dashboard", "log_to_driver", "configure_logging", "num_gpus"))

    def test_the_users_is_joined(self, monkeypatch: pytest.MonkeyPatch, outlived: list[str]) -> None:
        """Its sizes are the user's."""
        fake = FakeRay()
        monkeypatch.setattr(cluster, "ray", fake)
        assert cluster.connect(Settings(address="auto"), "residency")
        assert (fake.options["address"], outlived) == ("auto", [])
        assert "object_store_memory" not in fake.options

    def test_one_that_runs_in_this_process_is_left_as_it_is(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Another pack's; it is not ours to leave."""
        fake = FakeRay(running=True)
        monkeypatch.setattr(cluster, "ray", fake)
        assert not cluster.connect(Settings(), "residency-1")
        assert fake.options == {}

    def test_leaving_twice(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Once is enough."""
        fake = FakeRay(running=True)
        monkeypatch.setattr(cluster, "ray", fake)
        cluster.disconnect()
        cluster.disconnect()
        assert fake.shutdowns == 1
