"""Switching between two workflows, and the first image after a start; with the page cache as ComfyUI's reader leaves it.

On NVIDIA with dynamic VRAM that reader asks the kernel to drop a file's pages after it read them, so each run here asks it too,
before each prompt. Each server has files of its own: a page that one of them holds would help the other.
"""
from __future__ import annotations

import os
import shutil
import statistics
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import torch
from residency.policies.files import pages
from support import workflows
from support.fixtures import make_models
from support.server import NODE_CLOCK, Server
from table import ratio, show

NAMES = ("alone", "plugin")
FILES = {"diffusion_models": ("big_fp32", "middle_fp32"), "text_encoders": ("clip_l", "clip_l_other")}
PRELOAD = """
[preload_cache]
when = "{when}"
diffusion_models = [{{name = "big_fp32.safetensors"}}]
text_encoders = [{{names = ["clip_l.safetensors"]}}]
"""
STARTS = {"alone": "", "before": PRELOAD.format(when="before"), "after": PRELOAD.format(when="after")}


@contextmanager
def copies(models: Path, comfyui: Path) -> Iterator[Path]:
    """A models folder with files of its own, on the disk of the other one."""
    make_models(comfyui, models, tuple(f"{kind}/{name}" for kind, names in FILES.items() for name in names))
    with tempfile.TemporaryDirectory(dir=models.parent) as folder:
        for kind, names in FILES.items():
            (Path(folder) / kind).mkdir()
            for name in names:
                shutil.copyfile(models / kind / f"{name}.safetensors", Path(folder) / kind / f"{name}.safetensors")
        os.sync()  # only clean pages can be dropped
        yield Path(folder)


def drop(models: Path) -> None:
    for file in models.rglob("*.safetensors"):
        descriptor = os.open(file, os.O_RDONLY)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(descriptor)


def warm(models: Path) -> None:
    for file in models.rglob("*.safetensors"):
        pages.read_ahead(str(file), file.stat().st_size, lambda done, total: None)


def flow(which: int, seed: int) -> workflows.Workflow:
    return workflows.text_to_latent(FILES["diffusion_models"][which], clip=FILES["text_encoders"][which], steps=1, seed=seed)


def switch(comfyui: Path, models: Path, switches: int = 10) -> None:
    """A, B, A, B, …: what each prompt costs after both were loaded once."""
    seconds: dict[str, list[float]] = {name: [] for name in NAMES}
    read = dict.fromkeys(NAMES, 0)
    with ExitStack() as stack:
        own = {name: stack.enter_context(copies(models, comfyui)) for name in NAMES}
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        servers = {name: stack.enter_context(Server(comfyui, folder / name, own[name], plugin=name == "plugin"))
                   for name in NAMES}
        for prompt in range(switches + 2):
            for name in NAMES if prompt % 2 else reversed(NAMES):
                drop(own[name])
                before = servers[name].storage_bytes()
                took = servers[name].run(flow(prompt % 2, prompt))
                if prompt > 1:
                    seconds[name].append(took)
                    read[name] += servers[name].storage_bytes() - before
        same = torch.equal(servers["alone"].latents(), servers["plugin"].latents())
        hits = [event["seconds"] for event in servers["plugin"].events("cache.hit")]
    mean, upper = ratio(seconds["plugin"], seconds["alone"])
    show(f"{switches} switches between a 1692 MB and a 141 MB float32 model, each with a text encoder, one step, on the CPU",
         ("", "alone", "plugin", "ratio", "upper 95 %"),
         [("seconds a prompt, median", *(statistics.median(seconds[name]) for name in NAMES), mean, upper),
          ("MB from storage a switch", *(read[name] / switches / 1e6 for name in NAMES), read["plugin"] / read["alone"], ""),
          ("milliseconds of a load that was kept, median", "", 1000 * statistics.median(hits), "", ""),
          ("milliseconds of a load that was kept, at most", "", 1000 * max(hits), "", ""),
          ("same latents", "", "yes" if same else "NO", "", "")])


def start(comfyui: Path, models: Path, times: int = 5) -> None:
    """From the start of the process to the end of its first prompt, which is sent as soon as the port opens; that prompt alone;
    and its loader nodes. Servers start one after the other, in turn, and what is compared started next to each other."""
    with copies(models, comfyui) as own:
        for title, prepare in (("not in the page cache", drop), ("in the page cache", warm)):
            runs: dict[str, list[tuple[float, ...]]] = {name: [] for name in STARTS}
            for number in range(times):
                for name in STARTS if number % 2 else reversed(STARTS):
                    prepare(own)
                    runs[name].append(_start(comfyui, own, name, number))
            rows = []
            for index, figure in enumerate(("start to the end of the first prompt, s", "the first prompt, s",
                                            "its loader nodes, ms", "read from storage, MB")):
                figures = {name: [run[index] for run in found] for name, found in runs.items()}
                for name in ("before", "after"):
                    bounds = ratio(figures[name], figures["alone"]) if min(map(min, figures.values())) > 0 else ("", "")
                    rows.append((f'{figure}; when = "{name}"', *(statistics.median(figures[side]) for side in ("alone", name)),
                                 *bounds))
            show(f"First image after a start, a 1692 MB model and a text encoder that are {title}, {times} starts each",
                 ("", "alone", "preloaded", "ratio", "upper 95 %"), rows)


def _start(comfyui: Path, models: Path, name: str, seed: int) -> tuple[float, ...]:
    with tempfile.TemporaryDirectory() as folder:
        started = time.monotonic()
        with Server(comfyui, Path(folder), models, plugin=name != "alone", settings=STARTS[name], packs=[NODE_CLOCK]) as server:
            prompt = server.run(flow(0, seed))
            total = time.monotonic() - started
            loaders = 1000 * sum(seconds for _, seconds in server.loader_nodes())
            return total, prompt, loaders, server.storage_bytes() / 1e6
