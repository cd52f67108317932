"""Loads that are kept: switches between workflows, files that change under the cache, `POST /free`, memory that runs short."""
from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import COMFYUI
from e2e.conftest import Pair, check_loader_nodes, drop_from_page_cache, loads, started, status, troubles, wait_for
from support import workflows
from support.server import MB, Server

OTHER = workflows.text_to_latent("sd3", clip="clip_l_other", clip_type="sd3")


@pytest.mark.parametrize(("source", "twin"), [
    pytest.param("diffusion_models/middle_fp32.safetensors", None, id="safetensors"),
    pytest.param("diffusion_models/flux_mixed.gguf", "diffusion_models/flux_mixed_fp32.safetensors", id="GGUF"),
    pytest.param("checkpoints/sd3_fp32.safetensors", None, id="checkpoint")])
def test_switching_back_loads_and_reads_nothing(cpu_pair: Pair, own_model: Callable[[str, str], Path], source: str,
                                                twin: str | None) -> None:
    """A, B, A: the second A is made of what was kept, though somebody asked the kernel to drop its file."""
    def flow(file: Path, seed: int) -> workflows.Workflow:
        one = workflows.from_checkpoint if file.parent.name == "checkpoints" else workflows.text_to_latent
        return one(file.name, seed=seed)

    read, plugin = {}, cpu_pair.plugin
    for name, server, original in (("alone", cpu_pair.alone, twin or source), ("plugin", plugin, source)):
        file = own_model(f"switched_{name}", original)
        server.run(flow(file, 1))
        server.run(OTHER)
        since = len(server.events())
        if server is plugin:
            wait_for(lambda: any("r--s" in line for line in plugin.maps("switched_plugin")))
        drop_from_page_cache(file)
        before = server.storage_bytes()
        server.run(flow(file, 2))
        read[name] = (server.storage_bytes() - before) / file.stat().st_size

    checkpoint = "checkpoints" in source
    check_loader_nodes(plugin, *(("CheckpointLoaderSimple",) if checkpoint else ("UNETLoader", "CLIPLoader")))
    assert {kind for kind, _ in loads(plugin, since)} == {"cache.hit"}
    assert ("cache.hit", file.name) in loads(plugin, since)
    assert torch.equal(cpu_pair.alone.latents(), plugin.latents())
    assert read["alone"] > 0.5
    assert read["plugin"] < 0.01


def test_the_status_agrees_with_the_system(cpu_pair: Pair, own_model: Callable[[str, str], Path]) -> None:
    """Bytes in the page cache are those of the mapping that holds them, and no path is told."""
    server, file = cpu_pair.plugin, own_model("looked_at", "middle_fp32")
    server.run(workflows.text_to_latent(file.stem))
    wait_for(lambda: any("r--s" in line for line in server.maps("looked_at")))
    wait_for(lambda: entry(server, "looked_at")["bytes"]["page_cache"] == file.stat().st_size)

    found = entry(server, "looked_at")
    guarded = shared_bytes(server, "looked_at")
    assert found["bytes"]["page_cache"] == pytest.approx(guarded, rel=0.05)
    assert found["bytes"]["anonymous"] < 1 * MB
    assert (found["in_use"], found["kind"]) == (True, "diffusion model")
    assert str(file.parent) not in json.dumps(status(server))


def entry(server: Server, name: str) -> dict[str, Any]:
    found: dict[str, Any] = next(one for one in status(server)["entries"] if name in one["name"])
    return found


def shared_bytes(server: Server, name: str) -> int:
    """Resident bytes of the shared mappings of a file, as /proc tells."""
    total, counts = 0, False
    for line in Path(f"/proc/{server.process.pid}/smaps").read_text().splitlines():
        if "-" in line.split(" ")[0]:
            counts = name in line and "r--s" in line
        elif counts and line.startswith("Rss:"):
            total += int(line.split()[1]) * 1024
    return total


