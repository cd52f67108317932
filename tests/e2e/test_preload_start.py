"""Models that are loaded at the start: before the port opens, from lists and files, and for a memory snapshot."""
from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import torch
from conftest import COMFYUI
from e2e.conftest import Pair, check_loader_nodes, loads, status, troubles, wait_for
from support import workflows
from support.server import MB, NODE_CLOCK, Server

SETTINGS = """
[preload_cache]
when = "before"
learn = true
import = "preload_config.json"

[[preload_cache.diffusion_models]]
name = "flux_b_fp32.safetensors"
keep = true
cache_key = "main model"

[[preload_cache.diffusion_models]]
name = "flux_c_fp32.safetensors"
"""
# The community's format, as ComfyUI-ModelMemorySnapshot documents it.
CONFIG = {"version": "1.0", "models": {
    "text_encoders": [{"clip_names": ["clip_l.safetensors"], "type": "stable_diffusion", "device": "default", "enabled": True,
                       "cache_key": "", "description": ""}],
    "vaes": [{"vae_name": "taesd.safetensors", "cache_key": "small vae", "enabled": True, "description": ""}],
    "checkpoints": [{"name": "sd3.safetensors", "enabled": False}]},
    "settings": {"auto_gpu_load": True, "verbose": True}}


def test_the_first_prompt_finds_everything_loaded(cpu_pair: Pair, models: Path, tmp_path: Path) -> None:
    """Lists and the community's file: the first loader nodes load nothing, the latents are ComfyUI's, and what cannot be loaded
    is one line with the nearest name. What was used is learned."""
    flow = workflows.text_to_latent("flux_b_fp32", vae="taesd")
    folder = tmp_path / "user" / "residency"
    folder.mkdir(parents=True)
    (folder / "preload_config.json").write_text(json.dumps(CONFIG))
    with Server(COMFYUI, tmp_path, models, settings=SETTINGS, packs=[NODE_CLOCK]) as server:
        (ready,) = server.events("cache.ready")  # the port opens only then
        assert (ready["models"], ready["skipped"]) == (3, 1)
        assert [event["reason"] for event in server.events("cache.skipped")] == [
            "there is no 'flux_c_fp32.safetensors' among the diffusion models; the nearest are flux_b_fp32.safetensors, "
            "flux_a_fp32.safetensors, flux_mixed_fp32.safetensors"]
        (imported,) = server.events("cache.imported")
        assert imported["wishes"] == ["clip_l.safetensors", "small vae"]
        assert {entry["name"] for entry in status(server)["entries"]} == {"main model", "clip_l.safetensors", "small vae"}

        since = len(server.events())
        server.run(flow)
        cpu_pair.alone.run(flow)

        names = "clip_l.safetensors", "main model", "small vae"
        assert sorted(loads(server, since)) == [("cache.hit", name) for name in names]
        check_loader_nodes(server, "UNETLoader", "CLIPLoader", "VAELoader")
        for prefix in ("out", "out_vae"):
            assert torch.equal(server.latents(prefix), cpu_pair.alone.latents(prefix))
        learned = json.loads((folder / "learned.json").read_text())
        assert {item["recipe"]["names"][0] for item in learned} == {
            "flux_b_fp32.safetensors", "clip_l.safetensors", "taesd.safetensors"}
        assert troubles(server) == []


def regions(server: Server) -> Iterator[tuple[int, int, bool]]:
    """(start, end, whether all of its pages that are in RAM are Anonymous) of each region that can be read, by smaps. The code
    of libraries, which is gigabytes, holds no weights."""
    bounds, fields = "", {}
    for line in [*Path(f"/proc/{server.process.pid}/smaps").read_text().splitlines(), "0-0 ---- the end"]:
        name, *rest = line.split()
        if name.endswith(":"):
            fields[name] = rest[0]
            continue
        if bounds and fields["Rss:"] != "0":
            start, end = (int(bound, 16) for bound in bounds.split("-"))
            yield start, end, fields["Anonymous:"] == fields["Rss:"]
        bounds, fields = name if rest[0].startswith("r") and ".so" not in line else "", {}


def kinds_of_memory(server: Server, files: list[Path]) -> list[set[str]]:
    """For the three largest weights of each file, in which kinds of memory of the server a piece from their middle is found."""
    pieces = [piece for file in files for piece in pieces_of(file)]
    found: list[set[str]] = [set() for _ in pieces]
    with open(f"/proc/{server.process.pid}/mem", "rb", buffering=0) as memory:
        for start, end, anonymous in regions(server):
            for address in range(start, end, 64 * MB):
                try:
                    content = os.pread(memory.fileno(), min(end - address, 64 * MB + 64), address)
                except OSError:  # the kernel's own pages
                    continue
                for kinds, piece in zip(found, pieces, strict=True):
                    if piece in content:
                        kinds.add("anonymous" if anonymous else "file")
    return found


