"""The console's lines, the file's rotation and what happens when it cannot be written, and the ring."""
from __future__ import annotations

import json
import logging
import os
import threading
from pathlib import Path
from typing import Any

import pytest
from residency import telemetry
from residency.settings import Telemetry
from residency.telemetry import emit
from residency.telemetry.event import NAMES, Event
from residency.telemetry.sinks import Console, JsonLines, Ring, line, open_all

MB = 2**20
FULL = Path("/dev/full")  # a disk that is always full, where the system has one

LINES: list[tuple[str, dict[str, Any], str]] = [
    ("plugin.started", {"version": "0.1.0", "host": "0.30.0", "policies": ["zero_copy", "ray_shard"], "folder": "/u/r"},
     "plugin.started version: 0.1.0, host: 0.30.0, policies: zero_copy, ray_shard, folder: /u/r"),
    ("settings.changed", {"policies": []}, "settings.changed policies: none"),
    ("hook.installed", {"hook": "comfy.sd.VAE.__init__", "exercised": False},
     "hook.installed comfy.sd.VAE.__init__, exercised: no"),
    ("hook.declined", {"hook": "comfy.utils.load_torch_file", "reason": "the host has no parameter 'ckpt'"},
     "hook.declined comfy.utils.load_torch_file: the host has no parameter 'ckpt'"),
    ("hook.retired", {"hook": "comfy.utils.load_torch_file"}, "hook.retired comfy.utils.load_torch_file"),
    ("hook.shadowed", {"hook": "comfy.model_management.load_models_gpu", "by": "custom_nodes.multigpu"},
     "hook.shadowed comfy.model_management.load_models_gpu by custom_nodes.multigpu"),
    ("hook.failed", {"hook": "comfy.sd.VAE.__init__", "error": "KeyError: 'sd'"},
     "hook.failed comfy.sd.VAE.__init__: KeyError: 'sd'"),
    ("policy.declined", {"policy": "zero_copy", "reason": "ComfyUI was started with --disable-mmap"},
     "policy.declined zero_copy: ComfyUI was started with --disable-mmap"),
    ("policy.decided", {"policy": "zero_copy", "request": "ReadWeights", "reason": "/m/a.sft: the mapping is the copy"},
     "policy.decided zero_copy ReadWeights: /m/a.sft: the mapping is the copy"),
    ("policy.failed", {"policy": "zero_copy", "request": "FillModule", "error": "RuntimeError: Error(s):\n\tsize mismatch"},
     "policy.failed zero_copy FillModule: RuntimeError: Error(s): size mismatch"),
    ("policy.ineffective", {"policy": "zero_copy", "predicted_bytes": 800 * MB, "observed_bytes": 0, "reason": "Flux copies"},
     "policy.ineffective zero_copy, 800 MB predicted, 0 MB observed: Flux copies"),
    ("weights.read", {"file": "a.sft", "bytes": 807 * MB, "seconds": 0.02, "source": "bank"},
     "weights.read a.sft 807 MB from bank in 0.02 s"),
    ("weights.read_ahead", {"file": "a.sft", "bytes": 807 * MB, "seconds": 1.234},
     "weights.read_ahead a.sft 807 MB in 1.23 s"),
    ("gguf.read", {"file": "a.gguf", "architecture": "flux", "header_seconds": 0.04,
                   "types_bytes": {"Q4_K": 700 * MB, "float32": 2 * MB}},
     "gguf.read a.gguf, architecture: flux, 0.04 s header, 700 MB in Q4_K, 2 MB in float32"),
    ("gguf.dequantised", {"prompt": "1", "bytes": 900 * MB, "seconds": None}, "gguf.dequantised 1 900 MB in unknown"),
    ("gguf.kernel_chosen", {"type": "Q4_K", "dtype": "bfloat16", "device": "cuda:0", "torch_gb_s": 99.6, "fused_gb_s": 0.4,
                            "chosen": "torch"},
     "gguf.kernel_chosen Q4_K on cuda:0, dtype: bfloat16, 100 GB/s torch, 0 GB/s fused, chosen: torch"),
    ("weights.mapped", {"file": "big_flux.safetensors", "bytes": 807 * MB, "copied_bytes": 0, "seconds": 0.02},
     "weights.mapped big_flux.safetensors 807 MB in 0.02 s, 0 MB copied"),
    ("weights.restored", {"model": "Flux", "bytes": 807 * MB, "copied_bytes": 3 * MB, "seconds": 0.25},
     "weights.restored Flux 807 MB in 0.25 s, 3 MB copied"),
    ("weights.released", {"file": "a.sft", "bytes": 807 * MB, "unmapped": None},
     "weights.released a.sft 807 MB, unmapped: unknown"),
    ("file.changed", {"file": "a.sft", "reason": "/m/a.sft was overwritten; the models are loaded again"},
     "file.changed a.sft: /m/a.sft was overwritten; the models are loaded again"),
    ("file.unreadable", {"file": "/m/a.sft", "reason": "header too large. If it exists, it is damaged"},
     "file.unreadable /m/a.sft: header too large. If it exists, it is damaged"),
    ("cache.hit", {"model": "a.sft", "bytes": 807 * MB, "seconds": 0.003}, "cache.hit a.sft 807 MB in 0.00 s"),
    ("cache.miss", {"model": "a.sft", "reason": "not loaded before"}, "cache.miss a.sft: not loaded before"),
    ("cache.evicted", {"model": "a.sft", "bytes": 807 * MB, "private_bytes": 0, "reason": "over the budget"},
     "cache.evicted a.sft 807 MB, 0 MB private: over the budget"),
    ("cache.preloaded", {"model": "a.sft", "bytes": 807 * MB, "seconds": 1.5, "description": "main"},
     "cache.preloaded a.sft 807 MB in 1.50 s, description: main"),
    ("cache.skipped", {"model": "b.sft", "reason": "there is no 'b.sft'; the nearest are a.sft"},
     "cache.skipped b.sft: there is no 'b.sft'; the nearest are a.sft"),
    ("cache.ready", {"models": 2, "bytes": 807 * MB, "seconds": 2.0, "skipped": 1},
     "cache.ready 807 MB in 2.00 s, models: 2, skipped: 1"),
    ("cache.stopped", {"reason": "it was cancelled"}, "cache.stopped: it was cancelled"),
    ("cache.imported", {"file": "/u/preload_config.json", "wishes": ["a.sft"], "auto_gpu_load": False, "skipped": []},
     "cache.imported /u/preload_config.json, wishes: a.sft, auto gpu load: no, skipped: none"),
    ("snapshot.ready", {"devices": {"VAE": "cpu and cpu"}}, "snapshot.ready devices: VAE cpu and cpu"),
    ("snapshot.restored", {"devices": {"VAE": "cuda:0 and cpu"}}, "snapshot.restored devices: VAE cuda:0 and cpu"),
    ("split.planned", {"model": "Flux", "device": "cuda:0", "mode": "hybrid", "figure": "the rule's", "predicted_bytes": 6 * MB,
                       "streamed_bytes": 3 * MB, "rule": "wan*.gguf, > 8 GB", "budget_bytes": 7 * MB},
     "split.planned Flux on cuda:0, mode: hybrid, figure: the rule's, 6 MB predicted, 3 MB streamed, rule: wan*.gguf, > 8 GB, "
     "7 MB budget"),
    ("split.insufficient", {"model": "Flux", "device": "cuda:0", "shortfall_bytes": 3 * MB, "reason": "RAM is short"},
     "split.insufficient Flux on cuda:0, 3 MB shortfall: RAM is short"),
    ("split.capped", {"model": "Flux", "device": "cuda:0", "figure": "the rule's", "budget_bytes": 6 * MB},
     "split.capped Flux on cuda:0, figure: the rule's, 6 MB budget"),
    ("split.moved", {"model": "t5.safetensors", "device": "cpu"}, "split.moved t5.safetensors on cpu"),
    ("model.built", {"model": "diffusion model", "seconds": 0.5}, "model.built diffusion model in 0.50 s"),
    ("model.placed", {"model": "Flux", "device": "cuda:0", "seconds": 0.32, "device_bytes": 807 * MB, "mapped_bytes": 12 * MB,
                      "host_bytes": 0}, "model.placed Flux on cuda:0 in 0.32 s, 807 MB device, 12 MB mapped, 0 MB host"),
    ("model.released", {"model": "Flux", "device": "cuda:0", "bytes": 100 * MB, "seconds": 0.09, "partly": True},
     "model.released Flux 100 MB on cuda:0 in 0.09 s, partly: yes"),
    ("shard.started", {"workers": ["cuda:0", "cuda:1"], "grouped": True, "seconds": 9.0},
     "shard.started in 9.00 s, workers: cuda:0, cuda:1, grouped: yes"),
    ("shard.broken", {"reason": "no route"}, "shard.broken: no route"),
    ("shard.loaded", {"model": "Flux", "workers": 2, "mapped_bytes": 8 * MB, "copied_bytes": 0, "seconds": 0.2},
     "shard.loaded Flux in 0.20 s, workers: 2, 8 MB mapped, 0 MB copied"),
    ("shard.patched", {"model": "Flux", "workers": 2, "seconds": 0.02}, "shard.patched Flux in 0.02 s, workers: 2"),
    ("shard.weights", {"model": "Flux", "mode": "blocks", "weights_bytes": 8 * MB, "link_mb_per_second": 900,
                       "reason": "faster"},
     "shard.weights Flux, mode: blocks, 8 MB weights, link mb per second: 900: faster"),
    ("shard.demoted", {"model": "Flux", "way": "local", "reason": "a worker is dead"},
     "shard.demoted Flux, way: local: a worker is dead"),
    ("shard.finished", {"calls": {"rows": 4}, "dispatch_seconds": 0.1, "compute_seconds": 2.0, "transfer_seconds": 0.05,
                        "sent_bytes": MB, "received_bytes": 0, "speedup": 1.8, "why": {"heads": "nothing to share"}},
     "shard.finished calls: rows 4, 0.10 s dispatch, 2.00 s compute, 0.05 s transfer, 1 MB sent, 0 MB received, speedup: 1.8, "
     "why: heads nothing to share"),
    ("shard.workers", {"private_bytes": {"worker 0": MB}, "shared_bytes": {"worker 0": 2 * MB},
                       "free_bytes": {"worker 0": 3 * MB}},
     "shard.workers 1 MB on worker 0, 2 MB on worker 0, 3 MB on worker 0"),
    ("worker.lost", {"worker": 1, "device": "cuda:1", "reason": "it is dead"}, "worker.lost on cuda:1, worker: 1: it is dead"),
    ("worker.replaced", {"worker": 1, "device": "cuda:1", "seconds": 6.0}, "worker.replaced on cuda:1 in 6.00 s, worker: 1"),
    ("donors.placed", {"model": "Flux", "seconds": 0.8, "predicted_bytes": {"cuda:1": 3 * MB},
                       "observed_bytes": {"cuda:1": 3 * MB}},
     "donors.placed Flux in 0.80 s, 3 MB predicted on cuda:1, 3 MB observed on cuda:1"),
    ("donors.refused", {"model": "Flux", "device": "cuda:1", "bytes": 9 * MB, "reason": "3 MB are free there"},
     "donors.refused Flux 9 MB on cuda:1: 3 MB are free there"),
    ("donors.left", {"device": "cuda:1", "bytes": 9 * MB, "seconds": 0.1, "reason": "room is needed there"},
     "donors.left 9 MB on cuda:1 in 0.10 s: room is needed there"),
    ("pin.failed", {"model": "Flux", "bytes": 9 * MB, "reason": "it was refused"}, "pin.failed Flux 9 MB: it was refused"),
    ("rescue.repeated", {"what": "a sampling step", "model": "Flux", "attempt": 1, "freed_bytes": 450 * MB, "seconds": 0.4,
                         "error": "CUDA out of memory"},
     "rescue.repeated Flux in 0.40 s, what: a sampling step, attempt: 1, 450 MB freed: CUDA out of memory"),
    ("rescue.failed", {"what": "sampling", "model": "Flux", "attempts": 5, "freed_bytes": 450 * MB, "error": "out of memory"},
     "rescue.failed Flux, what: sampling, attempts: 5, 450 MB freed: out of memory"),
    ("memory.freed", {"device": "cuda:0", "wanted_bytes": 1e9, "models": 2, "seconds": 0.1},
     "memory.freed on cuda:0 in 0.10 s, 954 MB wanted, models: 2"),
    ("memory.emptied", {"seconds": 0.001}, "memory.emptied in 0.00 s"),
    ("prompt.finished", {"prompt": "1ec408c7-9f", "ok": True, "seconds": 4.21, "placing_seconds": 1.04, "read_bytes": 5 * MB,
                         "private_bytes": 1484 * MB, "file_bytes": 2195 * MB,
                         "device_bytes": {"cuda:0": 877 * MB, "cuda:1": 0},
                         "policies": {"zero_copy": {"predicted_bytes": 807 * MB, "observed_bytes": 800 * MB}}},
     "prompt.finished 1ec408c7-9f in 4.21 s, ok: yes, 1.04 s placing, 5 MB read, 1484 MB private, 2195 MB file, "
     "877 MB on cuda:0, 0 MB on cuda:1, policies: zero_copy (807 MB predicted, 800 MB observed)"),
]


