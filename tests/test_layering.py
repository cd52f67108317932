"""The rules of the house, read from the sources: who imports whom, what stays out of policies, how long things may be."""
from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import pytest
from support.loading import ROOT

# What policies share; `chain` is apart, only the composition root sees it.
VOCABULARY = {"", "chunking", "computing", "files", "host", "memory", "models", "policy", "requests", "sampling", "weights"}
# Everything else in `policies/` is a policy: its name, and the packages that it alone may import.
POLICIES: dict[str, set[str]] = {"hybrid_split": set(), "preload_cache": set(), "ray_shard": {"ray"}, "zero_copy": set()}
HOST = {"comfy", "comfy_kitchen", "comfy_aimdo", "comfy_api", "comfy_execution", "comfyui_version", "execution", "folder_paths",
        "nodes", "server"}

_NUMBERS = {"torch", "safetensors", "gguf", "psutil", "numpy"}
# By layer: the layers of ours that it may import, and the packages of others; None is any.
LAYERS: dict[str, tuple[set[str], set[str] | None]] = {
    "settings": ({"settings"}, {"tomli"}),
    "telemetry": ({"telemetry"}, set()),
    "vocabulary": ({"settings", "telemetry", "vocabulary"}, _NUMBERS),
    "chain": ({"settings", "telemetry", "vocabulary"}, set()),
    **{policy: ({"settings", "telemetry", "vocabulary", policy}, _NUMBERS | packages) for policy, packages in POLICIES.items()},
    # A program that holds a ComfyUI model in a process of its own; the policy that starts it is as blind as the others.
    "worker": ({"settings", "telemetry", "vocabulary", "ray_shard", "worker"}, _NUMBERS | {"comfy", "ray"}),
    "hooks": ({"settings", "telemetry", "vocabulary", "hooks"}, None),
    "plugin": ({"settings", "telemetry", "vocabulary", "chain", "hooks"}, None),
}

# What one module alone may import, by its path: it is optional, and whoever needs it imports the module where that may fail.
ALONE: dict[str, set[str]] = {"policies/files/quants/kernels.py": {"triton"}}

# ComfyUI's names: a policy that reads them knows the host as surely as one that imports it.
HOST_ATTRIBUTES = {"model_patcher", "patcher", "backup", "hook_backup", "object_patches", "comfy_cast_weights",
                   "comfy_patched_weights", "current_loaded_models", "model_options", "is_dynamic", "weight_function",
                   "cached_patcher_init"}

# Where failing open needs it: (file, function).
BROAD = {
    ("__init__.py", "<module>"),
    ("hooks/registry.py", "_changes"),
    ("hooks/registry.py", "wrapper"),
    ("hooks/selftest.py", "exercise"),
    ("policies/chain.py", "_ask"),
    ("policies/chain.py", "_enact"),
    ("policies/chain.py", "_tell"),
    ("policies/files/quants/fused.py", "_choose"),
    ("policies/preload_cache/preloader.py", "_one"),
    ("policies/ray_shard/crew.py", "_run"),
    ("telemetry/__init__.py", "emit"),
}
# The one package that is not the plugin's own process, and so may know ComfyUI outside of `hooks/`.
WORKER = ("policies", "ray_shard", "worker")
LONGEST_MODULE = 250
LONGEST_FUNCTION = 40
# These return a tuple of hooks with their closures, or are a sequence of steps that reads better in one piece.
LONGER_FUNCTIONS = {("hooks/placement.py", "hooks"): 60}