def pieces_of(file: Path) -> Iterator[bytes]:
    data = file.read_bytes()
    size = int.from_bytes(data[:8], "little")
    spans = [entry["data_offsets"] for name, entry in json.loads(data[8:8 + size]).items() if name != "__metadata__"]
    for start, end in sorted(spans, key=lambda span: span[0] - span[1])[:3]:
        middle = 8 + size + (start + end) // 2
        yield data[middle:middle + 64]


def test_after_a_snapshot_the_files_are_not_needed(cpu_pair: Pair, models: Path, tmp_path: Path) -> None:
    """They are moved away before the first prompt; each entry's weights are Anonymous, as much as the status says. Without a
    snapshot they are the file's mapping, and nowhere else, in a server of its own: others hold remains of what they ran."""
    own, size = tmp_path / "own_models", 0
    for name in ("diffusion_models/flux_b_fp32", "text_encoders/clip_l"):
        file = own / f"{name}.safetensors"
        file.parent.mkdir(parents=True)
        shutil.copyfile(models / f"{name}.safetensors", file)
        size += file.stat().st_size
    settings = """
[preload_cache]
when = "before"
snapshot = true
diffusion_models = [{name = "flux_b_fp32.safetensors"}]
text_encoders = [{names = ["clip_l.safetensors"]}]
"""
    flow = workflows.text_to_latent("flux_b_fp32")
    with Server(COMFYUI, tmp_path / "server", own, settings=settings) as server:
        assert server.events("snapshot.ready")[0]["devices"]["VAE"] == "cpu and cpu"
        shutil.move(own, tmp_path / "elsewhere")
        assert server.maps(".safetensors") == []
        told = status(server)["bytes"]
        files = sorted((tmp_path / "elsewhere").rglob("*.safetensors"))
        assert kinds_of_memory(server, files) == [{"anonymous"}] * 6

        server.run(flow)
        cpu_pair.alone.run(flow)
        with Server(COMFYUI, tmp_path / "mapped", models) as mapped:
            mapped.run(flow)
            assert kinds_of_memory(mapped, files) == [{"file"}] * 6

        assert torch.equal(server.latents(), cpu_pair.alone.latents())
        assert (told["page_cache"], told["anonymous"] > 0.95 * size) == (0, True)
        before = server.private_bytes()
        server.free()
        wait_for(lambda: bool(server.events("memory.emptied")), 60)
        wait_for(lambda: before - server.private_bytes() > 0.95 * told["anonymous"])
        assert before - server.private_bytes() < 1.05 * told["anonymous"] + 20 * MB
        assert troubles(server) == []


def test_auto_gpu_load_puts_every_kind_on_the_device(models: Path, simulated_npu: None, tmp_path: Path) -> None:
    """Before any prompt; `/free` takes them off again."""
    settings = """
[preload_cache]
when = "before"
auto_gpu_load = true
diffusion_models = [{name = "middle_a.safetensors"}]
text_encoders = [{names = ["clip_l.safetensors"]}]
vaes = [{name = "taesd.safetensors"}]
"""
    with Server(COMFYUI, tmp_path, models, settings=settings, device_mb=2200) as server:
        files = ("diffusion_models/middle_a", "text_encoders/clip_l", "vae/taesd")
        size = sum((models / f"{file}.safetensors").stat().st_size for file in files)
        assert server.device()["held"] > 0.95 * size
        assert status(server)["bytes"]["device"] > 0.95 * size
        server.free()
        wait_for(lambda: bool(server.events("memory.emptied")), 60)
        assert sum(event["bytes"] for event in server.events("model.released")) > 0.95 * size
        assert status(server)["entries"] == []
        assert troubles(server) == []


def test_a_server_that_is_stopped_while_it_preloads_ends(tmp_path: Path) -> None:
    """It does not wait for the model. A pipe in place of a file never ends."""
    own = tmp_path / "own_models"
    (own / "diffusion_models").mkdir(parents=True)
    os.mkfifo(own / "diffusion_models" / "endless.safetensors")
    settings = '[preload_cache]\nwhen = "after"\ndiffusion_models = [{name = "endless.safetensors"}]\n'
    with Server(COMFYUI, tmp_path / "server", own, settings=settings) as server:
        started = time.monotonic()
        while server.process.poll() is None and time.monotonic() - started < 10:
            server.process.send_signal(signal.SIGINT)  # as one does: a first one, in the middle of a start, may get lost
            with suppress(subprocess.TimeoutExpired):
                server.process.wait(3)

    assert time.monotonic() - started < 10
