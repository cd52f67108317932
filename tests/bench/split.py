"""Seconds per step against the part of a model that is off its device: streamed from RAM, page-locked or not, or from a donor.

A step's cost is the difference between long and short prompts, so that what a prompt costs besides is left out. ComfyUI alone
has no budget that can be stated, so it gets a device (or `--reserve-vram`) that makes it choose the same.
"""
from __future__ import annotations

import statistics
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import safetensors
import torch
from support import workflows
from support.fixtures import make_models
from support.server import MB, Server
from table import show

OFFLOADED = (0, 25, 50, 75, 100)  # per cent of the weights
SHORT, LONG, TIMES = 1, 5, 2
KEPT_FREE = int(0.8 * 2**30) + 400 * MB  # what ComfyUI leaves beside a model's weights
HEAD = ("offloaded", "MB", "alone", "plugin", "ratio")


class Step(NamedTuple):
    """What one step costs; bytes are exact on the simulated device and 0 on a real one."""

    seconds: float
    from_ram: float
    within: float
    offloaded: float


def measure(server: Server, model: str, size: int) -> Step:
    """The medians over warm prompts."""
    found: dict[int, list[tuple[float, int, int]]] = {SHORT: [], LONG: []}
    server.run(workflows.text_to_latent(model, steps=1, size=size))
    for seed in range(TIMES):
        for steps in found:
            before = server.device() if server.simulated else {}
            took = server.run(workflows.text_to_latent(model, steps=steps, size=size, seed=2 + seed + steps))
            now = server.device() if server.simulated else {}
            found[steps].append((took, *(now.get(key, 0) - before.get(key, 0) for key in ("to_device", "within"))))
    short, long = ([statistics.median(column) for column in zip(*found[steps], strict=True)] for steps in (SHORT, LONG))
    seconds, from_ram, within = ((one - other) / (LONG - SHORT) for one, other in zip(long, short, strict=True))
    placed = [line for line in server.log().splitlines() if "MB offloaded" in line or "loaded completely" in line][-1]
    offloaded = float(placed.split(" MB offloaded")[0].split()[-1]) * MB if "MB offloaded" in placed else 0.0
    return Step(seconds, from_ram, within, offloaded)


class Bench:
    """One model on one kind of device."""

    def __init__(self, comfyui: Path, models: Path, gpu: bool) -> None:
        self.comfyui, self.models, self.gpu = comfyui, models, gpu
        self.model, self.size = ("big_a", 512) if gpu else ("middle_a", 64)
        self.kind = "cuda" if gpu else "npu"
        self.devices = torch.cuda.device_count() if gpu else 2
        make_models(comfyui, models, (f"diffusion_models/{self.model}", "text_encoders/clip_l"))
        with safetensors.safe_open(models / "diffusion_models" / f"{self.model}.safetensors", "pt") as file:
            self.bytes = sum(file.get_tensor(name).nbytes for name in file.keys())  # noqa: SIM118  no mapping
        self.free = torch.cuda.mem_get_info()[0] - MB * 512 if gpu else 0  # half a GB is the CUDA context

    @contextmanager
    def server(self, plugin: bool, budget: int | None = None) -> Iterator[Server]:
        """ComfyUI whose own estimate gives a model `budget` bytes, or all that there is."""
        env = {"OMP_NUM_THREADS": "2", "SIMNPU_DEVICES": str(self.devices)}
        if self.gpu:
            reserve = [] if budget is None else ["--reserve-vram", f"{(self.free - 0.8 * 2**30 - budget) / 2**30:.3f}"]
            options = {"device_args": ["--disable-dynamic-vram", *reserve]}
        else:
            options = {"device_mb": 1700 if budget is None else -(-(KEPT_FREE + budget) // MB), "env": env}
        with tempfile.TemporaryDirectory() as folder, Server(self.comfyui, Path(folder), self.models, plugin=plugin,
                                                             **options) as server:
            yield server

    def alone(self) -> list[Step]:
        steps = []
        for part in OFFLOADED:
            with self.server(False, None if part == 0 else self.bytes * (100 - part) // 100 + MB) as server:
                steps.append(measure(server, self.model, self.size))
        return steps

    def plugin(self) -> dict[str, list[Step]]:
        """The ways in which offloaded weights wait; the settings change between prompts of one server."""
        ways = {"plugin": ("", "cpu,*")}
        if self.gpu:
            ways["not page-locked"] = ("[memory]\npinned_gb = 0\n", "cpu,*")
        if self.devices > 1:
            ways["donor"] = ("", f"{self.kind}:1,*")
        found: dict[str, list[Step]] = {way: [] for way in ways}
        with self.server(True) as server:
            for way, (memory, rest) in ways.items():
                for part in OFFLOADED:
                    devices = f"{self.kind}:0,{100 - part}%;{rest}" if part else ""
                    server.settings(f'{memory}[hybrid_split]\ndevices = "{devices}"\n')
                    found[way].append(measure(server, self.model, self.size))
        return found


def run(comfyui: Path, models: Path, gpu: bool) -> None:
    bench = Bench(comfyui, models, gpu)
    alone, ways = bench.alone(), bench.plugin()
    more = [way for way in ways if way != "plugin"]
    where = torch.cuda.get_device_name() if gpu else "simulated (seconds are a CPU's, transfers are exact)"
    title = f"{bench.bytes / MB:.0f} MB bf16 model, {where}, by how much of it is offloaded"
    plugin = ways["plugin"]
    show(f"Seconds per step: {title}", (*HEAD, *more), [
        (f"{part} %", one.offloaded / MB, one.seconds, two.seconds, two.seconds / one.seconds,
         *(ways[way][index].seconds for way in more))
        for index, (part, one, two) in enumerate(zip(OFFLOADED, alone, plugin, strict=True))])
    if not gpu:
        donor = ways["donor"]
        show(f"MB fetched per step: {title}", ("offloaded", "MB", "alone, from RAM", "plugin, from RAM", "donor, from RAM",
                                               "donor, from the other device"), [
            (f"{part} %", one.offloaded / MB, one.from_ram / MB, two.from_ram / MB, three.from_ram / MB,
             (three.within - two.within) / MB)
            for part, one, two, three in zip(OFFLOADED, alone, plugin, donor, strict=True)])
    elif bench.devices < 2:
        print("left out, it needs two cards: a donor")
