"""What the hooks rely on, in the sources of every supported ComfyUI. Nothing of them is imported."""
from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import pytest
from residency.hooks import all_hooks
from residency.hooks.seam import Seam
from residency.policies.files.bank import Bank
from support.loading import ROOT, TREES, VERSIONS

Function = (ast.FunctionDef, ast.AsyncFunctionDef)


class Listener:
    """Nobody to tell."""

    chain = None

    def prompt_starts(self) -> None: ...


SEAMS = [hook.seam for hook in all_hooks(Bank(), Listener()) if hook.seam.module.split(".")[0] not in ("torch", "logging")]
FUNCTIONS = {seam.path: seam for seam in SEAMS if "." not in seam.path}
METHODS = {seam.path: seam for seam in SEAMS if "." in seam.path}

# Copies of a function that no hook needs to reach: "module:name" of the copy, and why.
COPIES_THAT_DO_NOT_MATTER: dict[str, str] = {}
# Functions that the host keeps with a model, to load it once more (`cached_patcher_init`): `hooks.kept.Reload` minds them.
FACTORIES = {"comfy.sd load_diffusion_model", "comfy.sd load_checkpoint_guess_config"}
# Functions that the host hands to an executor of wrappers at each call, by the name that is hooked.
EXECUTED = {"comfy.samplers _calc_cond_batch"}
# Classes of the host that override a hooked method, and which; the hook does not see their calls unless they call `super()`.
OVERRIDES = {
    "comfy.model_patcher:ModelPatcherDynamic": {"load", "partially_unload", "pin_weight_to_device", "unpatch_model"},
}
# What hooks read on the host's objects.
ATTRIBUTES = {
    ("comfy.model_patcher", "ModelPatcher"): (
        "model", "backup", "hook_backup", "hook_patches", "patches", "load_device", "offload_device", "pinned",
        "is_dynamic", "model_size", "loaded_size", "patches_uuid", "cached_patcher_init", "is_clip", "model_patches_to",
        "clone", "unpin_weight", "partially_unload", "partially_load", "unpatch_hooks"),
    ("comfy.sd", "VAE"): ("patcher", "first_stage_model", "device", "vae_dtype", "memory_used_encode",
                          "memory_used_decode"),
    ("comfy.sd", "CLIP"): ("patcher", "clone"),
    ("nodes", "VAELoader"): ("image_taes", "video_taes", "vae_list"),
    ("comfy.ops", "disable_weight_init"): ("Linear", "Embedding"),
    ("comfy.model_management", "LoadedModel"): ("model", "device", "currently_used"),
    ("comfy.samplers", "CFGGuider"): ("model_patcher",),
    ("comfy.model_base", "BaseModel"): ("current_patcher",),
    ("comfy.ops", "CastWeightBiasOp"): ("comfy_cast_weights",),
    ("execution", "PromptExecutor"): ("success", "reset", "caches"),
}


@dataclass(frozen=True)
class Tree:
    """The sources of one ComfyUI."""

    folder: Path

    def files(self, pattern: str) -> Iterator[tuple[str, Path]]:
        """(module, file) where a pattern occurs, without the host's tests and the packs."""
        for file, text in texts(self.folder).items():
            if re.search(pattern, text):
                parts = file.relative_to(self.folder).with_suffix("").parts
                yield ".".join(parts[:-1] if parts[-1] == "__init__" else parts), file

    def module(self, name: str) -> list[ast.stmt]:
        stem = self.folder.joinpath(*name.split("."))
        file = next((file for file in (stem.with_suffix(".py"), stem / "__init__.py") if file.exists()), None)
        assert file is not None, f"no module {name}"
        return parsed(file).body

    def find(self, module: str, path: str) -> ast.stmt | None:
        """The definition of a function, a class, a method or a variable."""
        body: list[ast.stmt] = self.module(module)
        found = None
        for part in path.split("."):
            found = next((node for node in flat(body) if part in names(node)), None)
            body = getattr(found, "body", [])
        return found


@cache
def texts(folder: Path) -> dict[Path, str]:
    elsewhere = {"tests", "tests-unit", "custom_nodes", "script_examples", ".ci"}
    return {file: file.read_text(encoding="utf-8") for file in sorted(folder.rglob("*.py"))
            if file.relative_to(folder).parts[0] not in elsewhere}


@cache
def parsed(file: Path) -> ast.Module:
    return ast.parse(file.read_text(encoding="utf-8"))


def flat(body: list[ast.stmt]) -> Iterator[ast.stmt]:
    """Statements, and those under an `if` or a `try` or a `with`: what runs when the module is imported."""
    for node in body:
        yield node
        if not isinstance(node, (*Function, ast.ClassDef)):
            for branch in ("body", "orelse", "finalbody"):
                yield from flat(getattr(node, branch, []))
            for handler in getattr(node, "handlers", []):
                yield from flat(handler.body)