def event(name: str, fields: dict[str, Any]) -> Event:
    return Event(name, fields)


@pytest.mark.parametrize(("name", "fields", "expected"), LINES, ids=[name for name, _, _ in LINES])
def test_line_reads_well(name: str, fields: dict[str, Any], expected: str) -> None:
    """Whom it is about, how much and how long, then the rest with its units, then why."""
    assert line(event(name, fields)) == expected


def test_every_event_has_a_line_above() -> None:
    """A new event is looked at as a user will see it."""
    assert {name for name, _, _ in LINES} == NAMES


def test_line_leaves_out_what_there_is_none_of() -> None:
    """On a CPU there are no devices, and without policies no effects."""
    fields = {"prompt": "1e", "ok": False, "seconds": 0.0, "device_bytes": {}, "policies": {}}
    assert line(event("prompt.finished", fields)) == "prompt.finished 1e in 0.00 s, ok: no, policies: none"


@pytest.mark.parametrize(("level", "expected"), [
    ("info", ["weights.mapped a.sft 1 MB", "policy.ineffective zero_copy"]),
    ("debug", ["weights.read a.sft 1 MB", "weights.mapped a.sft 1 MB", "policy.ineffective zero_copy"]),
])
def test_console_shows_what_the_level_asks_for(level: str, expected: list[str], caplog: pytest.LogCaptureFixture) -> None:
    """"info" has what a user acts on, "debug" everything; what went wrong is a warning in both."""
    console = Console(level)
    with caplog.at_level(logging.INFO, "residency"):
        console(event("weights.read", {"file": "a.sft", "bytes": MB}))
        console(event("weights.mapped", {"file": "a.sft", "bytes": MB}))
        console(event("policy.ineffective", {"policy": "zero_copy"}))
    assert [record.getMessage() for record in caplog.records] == [f"[residency] {text}" for text in expected]
    assert [record.levelname for record in caplog.records] == [*["INFO"] * (len(expected) - 1), "WARNING"]


