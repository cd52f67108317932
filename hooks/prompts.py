"""A prompt's start and end, and `POST /free`.

`PromptExecutor.reset` runs when the user asks for all memory back, when the executor is made, and when a policy has the models
built anew. `execute` swallows the errors of nodes, so a prompt's success is read from the executor.
"""
from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any, Protocol

from ..policies.memory import process_memory
from ..policies.policy import Effect
from ..policies.requests import EmptyMemory, RunPrompt
from ..telemetry import emit
from .call import HostCall
from .gguf_weights.dense import METER
from .host import Memory
from .placement import Stopwatch
from .registry import Hook
from .seam import Seam


class Chain(Protocol):
    """The policies, who are told too."""

    def prompt_ended(self) -> Mapping[str, Effect]: ...

    def emptied(self) -> None: ...


class Listener(Protocol):
    """Who is told of prompts: the composition root."""

    @property
    def chain(self) -> Chain: ...

    def prompt_starts(self) -> None: ...


class Rebuild:
    """Lets the host forget every output, so that loaders run again. That is no wish to have memory back.

    Attributes:
        runs: whether it is at it.
    """

    runs = False

    def __call__(self, executor: Any) -> None:
        self.runs = True
        try:
            executor.reset()
        finally:
            self.runs = False


def hooks(listener: Listener, stopwatch: Stopwatch) -> tuple[Hook, ...]:
    """The hooks of this file."""
    memory = Memory()
    read_before = 0
    rebuild = Rebuild()

    def run(call: HostCall) -> RunPrompt:
        nonlocal read_before
        listener.prompt_starts()
        stopwatch.take()
        read_before = process_memory().storage_read
        return RunPrompt(str(call["prompt_id"]), partial(rebuild, call.instance))

    def finished(call: HostCall, request: RunPrompt, answer: Any, seconds: float) -> None:
        effects = listener.chain.prompt_ended()
        now = process_memory()
        size, took = METER.take()
        if size:
            emit("gguf.dequantised", prompt=request.prompt, bytes=size, seconds=took)
        emit("prompt.finished", prompt=request.prompt, ok=bool(call.instance.success), seconds=seconds,
             placing_seconds=stopwatch.take(), read_bytes=now.storage_read - read_before, private_bytes=now.private,
             file_bytes=now.file, device_bytes=memory.device_bytes(),
             policies={name: {"predicted_bytes": effect.predicted_bytes, "observed_bytes": effect.observed_bytes}
                       for name, effect in effects.items()})

    def emptied(call: HostCall, request: EmptyMemory, answer: Any, seconds: float) -> None:
        listener.chain.emptied()
        emit("memory.emptied", seconds=seconds)

    def empty(call: HostCall) -> EmptyMemory | None:
        being_made = not hasattr(call.instance, "caches")
        return None if being_made or rebuild.runs else EmptyMemory()

    return (
        Hook(Seam("execution", "PromptExecutor.execute", ("prompt_id",)), RunPrompt, run, report=finished),
        Hook(Seam("execution", "PromptExecutor.reset"), EmptyMemory, empty, report=emptied),
    )
