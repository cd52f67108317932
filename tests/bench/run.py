"""Benchmarks: `make bench`, or `make bench BENCH="swap load"` for some.

Every figure stands beside ComfyUI alone in the same run.

The two servers run side by side and take prompts in turn, so that a machine that slows down slows both.
Figures of the simulated accelerator are marked *simulated*: its transfers are counted exactly, its seconds are a CPU's.
"""
from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path

import torch

sys.path[:0] = [str(Path(__file__).parents[1]), str(Path(__file__).parent)]
from conftest import COMFYUI, TREES  # noqa: E402
from support import loading, workflows  # noqa: E402
from support.fixtures import build_simulated_npu, make_models, no_simulated_npu  # noqa: E402
from support.server import Server  # noqa: E402
from table import ratio, show  # noqa: E402

MODELS = TREES.parent / "residency-models"
NAMES = ("alone", "plugin")


def pair(stack: ExitStack, device_mb: int | None, settings: str = "", threads: int = 2) -> dict[str, Server]:
    folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
    env = {"OMP_NUM_THREADS": str(threads), "MKL_NUM_THREADS": str(threads)}
    return {name: stack.enter_context(Server(COMFYUI, folder / name, MODELS, plugin=name == "plugin", settings=settings,
                                             device_mb=device_mb, env=env)) for name in NAMES}


def swap() -> None:
    """Two 846 MB models in one prompt, on a device that holds one."""
    make_models(COMFYUI, MODELS, ("diffusion_models/big_a", "diffusion_models/big_b", "text_encoders/clip_l"))
    rows, seconds, first = [], {name: [] for name in NAMES}, dict.fromkeys(NAMES, 0.0)
    with ExitStack() as stack:
        servers = pair(stack, 2200)
        start = {name: server.private_bytes() for name, server in servers.items()}
        for prompt in range(1, 22):
            for name in NAMES if prompt % 2 else reversed(NAMES):
                server, before = servers[name], servers[name].device()
                took = server.run(workflows.both("big_a", "big_b", seed=prompt))
                now = server.device()
                if prompt > 1:
                    seconds[name].append(took)
                if prompt > 4:
                    continue
                first[name] += took
                rows.append((f"{prompt} {name}", took, *((now[key] - before[key]) / 1e6 for key in ("to_device", "to_host")),
                             (server.private_bytes() - start[name]) / 1e6))
        same = all(torch.equal(servers["alone"].latents(p), servers["plugin"].latents(p)) for p in ("out_a", "out_b"))
        other = not torch.equal(servers["plugin"].latents("out_a"), servers["plugin"].latents("out_b"))
    show("Swap, simulated: two 846 MB bf16 models and CLIP-L on a 2200 MB device, two steps each",
         ("prompt", "seconds", "to device MB", "to host MB", "private RAM MB"), rows)
    mean, upper = ratio(seconds["plugin"], seconds["alone"])
    show("Swap, simulated, in turn", ("", "alone", "plugin", "ratio", "upper 95 %"),
         [("prompts 1 to 4: seconds a prompt", *(first[name] / 4 for name in NAMES), first["plugin"] / first["alone"], ""),
          ("prompts 2 to 21: seconds, median", *(statistics.median(seconds[name]) for name in NAMES), mean, upper),
          ("same latents", "", "yes" if same else "NO", "", ""),
          ("control: models differ", "", "yes" if other else "NO", "", "")])


def partial() -> None:
    """A model larger than what the device can take: part of it streams at every step."""
    make_models(COMFYUI, MODELS, ("diffusion_models/big_a", "text_encoders/clip_l"))
    steps: dict[str, list[float]] = {name: [] for name in NAMES}
    with ExitStack() as stack:
        servers = pair(stack, 1750)
        for prompt in range(9):
            for name in NAMES if prompt % 2 else reversed(NAMES):
                took = servers[name].run(workflows.text_to_latent("big_a", steps=4, seed=prompt, size=256))
                if prompt:
                    steps[name].append(took / 4)
        same = torch.equal(servers["alone"].latents(), servers["plugin"].latents())
        where = servers["plugin"].events("model.placed")[-1]
    mean, upper = ratio(steps["plugin"], steps["alone"])
    show("Partly loaded, simulated: one 846 MB bf16 model on a 1750 MB device, four steps, 8 pairs of warm prompts",
         ("", "alone", "plugin", "ratio", "upper 95 %"),
         [("seconds per step, median", statistics.median(steps["alone"]), statistics.median(steps["plugin"]), mean, upper),
          ("on the device, MB", "", where["device_bytes"] / 1e6, "", ""),
          ("mapped, MB", "", where["mapped_bytes"] / 1e6, "", ""), ("same latents", "", "yes" if same else "NO", "", "")])