def names(node: ast.stmt) -> set[str]:
    """The names that a statement defines."""
    if isinstance(node, (*Function, ast.ClassDef)):
        return {node.name}
    if isinstance(node, (ast.Import, ast.ImportFrom)):
        return {alias.asname or alias.name for alias in node.names}
    targets = node.targets if isinstance(node, ast.Assign) else [node.target] if isinstance(node, ast.AnnAssign) else []
    return {target.id for target in targets if isinstance(target, ast.Name)}


def parameters(node: ast.stmt | None) -> list[str]:
    assert isinstance(node, Function)
    given = [*node.args.posonlyargs, *node.args.args, node.args.vararg, *node.args.kwonlyargs, node.args.kwarg]
    return [argument.arg for argument in given if argument is not None]


def dotted(node: ast.expr) -> str:
    """`a.b.c` of an attribute access; empty for anything else."""
    if isinstance(node, ast.Name):
        return node.id
    head = dotted(node.value) if isinstance(node, ast.Attribute) else ""
    return f"{head}.{node.attr}" if head and isinstance(node, ast.Attribute) else ""


@pytest.fixture(params=VERSIONS)
def tree(request: pytest.FixtureRequest) -> Tree:
    folder = TREES / request.param
    if not folder.is_dir():
        pytest.skip(f"no ComfyUI {request.param} in {TREES}; COMFYUI_TREES may name another folder")
    return Tree(folder)


@pytest.mark.parametrize("seam", SEAMS, ids=lambda seam: seam.name)
def test_every_seam_is_in_every_version(tree: Tree, seam: Seam) -> None:
    """The function is defined where the seam looks, with every parameter that its hook uses by name."""
    node = tree.find(seam.module, seam.path)
    if seam.optional and node is None:
        return
    found = parameters(node)

    assert [need for need in seam.needs if need not in found] == []


def test_an_optional_seam_is_in_some_version_and_not_in_another() -> None:
    """In none it is a leftover or a typo, in all it is not optional."""
    trees = [Tree(TREES / version) for version in VERSIONS if (TREES / version).is_dir()]
    if len(trees) < len(VERSIONS):
        pytest.skip(f"not all supported versions are in {TREES}")

    for seam in SEAMS:
        if seam.optional:
            assert {tree.find(seam.module, seam.path) is None for tree in trees} == {True, False}


def imported_from(node: ast.ImportFrom, module: str, is_package: bool) -> str:
    """The absolute name of what `from … import` names."""
    if not node.level:
        return node.module or ""
    package = module.split(".") if is_package else module.split(".")[:-1]
    package = package[:len(package) - node.level + 1]
    return ".".join([*package, *filter(None, [node.module])])


def copies(tree: Tree) -> Iterator[tuple[Seam, str]]:
    """Every place that keeps a hooked function under a name of its own, from the time it is imported."""
    for module, file in tree.files(rf"import\b[^)]*?\b({'|'.join(FUNCTIONS)})\b"):
        for node in flat(parsed(file).body):
            if isinstance(node, ast.ImportFrom):
                source = imported_from(node, module, file.name == "__init__.py")
                for alias in node.names:
                    seam = FUNCTIONS.get(alias.name)
                    if seam is not None and source == seam.module:
                        yield seam, f"{module}:{alias.asname or alias.name}"


def test_every_copy_of_a_hooked_function_is_an_alias(tree: Tree) -> None:
    """A module that imported the name holds the function itself, which a wrapper on the original does not reach."""
    unlisted = {copy for seam, copy in copies(tree) if copy not in seam.aliases}

    assert unlisted - set(COPIES_THAT_DO_NOT_MATTER) == set()


def test_every_alias_is_somewhere() -> None:
    """An alias that no version has any more is a leftover."""
    trees = [Tree(TREES / version) for version in VERSIONS if (TREES / version).is_dir()]
    if len(trees) < len(VERSIONS):
        pytest.skip(f"not all supported versions are in {TREES}")

    found = {copy for tree in trees for _, copy in copies(tree)}

    assert {alias for seam in SEAMS for alias in seam.aliases} | set(COPIES_THAT_DO_NOT_MATTER) == found


