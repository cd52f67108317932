"""One failed allocation in a prompt, for each of its allocations in turn: what becomes of the prompt.

Every prompt loads a text encoder, a diffusion model and a VAE onto the simulated accelerator, encodes text, samples, decodes
and encodes. Two texts take turns, so that nothing comes from the cache of nodes.
"""
from __future__ import annotations

import itertools
import os
import statistics
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

import torch
from support import workflows
from support.server import MB, PromptFailed, Server
from table import show

DEVICE_MB = 4000
ONE_THREAD = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}  # the models are small
TEXTS = "a cat", "a dog"
FAILED = "lost", "other latents", "other image", "right"


def run(comfyui: Path, models: Path) -> None:
    """Prints the tables. Alone it is every 40th allocation; with the plugin FAULTS_EVERY leaves some out, and FAULTS_FROM is
    the first, for a sweep in several parts."""
    every = {"plugin": int(os.environ.get("FAULTS_EVERY", "1")), "alone": 40}
    first = {"plugin": int(os.environ.get("FAULTS_FROM", "1")), "alone": 1}
    rows, repeated = [], Counter[str]()
    for name in ("alone", "plugin"):
        with tempfile.TemporaryDirectory() as folder, Server(comfyui, Path(folder), models, plugin=name == "plugin",
                                                             device_mb=DEVICE_MB, env=ONE_THREAD) as server:
            count, found = _sweep(server, first[name], every[name])
            rows.append((name, f"{sum(found.values())} of {count}", *(found[kind] for kind in FAILED)))
            if name == "plugin":
                events = server.events("rescue.repeated")
                repeated.update(event["what"] for event in events)
                seconds = statistics.median(event["seconds"] for event in events)
                rows.append(("the next prompt after failures that keep coming", "", *_after_failures_that_keep_coming(server)))
    show("Simulated: one allocation of a prompt fails (load, text encoding, sampling, VAE)",
         ("", "allocations, one a prompt", *FAILED), rows)
    show("What was repeated", ("", "times"), [*repeated.most_common(), ("seconds to make room, median", seconds)])


def _flow(text: str) -> workflows.Workflow:
    flow = workflows.text_to_latent("flux_a", vae="taesd", loras=(("flux_one", 1.0),))
    flow["positive"]["inputs"]["text"] = text
    return flow


def _sweep(server: Server, first: int, every: int) -> tuple[int, Counter[str]]:
    """(allocations of a prompt, prompts by what became of them)."""
    expected = {}
    for text in (*TEXTS, *TEXTS):
        server.run(_flow(text))
        expected[text] = _results(server)
    _unload(server)
    before = server.device()["allocations"]
    server.run(_flow(TEXTS[0]))
    count = server.device()["allocations"] - before
    found: Counter[str] = Counter()
    texts = itertools.cycle(reversed(TEXTS))
    for at in range(first, count + 1, every):
        for text in itertools.islice(texts, 3):  # after a lost prompt the other text's nodes may be cached: once more
            _unload(server)
            server.fail(at)
            outcome = _outcome(server, text, expected[text])
            if not server.device()["armed"]:
                break
        found[outcome] += 1
        if found.total() % 50 == 0 or outcome != "right":
            print(f"allocation {at} of {count}: {outcome}; so far {dict(found)}", file=sys.stderr, flush=True)
    return count, found


def _outcome(server: Server, text: str, expected: list[torch.Tensor]) -> str:
    try:
        server.run(_flow(text))
    except PromptFailed:
        return "lost"
    latents, image = map(torch.equal, expected, _results(server))
    return "other latents" if not latents else "other image" if not image else "right"


def _after_failures_that_keep_coming(server: Server) -> tuple[int, ...]:
    server.run(_flow(TEXTS[0]))
    expected, found = _results(server), Counter[str]()
    for at in (5, 100, 700, 1100):
        server.run(_flow(TEXTS[1]))
        server.fail(at, on=True)
        assert _outcome(server, TEXTS[0], expected) == "lost"
        server.fail(-1)
        found[_outcome(server, TEXTS[0], expected)] += 1
    return tuple(found[kind] for kind in FAILED)


def _results(server: Server) -> list[torch.Tensor]:
    return [server.latents(prefix) for prefix in ("out", "out_vae")]


def _unload(server: Server) -> None:
    server.free(memory=False)
    end = time.monotonic() + 20
    while server.device()["used"] > MB and time.monotonic() < end:
        time.sleep(0.01)