def load() -> None:
    """The stock diffusion model loader on the CPU, each time in a fresh process, with the file in the page cache."""
    make_models(COMFYUI, MODELS, ("diffusion_models/big_fp32", "diffusion_models/big_a"))
    rows = []
    for title, file, settings in (("1692 MB float32", "big_fp32", ""),
                                  ("846 MB bf16, keep_file_dtype", "big_a", "[zero_copy]\nkeep_file_dtype = true\n")):
        (MODELS / "diffusion_models" / f"{file}.safetensors").read_bytes()
        runs: dict[str, list[dict[str, float]]] = {name: [] for name in NAMES}
        for _ in range(5):
            for name in NAMES:
                command = [sys.executable, str(Path(__file__).with_name("load_probe.py")), str(COMFYUI), str(MODELS),
                           f"{file}.safetensors", *([settings] if name == "plugin" else [])]
                done = subprocess.run(command, check=True, capture_output=True, text=True)
                runs[name].append(json.loads(done.stdout.splitlines()[-1]))
        for key in ("private_mb", "seconds"):
            alone, plugin = (statistics.median(run[key] for run in runs[name]) for name in NAMES)
            rows.append((f"{title}: {key.replace('_mb', ' RAM, MB')}", alone, plugin, plugin / alone))
    show("Load through the stock loader on the CPU, medians of 5", ("", "alone", "plugin", "ratio"), rows)


def overhead() -> None:
    """What the hooks cost when no policy is on: warm prompts in turn.

    With one thread each: hooks are Python and use no more, and two processor cores that wait for each other at every
    operation vary by three times as much.
    """
    make_models(COMFYUI, MODELS, ("diffusion_models/middle_fp32", "text_encoders/clip_l"))
    seconds = {name: [] for name in NAMES}
    for _ in range(4):  # a process is a little faster or slower all its life, by where its memory happened to lie
        with ExitStack() as stack:
            servers = pair(stack, None, "policies = []\n", threads=1)
            for prompt in range(6):
                for name in NAMES if prompt % 2 else reversed(NAMES):
                    took = servers[name].run(workflows.text_to_latent("middle_fp32", steps=20, seed=prompt))
                    if prompt:
                        seconds[name].append(took)
    show("Hooks without a policy: 20 interleaved pairs of warm prompts of 20 steps on the CPU, in 4 pairs of processes",
         ("", "alone", "plugin", "ratio", "upper 95 %"),
         [("seconds, median", statistics.median(seconds["alone"]), statistics.median(seconds["plugin"]),
           *(f"{number:.3f}" for number in ratio(seconds["plugin"], seconds["alone"])))])


def gpu() -> None:
    """On a CUDA card: dequantisation, a GGUF model, and the classic patcher with all but a little of the card reserved, where
    models swap and one is partly loaded."""
    import dequantize_gpu
    import gguf_gpu

    show(dequantize_gpu.title(), dequantize_gpu.HEAD, dequantize_gpu.table(torch.device("cuda", 0)))
    torch.cuda.empty_cache()  # the servers count the room from what is free
    gguf_gpu.run(COMFYUI, MODELS, _comfyui_gguf())
    make_models(COMFYUI, MODELS, ("diffusion_models/big_a", "diffusion_models/big_b", "text_encoders/clip_l"))
    card = torch.cuda.get_device_name()
    scenarios = (("two 846 MB models swap", 2.2, lambda seed: workflows.both("big_a", "big_b", seed=seed, steps=4, size=512)),
                 ("one 846 MB model, partly loaded", 1.75,
                  lambda seed: workflows.text_to_latent("big_a", seed=seed, steps=20, size=512)))
    for title, room_gb, flow in scenarios:
        seconds, private, placed = {}, {}, []
        reserved = torch.cuda.mem_get_info()[0] / 2**30 - room_gb - 0.5  # half a GB is the CUDA context
        args = ["--disable-dynamic-vram", "--reserve-vram", f"{reserved:.2f}"]
        for name in NAMES:  # one after the other: the room is counted from what is free
            with tempfile.TemporaryDirectory() as folder, Server(COMFYUI, Path(folder), MODELS, plugin=name == "plugin",
                                                                 device_args=args) as server:
                start = server.private_bytes()
                seconds[name] = [server.run(flow(prompt)) for prompt in range(9)][1:]
                private[name] = (server.private_bytes() - start) / 1e6
                placed = [line for line in server.log().splitlines() if " loaded, " in line]
        mean, upper = ratio(seconds["plugin"], seconds["alone"])
        show(f"{card}, dynamic VRAM off, {room_gb} GB of room: {title}; 8 warm prompts",
             ("", "alone", "plugin", "ratio", "upper 95 %"),
             [("seconds, median", statistics.median(seconds["alone"]), statistics.median(seconds["plugin"]), mean, upper),
              ("private RAM, MB", private["alone"], private["plugin"], private["plugin"] / private["alone"], "")])
        print(placed[-1], flush=True)