def test_twenty_switches_among_five_models_cost_no_more_ram(cpu_pair: Pair) -> None:
    """Safetensors, GGUF and a checkpoint: each is loaded once, and gives the latents of ComfyUI alone."""
    server = cpu_pair.plugin
    flows = [workflows.text_to_latent("flux_a_fp32", steps=1), workflows.text_to_latent("flux_b_fp32", steps=1),
             workflows.text_to_latent("sd3", clip_type="sd3", steps=1), workflows.from_checkpoint("sd3_fp32", steps=1),
             workflows.text_to_latent("flux_mixed.gguf", steps=1)]
    expected = []
    for flow in flows:
        cpu_pair.alone.run(flow if "flux_mixed.gguf" not in str(flow) else workflows.text_to_latent("flux_mixed_fp32", steps=1))
        expected.append(cpu_pair.alone.latents())
    private = []
    for _ in range(4):
        since = len(server.events())
        for flow, latents in zip(flows, expected, strict=True):
            server.run(flow)
            assert torch.equal(latents, server.latents())
        private.append(server.private_bytes())

    assert {kind for kind, _ in loads(server, since)} == {"cache.hit"}
    assert not torch.equal(expected[0], expected[1])
    assert private[-1] - private[0] < 20 * MB


def test_a_lora_chain_on_a_shared_model_gives_the_same_latents(cpu_pair: Pair) -> None:
    """The same file without a LoRA, with one, with one that hooks schedule, and without again."""
    without = cpu_pair.same(workflows.text_to_latent("flux_b_fp32", steps=1))
    patched = cpu_pair.same(workflows.text_to_latent("flux_b_fp32", steps=1, loras=(("flux_one", 1.0),)))
    cpu_pair.same(workflows.hooked_lora("flux_b_fp32", "flux_one"))
    cpu_pair.same(workflows.text_to_latent("sd3", clip_type="sd3", steps=1))

    assert torch.equal(without, cpu_pair.same(workflows.text_to_latent("flux_b_fp32", steps=1)))
    assert not torch.equal(without, patched)


@pytest.mark.parametrize("way", ["replaced", "overwritten"])
def test_a_file_that_changes_while_it_is_kept_is_loaded_anew(cpu_pair: Pair, own_model: Callable[[str, str], Path],
                                                             models: Path, way: str) -> None:
    """Never a stale weight: other bytes under the name are another model. Models of other files stay."""
    server, file = cpu_pair.plugin, own_model(f"changing_{way}", "flux_a_fp32")
    flow = workflows.text_to_latent(file.stem)
    server.run(flow)
    first = server.latents()
    server.run(OTHER)
    since = len(server.events())
    other = models / "diffusion_models" / "flux_b_fp32.safetensors"
    if way == "replaced":
        shutil.copyfile(other, file.with_suffix(".new"))
        os.replace(file.with_suffix(".new"), file)
    else:
        shutil.copyfile(other, file)
    server.run(flow)
    changed = server.latents()
    cpu_pair.alone.run(workflows.text_to_latent("flux_b_fp32"))

    assert torch.equal(changed, cpu_pair.alone.latents())
    assert not torch.equal(changed, first)
    server.run(OTHER)
    assert [(event["model"], event["reason"]) for event in server.events()[since:] if event["event"] == "cache.evicted"] == [
        (file.name, "its file was changed or is gone")]
    assert [name for kind, name in loads(server, since) if kind == "cache.miss"] == [file.name]


def test_two_names_of_one_file_are_one_entry(cpu_pair: Pair, own_model: Callable[[str, str], Path]) -> None:
    """A link beside the file is a hit."""
    server, file = cpu_pair.plugin, own_model("named", "flux_a_fp32")
    link = file.with_name(f"{file.stem}_too.safetensors")
    link.symlink_to(file)
    try:
        server.run(workflows.text_to_latent(file.stem))
        since = len(server.events())
        server.run(workflows.text_to_latent(link.stem, seed=5))
    finally:
        link.unlink()

    assert ("cache.hit", file.name) in loads(server, since)


def test_a_file_that_is_cut_short_or_deleted_while_it_is_kept_costs_one_prompt(cpu_pair: Pair,
                                                                               own_model: Callable[[str, str], Path]) -> None:
    """ComfyUI names the file that it cannot read; the server lives, and the next workflow runs."""
    server, file = cpu_pair.plugin, own_model("cut", "flux_a_fp32")
    flow = workflows.text_to_latent(file.stem)
    server.run(flow)
    server.run(OTHER)
    os.truncate(file, 10_000)
    with pytest.raises(Exception, match=r"."):
        server.run(flow)
    server.run(OTHER)
    file.unlink()
    with pytest.raises(Exception, match="cut"):
        server.run(flow)
    server.run(OTHER)


