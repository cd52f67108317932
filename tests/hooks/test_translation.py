"""What each real hook makes of a call, and of a changed request; the host's function is a stand-in of the same shape."""
from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import comfy.clip_vision
import comfy.controlnet
import comfy.model_management
import comfy.model_patcher
import comfy.ops
import comfy.sd
import comfy.utils
import execution
import folder_paths
import nodes
import pytest
import torch
from residency.hooks import HookRegistry, all_hooks, kept
from residency.hooks.gguf_weights.layout import wrap
from residency.hooks.gguf_weights.ops import Ops
from residency.policies.files.bank import Bank
from residency.policies.models import Recipe
from residency.policies.policy import Effect
from residency.policies.requests import (
    BuildModel,
    EmptyMemory,
    FillModule,
    FindFile,
    FreeMemory,
    ListFiles,
    LoadModel,
    MoveModule,
    MoveWeights,
    OffloadWeights,
    PatchWeight,
    PinMemory,
    PlaceModel,
    ReadWeights,
    ReleaseModel,
    Request,
    RunPrompt,
    WriteInPlace,
)
from residency.telemetry.sinks import Ring

CPU = torch.device("cpu")


class Prompts:
    """The listener and its chain, who remember what they were told."""

    def __init__(self) -> None:
        self.told: list[str] = []
        self.chain = self

    def prompt_starts(self) -> None:
        self.told.append("starts")

    def prompt_ended(self) -> dict[str, Effect]:
        self.told.append("ended")
        return {"zero_copy": Effect(predicted_bytes=5, observed_bytes=4)}

    def emptied(self) -> None:
        self.told.append("emptied")


class Host:
    """The real hooks, live; `request` is what the last call became, `calls` what reached the stand-ins."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.prompts = Prompts()
        self.hooks = {hook.name: hook for hook in all_hooks(Bank(), self.prompts)}
        self.request: Request | None = None
        self.calls: list[dict[str, Any]] = []
        self.amend: Callable[[Any], Request] = lambda request: request
        self.registry = HookRegistry((), self._answer)
        self._monkeypatch = monkeypatch

    def _answer(self, request: Request, host: Callable[[Request], Any]) -> Any:
        self.request = request
        return host(self.amend(request))

    def watch(self, name: str, answer: Any = None) -> None:
        """Installs one hook, over a stand-in that gives `answer`, or over the real function if that is `...`."""
        site = self.hooks[name].seam.resolve()
        shape = inspect.signature(site.original)

        def stand_in(*args: Any, **kwargs: Any) -> Any:
            self.calls.append(dict(shape.bind(*args, **kwargs).arguments))
            return answer

        stand_in.__signature__ = shape
        if answer is not ...:
            self._monkeypatch.setattr(site.owner, site.name, stand_in)
        self.registry = HookRegistry([self.hooks[name]], self._answer)
        self.registry.sync({self.hooks[name].asks})


@pytest.fixture
def host(monkeypatch: pytest.MonkeyPatch, ring: Ring) -> Iterator[Host]:
    host = Host(monkeypatch)
    yield host
    host.registry.remove_all()
    assert not ring.named("hook.failed")


@pytest.fixture
def patcher() -> Any:
    model = torch.nn.Sequential(torch.nn.Linear(4, 4, bias=False))
    model.device = CPU
    return comfy.model_patcher.ModelPatcher(model, load_device=CPU, offload_device=CPU)


class TestReading:
    @pytest.mark.parametrize(("device", "on_cpu"), [(None, True), (CPU, True), ("cpu", True), (torch.device("cuda:0"), False)])
    def test_a_file_is_read(self, host: Host, device: Any, on_cpu: bool) -> None:
        """A path is a string whatever it was, and no device means the CPU."""
        host.watch("comfy.utils.load_torch_file")

        comfy.utils.load_torch_file(Path("a.safetensors"), device=device)

        assert ReadWeights("a.safetensors", with_metadata=False, on_cpu=on_cpu) == host.request

    def test_a_policy_may_read_another_file(self, host: Host) -> None:
        """Path and metadata are the host's arguments; the rest stays."""
        host.watch("comfy.utils.load_torch_file")
        host.amend = lambda request: replace(request, path="b.safetensors", with_metadata=True)

        comfy.utils.load_torch_file("a.safetensors", safe_load=True)

        ((call,), expected) = (host.calls, {"ckpt": "b.safetensors", "safe_load": True, "return_metadata": True})
        assert expected == {name: call[name] for name in expected}