def _comfyui_gguf() -> Path | None:
    return Path(os.environ["COMFYUI_GGUF_PATH"]) if os.environ.get("COMFYUI_GGUF_PATH") else None


def gguf() -> None:
    """Headers, dequantisation, and models that swap; against ComfyUI-GGUF where COMFYUI_GGUF_PATH names it."""
    import dequantize
    import gguf_header
    import gguf_swap

    pack = _comfyui_gguf()
    show("GGUF header of a model with a vocabulary of 262,144 tokens", ("", "seconds", "times faster"), gguf_header.rows())
    show("20,000 headers with changed bytes", ("cases", "refused", "accepted", "peak memory, MB"), [gguf_header.fuzz()])
    show(dequantize.TITLE, dequantize.HEAD, dequantize.table(pack))
    if pack is None or no_simulated_npu():
        print("\nskipped, it needs COMFYUI_GGUF_PATH and a compiler: models that swap")
    else:
        build_simulated_npu()
        gguf_swap.run(COMFYUI, MODELS, pack)


def switch() -> None:
    """Two workflows by turns."""
    import switching

    switching.switch(COMFYUI, MODELS)


def start() -> None:
    """The first prompt after a start."""
    import switching

    switching.start(COMFYUI, MODELS)


def split() -> None:
    """Seconds per step against bytes offloaded: on a CUDA card where there is one, else simulated."""
    import split

    split.run(COMFYUI, MODELS, torch.cuda.is_available())


def fit() -> None:
    """A model larger than its device, by stated budgets."""
    import fitting

    if no_simulated_npu():
        print(f"\nskipped, {no_simulated_npu()}: fit")
        return
    build_simulated_npu()
    make_models(COMFYUI, MODELS, ("diffusion_models/big_fp32", "diffusion_models/big_a", "text_encoders/clip_l"))
    fitting.run(COMFYUI, MODELS)


def faults() -> None:
    """A device that runs out of memory, at each allocation of a prompt in turn."""
    import fault_sweep

    if no_simulated_npu():
        print(f"\nskipped, {no_simulated_npu()}: faults")
        return
    build_simulated_npu()
    make_models(COMFYUI, MODELS, ("diffusion_models/flux_a", "loras/flux_one", "text_encoders/clip_l", "vae/taesd"))
    fault_sweep.run(COMFYUI, MODELS)


def shard() -> None:
    """Two workers against one process, and what one to four of them hold."""
    import sharding

    sharding.run(COMFYUI, MODELS)


def tiles() -> None:
    """A VAE's work in tiles, by workers that Ray starts."""
    import tiling

    make_models(COMFYUI, MODELS, ("vae/taesd_fp32",))
    tiling.run(pair, min(os.cpu_count() or 1, 2))


def tokens() -> None:
    """The tokens of a step, shared among workers that Ray starts."""
    import token_sharing

    make_models(COMFYUI, MODELS, ("diffusion_models/middle_fp32", "text_encoders/clip_l"))
    loading.load()
    token_sharing.run(pair)


def weights() -> None:
    """Weights that workers have together, in each mode."""
    import shared_weights

    loading.load()
    shared_weights.run()


def ffn() -> None:
    """Feed-forwards in pieces of the tokens, in this process."""
    import feed_forwards

    feed_forwards.run()


def hook() -> None:
    """One intercepted call, on a function that does nothing."""
    from hook_cost import microseconds

    show("One intercepted call, microseconds above the bare call", ("", "microseconds"), microseconds())


BENCHES: dict[str, Callable[[], None]] = {
    "hook": hook, "load": load, "overhead": overhead, "swap": swap, "partial": partial, "split": split, "fit": fit,
    "switch": switch, "start": start, "shard": shard, "tiles": tiles, "tokens": tokens, "weights": weights, "ffn": ffn,
    "gguf": gguf, "gpu": gpu, "faults": faults}
LEFT_OUT = {"faults"} if torch.cuda.is_available() else {"faults", "gpu"}  # an hour; a card

if __name__ == "__main__":
    chosen = sys.argv[1:] or [name for name in BENCHES if name not in LEFT_OUT]
    unknown = [name for name in chosen if name not in BENCHES]
    if unknown:
        sys.exit(f"no benchmark {', '.join(unknown)}; there are {', '.join(BENCHES)}")
    simulated = ["swap", "partial", *([] if torch.cuda.is_available() else ["split"])]
    if set(simulated) & set(chosen):
        reason = no_simulated_npu()
        if reason:
            print(f"skipped, {reason}: {', '.join(simulated)}")
            chosen = [name for name in chosen if name not in simulated]
        else:
            build_simulated_npu()
    for name in chosen:
        BENCHES[name]()