@dataclass(frozen=True)
class Module:
    """A file of the product."""

    file: Path

    @property
    def path(self) -> str:
        return self.file.relative_to(ROOT).as_posix()

    @property
    def package(self) -> tuple[str, ...]:
        return Path(self.path).parts[:-1]

    @cached_property
    def tree(self) -> ast.Module:
        return ast.parse(self.file.read_text(encoding="utf-8"))

    def imports(self) -> Iterator[tuple[int, str]]:
        """(level, dotted name) of each import; `from .a import b` is `a.b`, which may be a module or a name in one."""
        for node in ast.walk(self.tree):
            if isinstance(node, ast.Import):
                yield from ((0, alias.name) for alias in node.names)
            elif isinstance(node, ast.ImportFrom):
                yield from ((node.level, ".".join(filter(None, [node.module, alias.name]))) for alias in node.names)

    def functions(self) -> Iterator[tuple[str, int]]:
        for node in ast.walk(self.tree):
            if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
                yield node.name, (node.end_lineno or 0) - node.lineno + 1

    def handlers(self) -> Iterator[tuple[str, ast.ExceptHandler]]:
        """Each `except`, with the function that it stands in."""

        def walk(node: ast.AST, function: str) -> Iterator[tuple[str, ast.ExceptHandler]]:
            for child in ast.iter_child_nodes(node):
                if isinstance(child, ast.ExceptHandler):
                    yield function, child
                named = isinstance(child, (ast.FunctionDef, ast.AsyncFunctionDef))
                yield from walk(child, child.name if named else function)

        return walk(self.tree, "<module>")


def product() -> Iterator[Module]:
    """Every Python file but the tests, whatever folder it is in."""
    for file in sorted(ROOT.rglob("*.py")):
        parts = file.relative_to(ROOT).parts
        environment = any(ROOT.joinpath(*parts[:depth], "pyvenv.cfg").exists() for depth in range(1, len(parts)))
        if parts[0] not in {"tests", "build", "dist"} and not environment and not any(part.startswith(".") for part in parts):
            yield Module(file)


PRODUCT = list(product())
each_module = pytest.mark.parametrize("module", PRODUCT, ids=lambda module: module.path)


def layer(path: tuple[str, ...]) -> str | None:
    """The layer of a module, by its path in the plugin; None where the table does not mention it."""
    head, second = (*path, "", "")[:2]
    if head in {"settings", "telemetry", "hooks"}:
        return head
    if head == "policies":
        if path[:len(WORKER)] == WORKER:
            return "worker"
        if second == "chain":
            return "chain"
        return "vocabulary" if second in VOCABULARY else second if second in POLICIES else None
    return "plugin" if path == () else None


def own(module: Module) -> tuple[str, ...]:
    return (*module.package, *([] if module.file.stem == "__init__" else [module.file.stem]))


def target(module: Module, level: int, name: str) -> tuple[str, ...]:
    """The path, in the plugin, of what a relative import names; a name in a module is cut off."""
    path = module.package[:len(module.package) - level + 1]
    for part in filter(None, name.split(".")):
        if not ((ROOT.joinpath(*path, part)).is_dir() or ROOT.joinpath(*path, f"{part}.py").exists()):
            break
        path = (*path, part)
    return path


@each_module
def test_every_module_is_in_the_table(module: Module) -> None:
    """A new folder or policy wants a decision on what it may import."""
    assert layer(own(module)) is not None


def test_every_policy_in_the_table_is_there() -> None:
    """The table has no leftovers."""
    names = {path.stem for path in (ROOT / "policies").iterdir() if path.suffix == ".py" or (path / "__init__.py").exists()}

    assert names - {"__init__"} == VOCABULARY - {""} | {"chain"} | set(POLICIES)


@each_module
def test_imports_of_ours_follow_the_table(module: Module) -> None:
    """Opinions do not know hooks, hooks do not know opinions, and no policy knows another."""
    mine = layer(own(module))
    allowed, _ = LAYERS.get(mine or "", (set(), set()))

    found = {target(module, level, name) for level, name in module.imports() if level}

    assert {path for path in found if layer(path) not in allowed} == set()


@each_module
def test_imports_of_ours_are_relative(module: Module) -> None:
    """ComfyUI imports the plugin under its folder's path: an absolute name of ours is somebody else's module."""
    ours = {"residency", *(path.stem for path in ROOT.iterdir() if path.suffix == ".py" or (path / "__init__.py").exists())}

    assert {name for level, name in module.imports() if not level and name.split(".")[0] in ours} == set()