class TestLoading:
    @pytest.fixture(autouse=True)
    def folders(self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
        """A models folder of the test's own, where every name is a file."""
        paths = {kind: ([str(tmp_path / kind)], {".safetensors"})
                 for kind in ("checkpoints", "diffusion_models", "text_encoders", "vae", "vae_approx", "embeddings")}
        for kind, names in (("vae", ["sub/a", "b"]), ("vae_approx", ["taesd_encoder", "taesd_decoder", "taehv"])):
            for name in names:
                file = tmp_path / kind / f"{name}.safetensors"
                file.parent.mkdir(parents=True, exist_ok=True)
                file.touch()
        monkeypatch.setattr(folder_paths, "folder_names_and_paths", paths)
        monkeypatch.setattr(folder_paths, "filename_list_cache", {})
        return tmp_path

    def loaded(self, host: Host) -> LoadModel:
        assert isinstance(host.request, LoadModel)
        assert set(host.request.options["devices"]) == {"diffusion model", "text encoder", "VAE"}
        return host.request

    @pytest.mark.parametrize(("options", "weight_dtype"), [
        ({}, "default"), ({"dtype": torch.float8_e4m3fn}, "fp8_e4m3fn"), ({"dtype": torch.float8_e5m2}, "fp8_e5m2"),
        ({"dtype": torch.float8_e4m3fn, "fp8_optimizations": True}, "fp8_e4m3fn_fast"),
        ({"dtype": torch.float16}, None), ({"custom_operations": object}, None)])
    def test_a_diffusion_model(self, host: Host, folders: Path, options: Any, weight_dtype: str | None) -> None:
        """Its options are the request's; what the stock node has no word for cannot be asked of it."""
        host.watch("comfy.sd.load_diffusion_model")
        path = str(folders / "diffusion_models" / "sub" / "a.safetensors")

        comfy.sd.load_diffusion_model(path, options)

        request = self.loaded(host)
        assert (request.kind, request.paths, request.options["model_options"]) == ("diffusion model", (path,), options)
        assert request.recipe == (weight_dtype and Recipe("diffusion_models", (str(Path("sub", "a.safetensors")),),
                                                          weight_dtype=weight_dtype))

    @pytest.mark.parametrize(("flags", "stock"), [
        ({}, True), ({"output_clipvision": True}, False), ({"output_vae": False}, False)])
    def test_a_checkpoint(self, host: Host, folders: Path, flags: Any, stock: bool) -> None:
        """Each flag is an option."""
        host.watch("comfy.sd.load_checkpoint_guess_config")

        comfy.sd.load_checkpoint_guess_config(str(folders / "checkpoints" / "c"), embedding_directory=["e"], **flags)

        request = self.loaded(host)
        assert flags.items() <= request.options.items()
        assert request.options["embedding_directory"] == ["e"]
        assert request.recipe == (Recipe("checkpoints", ("c",)) if stock else None)

    @pytest.mark.parametrize(("options", "device"), [
        ({}, "default"), ({"load_device": CPU, "offload_device": CPU}, "cpu"), ({"load_device": CPU}, None)])
    def test_text_encoders(self, host: Host, folders: Path, options: Any, device: str | None) -> None:
        """Several files, in order; one that lies elsewhere cannot be asked for by name."""
        host.watch("comfy.sd.load_clip")
        paths = [str(folders / "text_encoders" / name) for name in "ab"]

        comfy.sd.load_clip(paths, ["e"], comfy.sd.CLIPType.FLUX, options)

        request = self.loaded(host)
        assert (request.kind, request.paths) == ("text encoder", tuple(paths))
        assert request.options["clip_type"] is comfy.sd.CLIPType.FLUX
        assert request.recipe == (device and Recipe("text_encoders", ("a", "b"), "flux", device))
        comfy.sd.load_clip([str(folders / "elsewhere" / "a")])
        assert self.loaded(host).recipe is None

    @pytest.mark.parametrize(("name", "files"), [
        ("sub/a.safetensors", ["vae/sub/a"]), ("taehv.safetensors", ["vae_approx/taehv"]),
        ("taesd", ["vae_approx/taesd_encoder", "vae_approx/taesd_decoder"])])
    def test_a_vae(self, host: Host, folders: Path, name: str, files: list[str]) -> None:
        """By the name on the stock node: one file, or an encoder and a decoder."""
        host.watch("nodes.VAELoader.load_vae")

        nodes.VAELoader().load_vae(name)

        request = self.loaded(host)
        assert request.paths == tuple(str(folders / f"{file}.safetensors") for file in files)
        assert request.recipe == Recipe("vaes", (name,))

    @pytest.mark.parametrize("name", ["pixel_space", "none.safetensors"])
    def test_a_vae_of_no_file_is_nothing_to_ask(self, host: Host, name: str) -> None:
        """One is made of nothing, the other is the host's to miss."""
        host.watch("nodes.VAELoader.load_vae")
        nodes.VAELoader().load_vae(name)
        assert host.request is None

    def test_a_model_that_is_wanted_alone_is_nothing_to_ask(self, host: Host) -> None:
        """A classic stand-in for a dynamic one, and whatever the host's factories load."""
        host.watch("comfy.sd.load_diffusion_model")
        comfy.sd.load_diffusion_model("a", {}, disable_dynamic=True)
        kept.Reload(comfy.sd.load_diffusion_model)("a")
        assert (host.request, len(host.calls)) == (None, 2)

    def test_files_are_listed_and_found(self, host: Host) -> None:
        """Old names of folders are the new ones."""
        host.watch("folder_paths.get_filename_list")
        folder_paths.get_filename_list("unet")
        assert ListFiles("diffusion_models") == host.request
        host.watch("folder_paths.get_full_path")
        folder_paths.get_full_path("vae", "a")
        assert FindFile("vae", "a") == host.request


class TestBuilding:
    @pytest.mark.parametrize(("name", "call", "kind"), [
        ("comfy.sd.load_diffusion_model_state_dict", lambda: comfy.sd.load_diffusion_model_state_dict({}), "diffusion model"),
        ("comfy.sd.load_state_dict_guess_config", lambda: comfy.sd.load_state_dict_guess_config({}), "checkpoint"),
        ("comfy.sd.load_text_encoder_state_dicts", lambda: comfy.sd.load_text_encoder_state_dicts([{}]), "text encoder"),
        ("comfy.sd.VAE.__init__", lambda: comfy.sd.VAE(sd={}), "VAE"),
        ("comfy.controlnet.load_controlnet_state_dict", lambda: comfy.controlnet.load_controlnet_state_dict({}), "ControlNet"),
        ("comfy.clip_vision.load_clipvision_from_sd", lambda: comfy.clip_vision.load_clipvision_from_sd({}), "CLIP vision"),
    ])
    def test_a_model_is_built(self, host: Host, ring: Ring, name: str, call: Callable[[], Any], kind: str) -> None:
        """Every kind has its name, and the building its seconds."""
        host.watch(name)

        call()

        assert BuildModel(kind) == host.request
        (event,) = ring.named("model.built")
        assert kind == event.fields["model"]
        assert 0 <= event.fields["seconds"] < 10

    @pytest.mark.parametrize(("name", "call"), [
        ("comfy.sd.load_diffusion_model_state_dict",
         lambda weights: comfy.sd.load_diffusion_model_state_dict(
             weights, model_options={"dtype": torch.float8_e4m3fn, "own": 1})),
        ("comfy.sd.load_text_encoder_state_dicts",
         lambda weights: comfy.sd.load_text_encoder_state_dicts([{}, weights], model_options={"own": 1})),
    ])
    def test_a_model_of_blocks_may_be_built_of_our_layers(self, host: Host, name: str, call: Callable[[Any], Any]) -> None:
        """A dtype for weights has no effect on blocks, and the user's other options stay."""
        host.watch(name)
        host.amend = lambda request: replace(request, bind_gguf=True)

        call({"weight": wrap(torch.zeros(2, 34, dtype=torch.uint8), 8, (2, 32))})

        assert isinstance(host.request, BuildModel)
        assert host.request.gguf
        assert {"own": 1, "custom_operations": Ops} == host.calls[0]["model_options"]

    def test_a_module_is_filled(self, host: Host) -> None:
        """Module, state dict and `assign` are those of the call."""
        host.watch("torch.nn.modules.module.Module.load_state_dict", ...)
        module, weights = torch.nn.Linear(2, 2), torch.nn.Linear(2, 2).state_dict()

        module.load_state_dict(weights)

        assert isinstance(host.request, FillModule)
        assert (module, weights, False) == (host.request.module, host.request.state_dict, host.request.assign)
        assert torch.equal(weights["weight"], module.weight)

    def test_a_policy_may_assign(self, host: Host) -> None:
        """The module then holds the tensors that the policy gave."""
        host.watch("torch.nn.modules.module.Module.load_state_dict", ...)
        module, weights = torch.nn.Linear(2, 2), torch.nn.Linear(2, 2).state_dict()
        host.amend = lambda request: replace(request, state_dict=weights, assign=True)

        module.load_state_dict({})

        assert weights["weight"].data_ptr() == module.weight.data_ptr()

    def test_only_the_hosts_own_kernels_are_castable(self, host: Host) -> None:
        """The host casts at use where its own class holds the weight as a kernel's operand."""
        host.watch("torch.nn.modules.module.Module.load_state_dict", ...)
        theirs, norm = comfy.ops.disable_weight_init.Linear(2, 2), comfy.ops.disable_weight_init.LayerNorm(2)
        plain = torch.nn.Linear(2, 2)
        theirs.load_state_dict(plain.state_dict())
        assert isinstance(host.request, FillModule)

        host.request.cast_at_use(theirs)

        assert (True, False, False) == tuple(map(host.request.castable, (theirs, norm, plain)))
        assert theirs.comfy_cast_weights


class TestPlacing:
    @pytest.mark.parametrize(("memory", "budget"), [(0, None), (64, 64.0)])
    def test_a_model_is_placed(self, host: Host, patcher: Any, memory: int, budget: float | None) -> None:
        """No limit is the host's 0 and our None."""
        host.watch("comfy.model_management.LoadedModel.model_load")
        loaded = comfy.model_management.LoadedModel(patcher)

        loaded.model_load(memory)

        assert isinstance(host.request, PlaceModel)
        assert (patcher.model, CPU, budget) == (host.request.weights.module, host.request.device, host.request.more_bytes)

    @pytest.mark.parametrize(("budget", "memory"), [(None, 0), (32.0, 32.0)])
    def test_a_policy_may_change_the_budget(self, host: Host, patcher: Any, budget: float | None, memory: float) -> None:
        """Our None is the host's 0 on the way back too."""
        host.watch("comfy.model_management.LoadedModel.model_load")
        host.amend = lambda request: replace(request, more_bytes=budget)

        comfy.model_management.LoadedModel(patcher).model_load(64)

        assert memory == host.calls[0]["lowvram_model_memory"]

    def test_a_model_that_is_gone_is_nobodys_question(self, host: Host, patcher: Any) -> None:
        """The host holds models weakly; what it does about a dead one is its own."""
        host.watch("comfy.model_management.LoadedModel.model_load")
        gone = comfy.model_management.LoadedModel(patcher)
        gone._model = lambda: None

        gone.model_load()

        assert host.request is None

    def test_telemetry_hears_of_a_model_whose_budget_changed(self, host: Host, ring: Ring, patcher: Any) -> None:
        """The host answers as before, and the line about it stays."""
        host.watch("comfy.model_management.LoadedModel.model_load", ...)
        host.amend = lambda request: replace(request, more_bytes=None)

        comfy.model_management.LoadedModel(patcher).model_load(64)

        assert 1 == len(ring.named("model.placed"))

    def test_telemetry_hears_of_what_moved(self, host: Host, ring: Ring, patcher: Any) -> None:
        """The first time, not while it stays, and again after it left."""
        host.watch("comfy.model_management.LoadedModel.model_load", ...)
        loaded = comfy.model_management.LoadedModel(patcher)

        loaded.model_load()
        loaded.model_load()
        assert 1 == len(ring.named("model.placed"))

        loaded.model_unload()
        loaded.model_load()
        assert 2 == len(ring.named("model.placed"))
        assert 64 == ring.named("model.placed")[1].fields["host_bytes"]

    def test_pinning_is_asked_about_where_the_host_pins(self, host: Host, monkeypatch: pytest.MonkeyPatch) -> None:
        """A host that pins nothing has no question."""
        host.watch("comfy.model_management.pin_memory")
        tensor = torch.zeros(1)

        monkeypatch.setattr(comfy.model_management, "MAX_PINNED_MEMORY", 0)
        comfy.model_management.pin_memory(tensor)
        assert host.request is None

        monkeypatch.setattr(comfy.model_management, "MAX_PINNED_MEMORY", 1)
        comfy.model_management.pin_memory(tensor)
        assert isinstance(host.request, PinMemory)
        assert tensor is host.request.tensor

    def test_a_write_names_the_module_that_holds_the_weight(self, host: Host) -> None:
        """The host names a parameter from the top of the model."""
        host.watch("comfy.utils.copy_to_param")
        model = torch.nn.Sequential(torch.nn.Linear(2, 2))

        comfy.utils.copy_to_param(model, "0.weight", torch.zeros(2, 2))

        assert WriteInPlace(model[0], "weight") == host.request

    @pytest.mark.parametrize(("kept", "key", "asked"), [(True, "0.weight", True), (True, "0.bias", False),
                                                        (False, "0.weight", False)])
    def test_a_patch_is_asked_about_where_the_files_format_is_kept(self, host: Host, kept: bool, key: str, asked: bool) -> None:
        """An ordinary weight is the host's to patch."""
        host.watch("comfy.model_patcher.ModelPatcher.patch_weight_to_device")
        model = torch.nn.Sequential(Ops.Linear(32, 2, dtype=torch.bfloat16))
        weight = torch.zeros(2, 32) if kept else torch.zeros(2, 32, dtype=torch.bfloat16)
        model.load_state_dict({"0.weight": weight, "0.bias": torch.zeros(2)})
        patcher = comfy.model_patcher.ModelPatcher(model, CPU, CPU)
        patcher.patches = {"0.weight": [], "0.bias": []}

        patcher.patch_weight_to_device(key)
        assert asked == isinstance(host.request, PatchWeight)

        host.request = None
        patcher.patch_weight_to_device(key, return_weight=True)
        assert host.request is None

    def test_a_packs_patcher_need_not_copy_what_stays_mapped(self, host: Host, patcher: Any) -> None:
        """It is told in its own words while it loads; the host's patcher has no such question."""
        host.watch("comfy.model_patcher.ModelPatcher.load")
        patcher.load(CPU)
        assert isinstance(host.request, MoveWeights)

        host.request.weights.keep_mapping()
        assert not hasattr(patcher, "mmap_released")
        patcher.mmap_released = False
        host.request.weights.keep_mapping()

        assert patcher.mmap_released


class TestReleasing:
    def test_all_weights_leave(self, host: Host, patcher: Any) -> None:
        """The device may be a name."""
        host.watch("comfy.model_patcher.ModelPatcher.unpatch_model")

        patcher.unpatch_model("cpu")

        assert isinstance(host.request, OffloadWeights)
        assert CPU == host.request.device

    @pytest.mark.parametrize(("name", "call"), [
        ("comfy.model_patcher.ModelPatcher.unpatch_model", lambda patcher: patcher.unpatch_model(None, unpatch_weights=False)),
        ("comfy.model_patcher.ModelPatcher.detach", lambda patcher: patcher.detach(unpatch_all=False)),
    ])
    def test_clones_that_leave_the_weights_alone_are_nobodys_question(
            self, host: Host, patcher: Any, name: str, call: Callable[[Any], Any]) -> None:
        """They come and go all the time, in any thread."""
        host.watch(name)

        call(patcher)

        assert host.request is None
        assert 1 == len(host.calls)

    @pytest.mark.parametrize(("args", "device"), [((CPU,), CPU), (("meta",), torch.device("meta")), ((torch.float16,), None)])
    def test_a_module_moves(self, host: Host, args: tuple[Any, ...], device: torch.device | None) -> None:
        """Every way of naming a device is understood; a change of dtype alone is no move."""
        host.watch("torch.nn.modules.module.Module.to", ...)
        module = torch.nn.Linear(2, 2)

        module.to(*args)

        assert (MoveModule(module, device) if device else None) == host.request

    def test_telemetry_hears_of_the_bytes_that_left(self, host: Host, ring: Ring, patcher: Any) -> None:
        """A model that was on the device is told of once; one that was not, not at all."""
        host.watch("comfy.model_patcher.ModelPatcher.detach", ...)
        comfy.model_management.LoadedModel(patcher).model_load()

        patcher.detach()
        patcher.detach()

        assert isinstance(host.request, ReleaseModel)
        (event,) = ring.named("model.released")
        assert (64, False) == (event.fields["bytes"], event.fields["partly"])

    @pytest.mark.parametrize(("unloaded", "said"), [([], 0), ([object()], 1)])
    def test_telemetry_hears_of_room_that_was_made(self, host: Host, ring: Ring, unloaded: list[Any], said: int) -> None:
        """Most calls find room enough and are not worth a line."""
        host.watch("comfy.model_management.free_memory", unloaded)

        comfy.model_management.free_memory(7, CPU)

        assert FreeMemory("cpu", 7.0) == host.request
        assert said == len(ring.named("memory.freed"))


class TestPrompts:
    def executor(self) -> Any:
        executor = object.__new__(execution.PromptExecutor)
        executor.success = False
        executor.caches = object()
        return executor

    def test_a_prompt_runs(self, host: Host, ring: Ring) -> None:
        """The listener hears first, the chain after; the event carries what each policy said and found."""
        host.watch("execution.PromptExecutor.execute")
        executor = self.executor()

        executor.execute({}, "prompt-1")

        assert isinstance(host.request, RunPrompt)
        assert "prompt-1" == host.request.prompt
        assert ["starts", "ended"] == host.prompts.told
        (event,) = ring.named("prompt.finished")
        assert ("prompt-1", False) == (event.fields["prompt"], event.fields["ok"])
        assert {"zero_copy": {"predicted_bytes": 5, "observed_bytes": 4}} == event.fields["policies"]

    def test_memory_is_emptied(self, host: Host, ring: Ring) -> None:
        """`POST /free` reaches what the policies keep."""
        host.watch("execution.PromptExecutor.reset")

        self.executor().reset()

        assert isinstance(host.request, EmptyMemory)
        assert ["emptied"] == host.prompts.told
        assert 1 == len(ring.named("memory.emptied"))

    def test_models_that_are_built_anew_empty_nothing(self, host: Host, ring: Ring) -> None:
        """The host forgets its outputs, and what policies keep of other files stays. The user's wish afterwards is heard."""
        host.watch("execution.PromptExecutor.execute")
        executor = self.executor()
        executor.execute({}, "prompt-1")
        assert isinstance(host.request, RunPrompt)
        rebuild, host.prompts.told, host.calls = host.request.rebuild_models, [], []
        host.registry.remove_all()
        host.watch("execution.PromptExecutor.reset")

        rebuild()

        assert [executor] == [call["self"] for call in host.calls]
        assert ([], []) == (host.prompts.told, ring.named("memory.emptied"))
        executor.reset()
        assert ["emptied"] == host.prompts.told

    def test_an_executor_that_is_being_made_empties_nothing(self, host: Host, ring: Ring) -> None:
        """It is made in the worker's thread, maybe after models were loaded at the start."""
        host.watch("execution.PromptExecutor.reset")

        object.__new__(execution.PromptExecutor).reset()

        assert [] == host.prompts.told
        assert [] == ring.named("memory.emptied")
