"""What Ray runs in a worker's process: a shell without imports of ours, which travels by value and lets the program in.

The program and all that is pickled by name is found under the names that the host has given: ComfyUI imports node packs under
their folders' paths.
"""
from __future__ import annotations

import importlib
import importlib.util
import os
import sys
from typing import Any


class Actor:
    """One worker.

    Args:
        environment: set before torch is imported, which sees no other device then; what is None is taken out.
    """

    def __init__(self, environment: dict[str, str | None]) -> None:
        for name, value in environment.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value
        self._program: Any = None

    def start(self, twin: dict[str, Any], options: dict[str, Any]) -> dict[str, Any]:
        """Becomes the host's twin.

        Args:
            twin: `policies.host.Process.twin`.
            options: `worker.program.Program`'s.

        Returns:
            What is to be known of the worker.
        """
        name, folder = twin["package"], twin["folder"]
        if name not in sys.modules:
            place = os.path.join(folder, "__init__.py")
            spec: Any = importlib.util.spec_from_file_location(name, place, submodule_search_locations=[folder])
            module = importlib.util.module_from_spec(spec)
            sys.modules[name] = module
            spec.loader.exec_module(module)
        program = importlib.import_module(f"{name}.policies.ray_shard.worker.program")
        self._program = program.Program(twin, **options)
        found: dict[str, Any] = self._program.about()
        return found

    def ask(self, what: str, *arguments: Any) -> Any:
        """Calls a method of the program's; one at a time."""
        return getattr(self._program, what)(*arguments)

    def tell(self, what: str, *arguments: Any) -> Any:
        """The same beside whatever is being computed."""
        return getattr(self._program, what)(*arguments)