@each_module
def test_imports_of_others_follow_the_table(module: Module) -> None:
    """Only `hooks/` and the worker know ComfyUI; policies know torch, files and numbers; the rest is the standard library."""
    mine = layer(own(module))
    _, allowed = LAYERS.get(mine or "", (set(), set()))
    if allowed is None:
        return

    found = {name.split(".")[0] for level, name in module.imports() if not level} - set(sys.stdlib_module_names)

    assert found - allowed - ALONE.get(module.path, set()) == set()
    assert allowed & (HOST | {"wrapt"}) == ({"comfy"} if mine == "worker" else set())


@pytest.mark.parametrize("module", [module for module in PRODUCT if module.package[:1] == ("policies",)
                                    and module.package[:len(WORKER)] != WORKER],
                         ids=lambda module: module.path)
def test_policies_read_nothing_of_the_hosts_objects(module: Module) -> None:
    """A policy that reads a patcher's fields knows the host, whatever it imports."""
    nodes = list(ast.walk(module.tree))
    read = {node.attr for node in nodes if isinstance(node, ast.Attribute)}
    read |= {str(argument.value) for node in nodes if isinstance(node, ast.Call) and isinstance(node.func, ast.Name)
             and node.func.id in {"getattr", "hasattr", "setattr"} for argument in node.args[1:2]
             if isinstance(argument, ast.Constant)}

    assert read & HOST_ATTRIBUTES == set()


@each_module
def test_modules_and_functions_are_short(module: Module) -> None:
    """A page for a module, a screen for a function; the exceptions are listed above."""
    assert len(module.file.read_text(encoding="utf-8").splitlines()) <= LONGEST_MODULE

    too_long = {name: lines for name, lines in module.functions()
                if lines > LONGER_FUNCTIONS.get((module.path, name), LONGEST_FUNCTION)}

    assert too_long == {}


def caught(handler: ast.ExceptHandler) -> set[str]:
    kinds = handler.type.elts if isinstance(handler.type, ast.Tuple) else [handler.type]
    return {kind.id for kind in kinds if isinstance(kind, ast.Name)}


def test_broad_excepts_stand_where_failing_open_needs_them() -> None:
    """Anywhere else a broad `except` hides a bug; the list is exactly those that there are."""
    found = {(module.path, function) for module in PRODUCT for function, handler in module.handlers()
             if "Exception" in caught(handler)}

    assert found == BROAD


def _raises(body: list[ast.stmt]) -> bool:
    return isinstance(body[-1], ast.Raise) and body[-1].exc is None


@each_module
def test_cancel_is_never_swallowed(module: Module) -> None:
    """ComfyUI's Cancel is a BaseException: whoever catches those raises them again, and nothing is caught without a name."""
    swallowed = [handler.lineno for _, handler in module.handlers()
                 if handler.type is None or ("BaseException" in caught(handler) and not _raises(handler.body))]

    assert swallowed == []


def texts() -> list[Path]:
    kinds = {".py", ".md", ".toml", ".txt", ".cpp", ".sh", ".yml", ".yaml"}
    folders = ("hooks", "policies", "telemetry", "tests")
    files = [*ROOT.glob("*"), *(file for folder in folders for file in (ROOT / folder).rglob("*"))]
    return [file for file in sorted(files) if file.is_file() and (file.suffix in kinds or file.name == "Makefile")
            and file != Path(__file__)]


@pytest.mark.parametrize("words", [f"{ROOT}/".lower(), "shared/", "this session", "issue #"])
def test_the_project_speaks_of_itself_alone(words: str) -> None:
    """No file tells how or where it was written."""
    found = {file.relative_to(ROOT).as_posix() for file in texts() if words in file.read_text(encoding="utf-8").lower()}

    assert found == set()
