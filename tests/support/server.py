"""A real ComfyUI in a process of its own, driven over its HTTP API."""
from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import safetensors.torch
import torch

PLUGIN = Path(__file__).parents[2]
TESTING_NODES = Path(__file__).parent / "packs" / "testing_nodes"
GGUF_NODES = Path(__file__).parent / "packs" / "gguf_nodes"
NODE_CLOCK = Path(__file__).parent / "packs" / "node_clock"
VAE_NODES = Path(__file__).parent / "packs" / "vae_nodes"
SIZING_NODES = Path(__file__).parent / "packs" / "sizing_nodes"
PATCHING_NODES = Path(__file__).parent / "packs" / "patching_nodes"
SIMULATED_NPU = Path(__file__).parent / "simulated_npu"
SIMULATED_AIMDO = Path(__file__).parent / "simulated_aimdo"
DYNAMIC_VRAM = ("--enable-dynamic-vram", "--disable-pinned-memory")
MB = 2**20


class PromptFailed(Exception):
    """A node raised; the message is ComfyUI's."""


class Server:
    """Starts ComfyUI with or without the plugin.

    Args:
        comfyui: its folder.
        base: a scratch folder: outputs, user files, custom nodes. May be used by several servers one after the other.
        models: a models folder.
        plugin: whether the plugin is in `custom_nodes`.
        settings: the user's settings.toml for the plugin.
        device_mb: memory of the simulated accelerator; None runs on the CPU.
        dynamic_vram: whether ComfyUI pages weights on it, by a simulated paging library.
        packs: folders of other packs, to be put into `custom_nodes`.
        plugin_first: whether the plugin is loaded before them.
    """

    def __init__(self, comfyui: Path, base: Path, models: Path, *, plugin: bool = True, settings: str = "",
                 device_mb: int | None = None, args: Sequence[str] = (), env: Mapping[str, str] | None = None,
                 packs: Sequence[Path] = (), device_args: Sequence[str] | None = None,
                 plugin_first: bool = True, dynamic_vram: bool = False) -> None:
        self.base, self.plugin, self.plugin_first = base, plugin, plugin_first
        self._prepare(models, settings, packs)
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        # Threads that spin while they wait for each other take ten times as long as soon as somebody else wants a core.
        # Else every start compiles all of ComfyUI where the surroundings forbid Python to keep that.
        own = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}
        variables = {**own, "OMP_NUM_THREADS": "2", "MKL_NUM_THREADS": "2", "OMP_WAIT_POLICY": "PASSIVE", **(env or {})}
        self._stats_file, self._trouble_file = base / "stats.json", base / "trouble.json"
        if device_args is None:
            device_args = ["--cpu"] if device_mb is None else DYNAMIC_VRAM if dynamic_vram else []
        if device_mb is not None:
            variables |= {"SIMNPU_MB": str(device_mb), "SIMNPU_STATS": str(self._stats_file),
                          "SIMNPU_TROUBLE": str(self._trouble_file),
                          "PYTHONPATH": os.pathsep.join([str(SIMULATED_NPU), *([str(SIMULATED_AIMDO)] if dynamic_vram else []),
                                                         os.environ.get("PYTHONPATH", "")])}
        self.device_mb, self.simulated, self.dynamic_vram = device_mb, device_mb is not None, dynamic_vram
        self.log_file = base / "server.log"
        command = [sys.executable, str(comfyui / "main.py"), "--port", str(self.port), "--base-directory", str(base),
                   "--front-end-root", str(base / "web"), "--database-url", "sqlite:///:memory:", "--disable-api-nodes",
                   "--extra-model-paths-config", str(base / "more.yaml"), *device_args, *args]
        with self.log_file.open("w") as log:
            self.process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, env=variables, cwd=base)
        try:
            self._wait()
        except BaseException:
            self.stop()
            raise

    def __enter__(self) -> Server:
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def _prepare(self, models: Path, settings: str, packs: Sequence[Path]) -> None:
        (self.base / "web").mkdir(parents=True, exist_ok=True)
        (self.base / "web" / "index.html").write_text("<html></html>")
        # ComfyUI loads a folder in the order in which the file system lists it, so who comes first needs two folders.
        ours = [PLUGIN] if self.plugin else []
        groups = (ours, packs) if self.plugin_first else (packs, ours)
        for folder, group in zip((self.base / "custom_nodes", self.base / "more_nodes"), groups, strict=True):
            folder.mkdir(exist_ok=True)
            for old in folder.iterdir():
                if old.is_symlink():
                    old.unlink()
            for pack in group:
                (folder / pack.name).symlink_to(pack)
        (self.base / "more.yaml").write_text(f"more:\n    custom_nodes: {self.base / 'more_nodes'}\n")
        if not (self.base / "models").exists():
            (self.base / "models").symlink_to(models)
        user = self.base / "user" / "residency"
        user.mkdir(parents=True, exist_ok=True)
        (user / "settings.toml").write_text(settings)
        (user / "telemetry.jsonl").unlink(missing_ok=True)

    def _wait(self, seconds: float = 180) -> None:
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            if self.process.poll() is not None:
                raise RuntimeError(f"ComfyUI ended at start:\n{self.log()[-4000:]}")
            try:
                self._get("/system_stats")
                return
            except (urllib.error.URLError, ConnectionError, TimeoutError):
                time.sleep(0.1)
        raise RuntimeError(f"ComfyUI did not start in {seconds} s:\n{self.log()[-4000:]}")

    def run(self, workflow: Mapping[str, Any], seconds: float = 300) -> float:
        """Runs a prompt to its end and returns the seconds that it took.

        Raises:
            PromptFailed: a node raised, or the workflow was refused.
        """
        return self.finish(self.queue(workflow), seconds)

    def queue(self, workflow: Mapping[str, Any]) -> str:
        """Queues a prompt and returns its id."""
        try:
            return str(self._post("/prompt", {"prompt": workflow})["prompt_id"])
        except urllib.error.HTTPError as error:
            raise PromptFailed(error.read().decode()) from None

    def finish(self, prompt: str, seconds: float = 300) -> float:
        """Waits for a prompt, and returns the seconds between its start and end messages."""
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            if self.process.poll() is not None:
                raise RuntimeError(f"ComfyUI died:\n{self.log()[-4000:]}")
            entry = self._get(f"/history/{prompt}").get(prompt)
            if entry is not None and entry.get("status"):
                messages = dict(entry["status"]["messages"])
                if entry["status"]["status_str"] != "success":
                    failed = messages.get("execution_error") or {"exception_message": "interrupted"}
                    raise PromptFailed(failed["exception_message"])
                return float(messages["execution_success"]["timestamp"] - messages["execution_start"]["timestamp"]) / 1000
            time.sleep(0.02)
        raise RuntimeError(f"the prompt did not end in {seconds} s:\n{self.log()[-4000:]}")

    def interrupt(self) -> None:
        self._post("/interrupt", {})

    def free(self, memory: bool = True) -> None:
        """`POST /free`, with both flags or only for the models on the device."""
        self._post("/free", {"unload_models": True, "free_memory": memory})

    def settings(self, text: str) -> None:
        """Changes the user's settings, from the next prompt on."""
        file = self.base / "user" / "residency" / "settings.toml"
        before = file.stat().st_mtime_ns
        file.write_text(text)
        os.utime(file, ns=(before + 10**9, before + 10**9))

    def choices(self, kind: str, option: str) -> list[str]:
        """The file names that a node offers."""
        found, *options = self._get(f"/object_info/{kind}")[kind]["input"]["required"][option]
        if found == "COMBO":  # as nodes of the newer API have it
            found = options[0]["options"]
        return found if isinstance(found, list) else []

    def latents(self, prefix: str = "out") -> torch.Tensor:
        """The latents that were saved last under this prefix."""
        files = sorted((self.base / "output").glob(f"{prefix}_?????_.latent"))
        return safetensors.torch.load_file(files[-1])["latent_tensor"]

    def events(self, name: str | None = None) -> list[dict[str, Any]]:
        """The plugin's telemetry since the start, of one name or all."""
        file = self.base / "user" / "residency" / "telemetry.jsonl"
        events = [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []
        return [event for event in events if name in (None, event["event"])]

    def loader_nodes(self) -> list[tuple[str, float]]:
        """(class, seconds) of each node of the last prompt that loads a model, as the executor ran it. Needs `NODE_CLOCK`."""
        ran = [json.loads(line) for line in (self.base / "user" / "nodes.jsonl").read_text().splitlines()]
        return [(node["kind"], node["seconds"]) for node in ran
                if node["prompt"] == ran[-1]["prompt"] and "Loader" in node["kind"] and "Lora" not in node["kind"]]

    def fail(self, at: int, on: bool = False) -> None:
        """The simulated accelerator runs out of memory at an allocation from now, once, or from there `on`; -1 is never."""
        self._trouble(fail_at=at, on=on)

    def allocations(self, workflow: Mapping[str, Any]) -> int:
        """Runs a prompt and returns how many allocations it made on the simulated accelerator."""
        before = self.device()["allocations"]
        self.run(workflow)
        return self.device()["allocations"] - before

    def run_failing(self, workflow: Mapping[str, Any], at: int, on: bool = False) -> list[str]:
        """Runs a prompt whose `at`-th allocation fails, and returns what was repeated.

        Raises:
            PromptFailed: nothing helped.
        """
        seen = len(self.events("rescue.repeated"))
        self.fail(at, on)
        try:
            self.run(workflow)
            assert not self.device()["armed"], "nothing failed"
        finally:
            self.fail(-1)
        return [event["what"] for event in self.events("rescue.repeated")[seen:]]

    def shrink(self, device_mb: float) -> None:
        """Somebody else takes memory of the simulated accelerator, or gives it back."""
        self._trouble(capacity_mb=device_mb)

    def _trouble(self, **trouble: float) -> None:
        self._trouble_file.write_text(json.dumps(trouble))
        self.process.send_signal(signal.SIGUSR1)
        self.device()  # signals are taken in the order of their numbers

    def device(self) -> dict[str, int]:
        """The simulated accelerators' counters, in bytes, and of their allocations."""
        stats = self._stats()
        return {"held": sum(stats["held"]), "to_device": stats["h2d_bytes"], "to_host": stats["d2h_bytes"],
                "within": stats["d2d_bytes"], "from_file": stats["file_to_device_bytes"],
                "used": sum(stats["used"]), "allocations": stats["allocs"], "ooms": stats["ooms"], "armed": stats["armed"]}

    def used(self) -> list[int]:
        """Bytes that are allocated on each simulated accelerator."""
        return list(self._stats()["used"])

    def _stats(self) -> dict[str, Any]:
        self._stats_file.unlink(missing_ok=True)
        end = time.monotonic() + 30
        while not self._stats_file.exists() and time.monotonic() < end:
            # Of two signals the second may go to another thread, and then wakes nobody: so again, until somebody answers.
            self.process.send_signal(signal.SIGUSR2)
            for _ in range(50):
                if not self._stats_file.exists():
                    time.sleep(0.01)
        stats: dict[str, Any] = json.loads(self._stats_file.read_text())
        return stats

    def private_bytes(self) -> int:
        """Private RAM, without the memory that plays the accelerator's."""
        status = Path(f"/proc/{self.process.pid}/status").read_text()
        private = int(next(line for line in status.splitlines() if line.startswith("RssAnon")).split()[1]) * 1024
        return private - (self.device()["held"] if self.simulated else 0)

    def storage_bytes(self) -> int:
        """Bytes read from storage so far."""
        text = Path(f"/proc/{self.process.pid}/io").read_text()
        return int(next(line for line in text.splitlines() if line.startswith("read_bytes")).split()[1])

    def maps(self, name: str) -> list[str]:
        """The lines of the process's memory map that name a file."""
        return [line for line in Path(f"/proc/{self.process.pid}/maps").read_text().splitlines() if name in line]

    def log(self) -> str:
        return self.log_file.read_text(errors="replace") if self.log_file.exists() else ""

    def stop(self) -> None:
        if self.process.poll() is None:
            self.process.terminate()  # a shell's background jobs ignore SIGINT, and so do their children
            try:
                self.process.wait(20)
            except subprocess.TimeoutExpired:
                self.process.kill()
        self.process.wait()

    def _get(self, path: str) -> Any:
        with urllib.request.urlopen(f"http://127.0.0.1:{self.port}{path}", timeout=60) as answer:
            return json.loads(answer.read())

    def _post(self, path: str, body: Mapping[str, Any]) -> Any:
        request = urllib.request.Request(f"http://127.0.0.1:{self.port}{path}", json.dumps(body).encode(),
                                         {"Content-Type": "application/json"})
        with urllib.request.urlopen(request, timeout=60) as answer:
            text = answer.read()
            return json.loads(text) if text else {}


@contextmanager
def both(first: Callable[[], Server], second: Callable[[], Server]) -> Iterator[tuple[Server, Server]]:
    """Two servers that start at the same time: a start keeps one core busy for seconds."""
    with ExitStack() as stack:
        with ThreadPoolExecutor(2) as pool:
            starting = [pool.submit(first), pool.submit(second)]
        for future in starting:
            if future.exception() is None:
                stack.enter_context(future.result())
        yield starting[0].result(), starting[1].result()