def test_no_hooked_function_is_kept_as_a_value(tree: Tree) -> None:
    """The host calls what it hooks by its full name each time: no default, table or variable holds the function."""
    kept = set()
    for module, file in tree.files(rf"\b({'|'.join(FUNCTIONS)})\b(?!\()"):
        called = {id(node.func) for node in ast.walk(parsed(file)) if isinstance(node, ast.Call)}
        for node in ast.walk(parsed(file)):
            if not isinstance(node, (ast.Attribute, ast.Name)) or not isinstance(node.ctx, ast.Load) or id(node) in called:
                continue
            *owner, name = dotted(node).split(".")
            seam = FUNCTIONS.get(name)
            if seam is not None and (owner[-1:] == seam.module.split(".")[-1:] or (not owner and module == seam.module)):
                kept.add(f"{module} {name}")

    assert kept <= FACTORIES | EXECUTED


def test_every_override_of_a_hooked_method_is_known(tree: Tree) -> None:
    """A subclass with a method of its own dodges the wrap on its base: a new one wants a look."""
    hooked: dict[str, set[str]] = {}
    for path in METHODS:
        owner, name = path.split(".")
        hooked.setdefault(owner, set()).add(name)
    hooked["ModelPatcherDynamic"] = hooked["ModelPatcher"]
    found = {}
    for module, file in tree.files(rf"class \w+\([^)]*\b({'|'.join(hooked)})\b"):
        for node in ast.walk(parsed(file)):
            if isinstance(node, ast.ClassDef):
                methods = {child.name for child in node.body if isinstance(child, Function)}
                bases = [dotted(base).split(".")[-1] for base in node.bases]
                overridden = methods & set().union(*(hooked.get(base, set()) for base in bases)) - {"__init__"}
                if overridden:
                    found[f"{module}:{node.name}"] = overridden

    assert found == OVERRIDES


# What older versions lack, and the hooks do without.
ABSENT = {"0.16.3": {("comfy.memory_management", "TensorFileSlice"), ("comfy.model_management", "is_oom")}}


def relied_on() -> set[tuple[str, str]]:
    """(module, name) of everything that `hooks/` takes from a module of the host."""
    found = set()
    for file in sorted((ROOT / "hooks").rglob("*.py")):
        nodes = list(ast.walk(parsed(file)))
        modules = {alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names}
        modules = {name for name in modules if (TREES / VERSIONS[-1] / name.split(".")[0]).is_dir()
                   or (TREES / VERSIONS[-1] / f"{name}.py").exists()}
        for node in nodes:
            if isinstance(node, ast.Attribute) and dotted(node.value) in modules and dotted(node) not in modules:
                found.add((dotted(node.value), node.attr))
            elif (isinstance(node, ast.Call) and dotted(node.func) == "getattr" and dotted(node.args[0]) in modules
                  and isinstance(node.args[1], ast.Constant)):
                found.add((dotted(node.args[0]), str(node.args[1].value)))
    return found


def test_finds_what_the_hooks_rely_on() -> None:
    """The search below sees plain attributes and `getattr`."""
    assert {
        ("comfy.memory_management", "aimdo_enabled"),
        ("comfy.utils", "DISABLE_MMAP"), ("comfy.utils", "MMAP_TORCH_FILES"),
        ("comfy.model_management", "MAX_PINNED_MEMORY"), ("comfy.model_management", "get_torch_device"),
        ("comfy.model_management", "InterruptProcessingException"),
        ("comfy.model_management", "throw_exception_if_processing_interrupted"),
        ("comfy.ops", "CastWeightBiasOp"), ("comfy.ops", "manual_cast"), ("comfy.ops", "cast_bias_weight"),
        ("comfy.model_patcher", "LowVramPatch"), ("comfy.lora", "calculate_weight"), ("nodes", "NODE_CLASS_MAPPINGS"),
        ("folder_paths", "get_user_directory"),
    } <= relied_on()


def test_every_name_that_hooks_use_is_in_every_version(tree: Tree) -> None:
    """A name that went would raise in the middle of a load, or quietly turn a policy off."""
    missing = {(module, name) for module, name in relied_on() if tree.find(module, name) is None}
    assert missing == ABSENT.get(tree.folder.name, set())


def attributes(tree: Tree, module: str, name: str) -> set[str]:
    """What the instances of a class have: methods, class variables, and what is assigned to `self`."""
    node = tree.find(module, name)
    assert isinstance(node, ast.ClassDef), f"{module} has no class {name}"
    own = set().union(*(names(child) for child in node.body))
    assigned = {child.attr for child in ast.walk(node) if isinstance(child, ast.Attribute)
                and isinstance(child.ctx, ast.Store) and dotted(child.value) == "self"}
    return own | assigned


@pytest.mark.parametrize(("module", "name"), ATTRIBUTES, ids=".".join)
def test_every_attribute_that_hooks_read_is_in_every_version(tree: Tree, module: str, name: str) -> None:
    """The host's objects are read in few places, all in `hooks/`."""
    assert set(ATTRIBUTES[module, name]) - attributes(tree, module, name) == set()