def test_free_gives_back_what_comfyui_alone_would(models: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    """Private RAM ends where ComfyUI's own ends, no model file is mapped any more, and the next prompt works."""
    flow = workflows.text_to_latent("flux_a", steps=1)
    with started(models, tmp_path_factory, None) as pair:
        for server in (pair.alone, pair.plugin):
            server.run(flow)
            time.sleep(1)  # ComfyUI misses what comes just when it ended a prompt
            server.free()
        wait_for(lambda: bool(pair.plugin.events("memory.emptied")), 60)
        time.sleep(5)  # ComfyUI alone tells nobody when it is done
        assert pair.plugin.private_bytes() - pair.alone.private_bytes() < 20 * MB
        assert pair.plugin.maps(".safetensors") == []
        assert status(pair.plugin)["entries"] == []
        since = len(pair.plugin.events())
        pair.plugin.run(flow)
        assert {kind for kind, _ in loads(pair.plugin, since)} == {"cache.miss"}


@pytest.fixture
def cgroup() -> Iterator[Path]:
    """A real cgroup with 2 GB, where this process may make one (version 1's memory controller, or version 2)."""
    lines = [line.split(":", 2) for line in Path("/proc/self/cgroup").read_text().splitlines()]
    v1 = next((path for _, names, path in lines if "memory" in names.split(",")), None)
    root = Path("/sys/fs/cgroup/memory" if v1 is not None else "/sys/fs/cgroup") / (v1 or lines[-1][2]).lstrip("/")
    folder = root / f"residency-{os.getpid()}"
    limit = folder / ("memory.limit_in_bytes" if v1 is not None else "memory.max")
    try:
        folder.mkdir()
        limit.write_text(str(2048 * MB))
    except OSError as error:
        if folder.exists():
            folder.rmdir()
        pytest.skip(f"no cgroup can be made here: {error}")
    yield folder
    wait_for(lambda: (folder / "cgroup.procs").read_text() == "")
    folder.rmdir()


def charged(cgroup: Path) -> int:
    """Bytes that a cgroup holds, without what the kernel can take back."""
    usage = next(cgroup / name for name in ("memory.current", "memory.usage_in_bytes") if (cgroup / name).exists())
    stat = dict(line.split(" ", 1) for line in (cgroup / "memory.stat").read_text().splitlines())
    prefix = "total_" if "total_active_file" in stat else ""
    return int(usage.read_text()) - sum(int(stat[f"{prefix}{kind}_file"]) for kind in ("active", "inactive"))


def test_in_a_small_container_the_cache_shrinks_instead_of_dying(cgroup: Path, models: Path, tmp_path: Path) -> None:
    """Private copies of four models and another process that takes most of the container's memory."""
    settings = 'policies = ["preload_cache"]\n'
    with Server(COMFYUI, tmp_path, models, settings=settings) as server:
        (cgroup / "cgroup.procs").write_text(str(server.process.pid))
        for model, clip in (("middle_fp32", "clip_l_other"), ("flux_a", "clip_l")):
            server.run(workflows.text_to_latent(model, clip=clip))
        kept = len(status(server)["entries"])
        assert kept == 4
        taken = (2048 - 150) * MB - charged(cgroup)  # half of what is to be left alone
        greedy = subprocess.Popen([sys.executable, "-c", f"import sys; sys.stdin.readline(); x = b'1' * {taken}; "
                                   "print('full', flush=True); sys.stdin.readline()"],
                                  stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        assert greedy.stdin is not None and greedy.stdout is not None
        try:
            (cgroup / "cgroup.procs").write_text(str(greedy.pid))
            greedy.stdin.write("go\n")
            greedy.stdin.flush()
            assert greedy.stdout.readline() == "full\n"
            wait_for(lambda: len(status(server)["entries"]) < kept, 60)
            server.run(workflows.text_to_latent("flux_b", clip="clip_l"))
            assert status(server)["budget"]["total_bytes"] == 2048 * MB
        finally:
            greedy.stdin.close()
            greedy.wait(20)
        reasons = {event["reason"] for event in server.events("cache.evicted")}
        assert "memory pressure" in reasons
        assert troubles(server) == []
