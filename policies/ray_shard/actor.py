"""What Ray runs in a worker's process: a shell without imports of ours, which travels by value and lets the program in.

The program and all that is pickled by name is found under the names that the host has given: ComfyUI imports node packs under
their folders' paths. On another machine they have to be under the same paths, and be the same.
"""
from __future__ import annotations

import hashlib
import importlib
import importlib.util
import os
import re
import sys
from pathlib import Path
from typing import Any

# What both machines need: where the twin says that it is, the file that says which version it is, and the sources that count.
_NEEDED = {"ComfyUI": ("root", "comfyui_version.py", "comfy"), "Residency": ("folder", "__init__.py", "policies")}


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
            twin: `policies.host.Process.twin`; for another machine also `host`, that machine, and `sources` of what is needed.
            options: `worker.program.Program`'s.

        Returns:
            What is to be known of the worker.

        Raises:
            FileNotFoundError: ComfyUI, or this plugin, is not there.
            RuntimeError: it is another one.
        """
        if "sources" in twin:
            must_be_alike(twin)
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


def surroundings() -> dict[str, str]:
    """The environment that a worker finds."""
    return dict(os.environ)


def sources(twin: dict[str, Any]) -> dict[str, tuple[str, str]]:
    """(version, digest of the sources) of ComfyUI and of this plugin, on the machine that it is asked on.

    A version alone says little: many people have ComfyUI from its repository, between two versions.
    """
    found = {}
    for what, (key, file, package) in _NEEDED.items():
        folder = Path(twin[key])
        text = (folder / file).read_text("utf-8") if (folder / file).is_file() else ""
        said = re.search(r'^__version__ = "(.*)"', text, re.M)
        made = hashlib.sha256()
        for path in sorted((folder / package).rglob("*.py")):
            made.update(f"{path.relative_to(folder).as_posix()}\n".encode() + path.read_bytes())
        found[what] = (said[1] if said else "an unknown version", made.hexdigest())
    return found


def must_be_alike(twin: dict[str, Any]) -> None:
    """Looks whether this machine has what the worker is to run.

    Raises:
        FileNotFoundError, RuntimeError: as in `Actor.start`.
    """
    host = twin["host"]
    for what, (key, _, package) in _NEEDED.items():
        if not os.path.isdir(os.path.join(twin[key], package)):
            raise FileNotFoundError(f"{what} is not at {twin[key]} on host {host}: install it at the same path, or share the "
                                    "folder")
    here = sources(twin)
    for what, (version, digest) in twin["sources"].items():
        if here[what] != (version, digest):
            other = f"is {here[what][0]}" if here[what][0] != version else "has other sources"
            raise RuntimeError(f"{what} at {twin[_NEEDED[what][0]]} on host {host} {other}, and ComfyUI's machine has "
                               f"{version}: install the same one on both")
