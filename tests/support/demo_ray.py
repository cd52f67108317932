"""`make demo-ray`: one stock workflow on a real ComfyUI, alone and with two workers that Ray starts, on the CPU.

One thread for ComfyUI alone and for each worker, so that what is compared is one device with two.
"""
from __future__ import annotations

import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from support.fixtures import make_models
from support.loading import COMFYUI, TREES
from support.server import MB, Server
from support.workflows import text_to_latent

MODELS = TREES.parent / "residency-models"
SETTINGS = """
policies = ["ray_shard", "hybrid_split", "preload_cache", "zero_copy"]
[ray_shard]
workers = 2
"""
ONE_THREAD = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
PROMPTS = [text_to_latent("middle_fp32", seed=seed, steps=10, size=512) for seed in (1, 2, 3)]


def main() -> None:
    make_models(COMFYUI, MODELS, ("diffusion_models/middle_fp32", "text_encoders/clip_l"))
    print(f"\n=== 10 steps at cfg 3, three prompts\n    device: CPU, one thread a process; ComfyUI: {COMFYUI}\n", flush=True)
    seconds, latents = {}, {}
    with tempfile.TemporaryDirectory() as folder:
        for name in ("ComfyUI alone", "two workers"):
            with Server(COMFYUI, Path(folder) / name.split()[-1], MODELS, plugin=name != "ComfyUI alone", settings=SETTINGS,
                        env=ONE_THREAD) as server:
                seconds[name] = [server.run(prompt) for prompt in PROMPTS]
                latents[name] = server.latents()
                events = server.events()
    alone, shared = latents.values()
    error = float((alone - shared).abs().max() / alone.abs().max())
    print(f"{'':40}{'ComfyUI alone':>16}{'two workers':>16}")
    for index, (one, other) in enumerate(zip(*seconds.values(), strict=True), 1):
        print(f"{f'seconds, prompt {index}':40}{one:>16.1f}{other:>16.1f}")
    print(f"{'difference, of the largest value':40}{'':>16}{error:>16.1e}\n")
    for event in events:
        if event["event"] == "shard.started":
            print(f"Ray and the workers took {event['seconds']:.0f} s to start, in the first prompt.")
        if event["event"] == "shard.loaded":
            print(f"A worker mapped {event['mapped_bytes'] / MB:.0f} MB of weights from the file, and was sent "
                  f"{event['copied_bytes'] / MB:.1f} MB, in {event['seconds']:.2f} s.")
    print(f"The last prompt's predictions: {[event['calls'] for event in events if event['event'] == 'shard.finished'][-1]}")
    if error > 1e-5:
        sys.exit("the results differ: please report this with the lines above")


if __name__ == "__main__":
    main()