def test_open_all_gives_what_the_settings_choose(tmp_path: Path) -> None:
    """Off is no sink, an empty file name is no file, and a full path replaces the folder."""
    other = tmp_path / "other" / "t.jsonl"
    chosen = {
        "nothing": open_all(Telemetry(console="off", file=""), tmp_path),
        "console": open_all(Telemetry(console="debug", file=""), tmp_path),
        "file": open_all(Telemetry(console="off"), tmp_path / "new"),
        "both": open_all(Telemetry(file=str(other)), tmp_path),
    }
    assert {name: [type(sink) for sink in sinks] for name, sinks in chosen.items()} == \
        {"nothing": [], "console": [Console], "file": [JsonLines], "both": [Console, JsonLines]}
    files = [sink for sinks in chosen.values() for sink in sinks if isinstance(sink, JsonLines)]
    assert [file.path for file in files] == [tmp_path / "new" / "telemetry.jsonl", other]
    for file in files:
        file.close()


@pytest.mark.parametrize("name", ["t.jsonl", "nul\0.jsonl"])
def test_open_all_says_that_the_file_cannot_be_written(name: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """The line names the file and the cure, and the console goes on."""
    folder = tmp_path / "residency"
    folder.write_text("a file where the folder should be")
    sinks = open_all(Telemetry(file=name), folder)
    assert [type(sink) for sink in sinks] == [Console]
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    message = caplog.records[0].getMessage()
    assert message.startswith(f"[residency] no telemetry file: {folder / name} cannot be written (")
    assert message.endswith('Set telemetry.file to another path, or to "" for none.')


def test_json_lines_writes_one_object_a_line(tmp_path: Path) -> None:
    """What JSON does not know is written as its text; no name breaks the line."""
    sink = JsonLines(tmp_path / "t.jsonl", 1, 1)
    sink(Event("model.placed", {"model": "Flux\n\udcff模", "device": Path("x")}, 1.0))
    sink(Event("memory.emptied", {"seconds": 0.5}, 2.0))
    sink.close()
    assert [json.loads(text) for text in (tmp_path / "t.jsonl").read_text(encoding="utf-8").splitlines()] == \
        [{"at": 1.0, "event": "model.placed", "model": "Flux\n\udcff模", "device": "x"},
         {"at": 2.0, "event": "memory.emptied", "seconds": 0.5}]


def test_json_lines_goes_on_in_a_file_that_is_there(tmp_path: Path) -> None:
    """A restart of ComfyUI does not cost the past."""
    for _ in range(2):
        sink = JsonLines(tmp_path / "t.jsonl", 1, 1)
        sink(event("memory.emptied", {}))
        sink.close()
    assert len((tmp_path / "t.jsonl").read_text().splitlines()) == 2


def test_json_lines_rotates_and_keeps_so_many(tmp_path: Path) -> None:
    """No file grows beyond its size, the oldest go, and the rest is without a gap."""
    sink = JsonLines(tmp_path / "t.jsonl", 1000 / MB, 2)
    for number in range(100):
        sink(event("memory.freed", {"models": number}))
    sink.close()
    names = ["t.jsonl.2", "t.jsonl.1", "t.jsonl"]
    assert sorted(names) == sorted(file.name for file in tmp_path.iterdir())
    assert all((tmp_path / name).stat().st_size <= 1000 for name in names)
    numbers = [json.loads(text)["models"] for name in names for text in (tmp_path / name).read_text().splitlines()]
    assert numbers == list(range(numbers[0], 100))
    assert len(numbers) > 20


def test_json_lines_is_whole_when_threads_write(tmp_path: Path) -> None:
    """Models are released in any thread; no line is lost or torn, not even while the file is rotated."""
    sink = JsonLines(tmp_path / "t.jsonl", 2000 / MB, 500)

    def write(thread: int) -> None:
        for number in range(200):
            sink(event("memory.freed", {"device": str(thread), "models": number}))

    threads = [threading.Thread(target=write, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    sink.close()
    written = [json.loads(text) for file in tmp_path.iterdir() for text in file.read_text().splitlines()]
    assert sorted((entry["device"], entry["models"]) for entry in written) == \
        [(str(thread), number) for thread in range(4) for number in range(200)]


@pytest.mark.skipif(not FULL.exists(), reason="this system has no /dev/full")
def test_full_disk_detaches_the_file_and_nothing_else(ring: Ring, caplog: pytest.LogCaptureFixture) -> None:
    """One warning that names the file; the image and the other sinks go on."""
    telemetry.attach(JsonLines(FULL, 1, 1))
    emit("memory.emptied", seconds=1.0)
    emit("memory.emptied", seconds=2.0)
    assert [record.getMessage() for record in caplog.records] == \
        ["[residency] telemetry sink /dev/full stopped: [Errno 28] No space left on device. The images are not affected."]
    assert [event.fields["seconds"] for event in ring.events] == [1.0, 2.0]


@pytest.mark.skipif(os.name == "nt", reason="a folder with an open file in it cannot be renamed there")
def test_file_that_cannot_be_rotated_is_detached(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Its folder went away: one warning, no exception."""
    folder = tmp_path / "residency"
    telemetry.attach(JsonLines(folder / "t.jsonl", 300 / MB, 1))
    emit("memory.freed", device="x" * 100)
    folder.rename(tmp_path / "elsewhere")
    folder.write_text("in the way")
    for _ in range(5):
        emit("memory.freed", device="x" * 100)
    assert [str(folder / "t.jsonl") in record.getMessage() for record in caplog.records] == [True]


def test_ring_keeps_the_last_events() -> None:
    """Memory stays bounded however long ComfyUI runs."""
    ring = Ring(size=2)
    for name in ("memory.emptied", "memory.freed", "memory.emptied", "model.built"):
        ring(event(name, {}))
    assert [event.name for event in ring.events] == ["memory.emptied", "model.built"]
    assert ring.named("memory.emptied") == [ring.events[0]]
