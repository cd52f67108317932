"""A model that is larger than its device, by stated budgets: what was foretold, what is there, and whether the latents are
those of a device that holds all of it."""
from __future__ import annotations

import tempfile
from pathlib import Path

import torch
from support import workflows
from support.server import MB, Server
from table import show

MODEL, OTHER, CLIP = "big_fp32", "big_a", "clip_l"
LARGE_MB, SMALL_MB = 4000, 1200
FLAGS = ["--force-fp32"]  # else the host halves the weights
ON_CPU = '[[hybrid_split.rules]]\ncomponent = "text_encoder"\ndevice = "cpu"\n'
WAYS = {
    "conservative": '[hybrid_split]\nmode = "conservative"\n' + ON_CPU,
    "conservative_factor = 0.5": '[hybrid_split]\nmode = "conservative"\nconservative_factor = 0.5\n' + ON_CPU,
    "device_gb = 0.6": ON_CPU + '[[hybrid_split.rules]]\nname = "big_*"\ndevice_gb = 0.6\n',
    'residency = "host"': ON_CPU + '[[hybrid_split.rules]]\nname = "big_*"\nresidency = "host"\n',
}


def flow(model: str, seed: int) -> workflows.Workflow:
    made = workflows.text_to_latent(model, seed=seed, clip=CLIP)
    made["clip"]["inputs"]["device"] = "cpu"  # on both sides, so that the encodings are the same
    return made


def run(comfyui: Path, models: Path) -> None:
    expected: dict[int, torch.Tensor] = {}
    with (tempfile.TemporaryDirectory() as folder,
          Server(comfyui, Path(folder), models, plugin=False, device_mb=LARGE_MB, args=FLAGS) as alone):
        for seed in range(len(WAYS)):
            alone.run(flow(MODEL, seed))
            expected[seed] = alone.latents()
        alone.run(flow(OTHER, 0))
        control = not torch.equal(expected[0], alone.latents())
    rows: list[tuple[object, ...]] = []
    with (tempfile.TemporaryDirectory() as folder,
          Server(comfyui, Path(folder), models, device_mb=SMALL_MB, args=FLAGS) as server):
        for seed, (way, settings) in enumerate(WAYS.items()):
            server.settings(settings)
            server.run(flow(MODEL, seed))
            plan, placed = server.events("split.planned")[-1], server.events("model.placed")[-1]
            predicted, observed = plan["predicted_bytes"], placed["device_bytes"]
            rows.append((way, plan["mode"], plan.get("budget_bytes", 0) / MB, predicted / MB, observed / MB,
                         100 * abs(observed - predicted) / max(predicted, 1),
                         "yes" if torch.equal(server.latents(), expected[seed]) else "NO"))
    show(f"1692 MB model on a device of {SMALL_MB} MB (simulated), budgets as stated",
         ("hybrid_split", "mode", "budget MB", "predicted MB", "observed MB", "off by %", "same latents"),
         [*rows, ("control: another model differs", "", "", "", "", "", "yes" if control else "NO")])
