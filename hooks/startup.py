"""The host's start and its web server: implements `policies.models.Server`."""
from __future__ import annotations

import asyncio
import sys
import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import folder_paths

from ..telemetry import log


class Server:
    """Implements `policies.models.Server`. Where no server runs (the host as a library) there is nothing to wait for."""

    def __init__(self) -> None:
        self._answers: dict[str, Callable[[], Mapping[str, Any] | None]] = {}

    def at_start(self, wait: bool, work: Callable[[], None]) -> None:
        # A daemon: a server that is stopped meanwhile does not wait for a model.
        thread = threading.Thread(target=work, name="residency-preload", daemon=True)

        async def start(app: Any) -> None:
            thread.start()
            while wait and thread.is_alive():
                await asyncio.sleep(0.02)

        server = _instance()
        if server is None or server.app.on_startup.frozen:  # it runs already: the policy was turned on later
            thread.start()
        else:
            server.app.on_startup.append(start)

    def publish(self, path: str, answer: Callable[[], Mapping[str, Any] | None]) -> None:
        known = path in self._answers
        self._answers[path] = answer
        server = _instance()
        if known or server is None:
            return
        if server.app.router.frozen:
            log.info("[residency] %s is there after the next start", path)
            return

        from aiohttp import web

        async def handle(request: Any) -> Any:
            # It may wait for a model to be loaded, and the loop serves everybody.
            found = await asyncio.get_running_loop().run_in_executor(None, self._answers[path])
            return web.json_response(found) if found is not None else web.json_response({"error": "turned off"}, status=404)

        server.routes.get(path)(handle)

    def folder(self) -> str:
        return str(Path(folder_paths.get_user_directory()) / "residency")


def _instance() -> Any:
    module = sys.modules.get("server")  # the host as a library has none
    return None if module is None else getattr(module.PromptServer, "instance", None)
