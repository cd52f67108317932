"""What of a sampling step another process can compute, and what it is told of the model: on a real model of the host's."""
from __future__ import annotations

import gc
import threading
import uuid
import weakref
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import comfy.hooks
import comfy.model_management
import comfy.model_sampling
import comfy.patcher_extension
import comfy.samplers
import numpy
import pytest
import torch
from residency.hooks import HookRegistry, sampling
from residency.hooks.remote import RemoteModel, remote_of
from residency.policies.requests import Request
from residency.policies.sampling import BatchRoom, Predict, SampleStep
from residency.telemetry.sinks import Ring
from support import tiny

CPU = torch.device("cpu")
SIGMA = 3.0


class Host:
    """The hooks over the host's own functions; `requests` is what calls became, and `act` may answer them."""

    def __init__(self) -> None:
        self.requests: list[Request] = []
        self.act: Callable[[Request, Callable[[Request], Any]], Any] = lambda request, host: host(request)
        self.registry = HookRegistry(sampling.HOOKS, self._answer)

    def _answer(self, request: Request, host: Callable[[Request], Any]) -> Any:
        self.requests.append(request)
        return self.act(request, host)

    def of(self, kind: type[Any]) -> Any:
        """The only one of its kind."""
        (found,) = (request for request in self.requests if type(request) is kind)
        return found


@pytest.fixture
def host(ring: Ring) -> Iterator[Host]:
    host = Host()
    host.registry.sync({SampleStep, Predict, BatchRoom})
    with torch.inference_mode():
        yield host
    host.registry.remove_all()
    comfy.model_management.current_loaded_models.clear()
    assert not ring.named("hook.failed")


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """The model is too small for several."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def original() -> Any:
    return tiny.patcher()


@pytest.fixture
def patcher(original: Any) -> Iterator[Any]:
    """Ready to sample."""
    made = original.clone()
    yield ready(made)
    made.patch_hooks(None)
    made.unpatch_model()
    made.model.current_patcher = None


def ready(patcher: Any) -> Any:
    with torch.inference_mode():
        comfy.model_management.load_models_gpu([patcher])
        patcher.pre_run()
    return patcher


def predict(patcher: Any, **options: Any) -> torch.Tensor:
    answer: torch.Tensor = patcher.model._apply_model(**tiny.arguments(**options))
    return answer


def step(patcher: Any, conds: list[Any], rows: int = 2, **options: Any) -> list[torch.Tensor]:
    x = tiny.arguments(rows)["x"]
    answer: list[torch.Tensor] = comfy.samplers._calc_cond_batch(
        patcher.model, conds, x, torch.full((rows,), SIGMA), {"transformer_options": {}, **options})
    return answer


class TestPredicting:
    def test_it_has_all_arguments_by_name(self, host: Host, patcher: Any) -> None:
        """However the host passes them; the answer is the host's."""
        given = tiny.arguments(cond_or_uncond=[0])
        expected = patcher.model._apply_model(given["x"], given["t"], None, given["c_crossattn"], None,
                                              given["transformer_options"], extra=None)
        found = host.of(Predict)
        assert found.x is given["x"]
        assert found.rest == {"t": given["t"], "c_concat": None, "c_crossattn": given["c_crossattn"], "control": None,
                              "transformer_options": {"cond_or_uncond": [0]}, "extra": None}
        assert found.remote.module is patcher.model
        assert torch.equal(expected, predict(patcher))

    @pytest.mark.parametrize("options", [
        {}, {"cond_or_uncond": [0, 1], "uuids": [uuid.UUID(int=1)], "sigmas": torch.ones(2), "sample_sigmas": torch.ones(3)},
        {"rope_options": {"scale_x": 1.0, "names": ["a", b"b", None, True, (1, 2), {3}]}},
        {"dtype": torch.float16, "device": CPU},
        {"step": numpy.float32(1.0)}, {"patches": {}, "patches_replace": {}}, {"wrappers": {}, "callbacks": {}},
        {"wrappers": {"outer_sample": {"pack": [print]}, "apply_model": {"pack": [print]}}},
        {"callbacks": {"on_pre_run": {"pack": [print]}}},
        {"wrappers": {"diffusion_model": {"pack": []}}},
    ], ids=str)
    def test_nobody_takes_part(self, host: Host, patcher: Any, options: dict[str, Any]) -> None:
        """Plain values, empty places for patches, and what the host has called already: that is not sent along."""
        predict(patcher, **options)
        found = host.of(Predict)
        assert not found.guests
        assert set(found.rest["transformer_options"]) == set(options) - {"wrappers", "callbacks"}

    @pytest.mark.parametrize("options", [
        {"patches": {"attn2_patch": [lambda q, k, v, more: (q, k, v)]}},
        {"patches_replace": {"attn1": {("middle", 0, 9): lambda *args: None}}},
        {"a_packs_own": print}, {"a_packs_own": {"deep": [{"inside": object()}]}},
        {"optimized_attention_override": lambda function, *args, **kwargs: function(*args, **kwargs)},
    ], ids=lambda options: str(list(options)))
    def test_packs_take_part(self, host: Host, patcher: Any, options: dict[str, Any]) -> None:
        """What can be called is called in the step, as far as anybody knows; it is sent along."""
        predict(patcher, **options)
        found = host.of(Predict)
        assert found.guests
        assert set(found.rest["transformer_options"]) == set(options)

    def test_wrappers_of_the_diffusion_model_take_part(self, host: Host, patcher: Any) -> None:
        """They alone are sent along, of all wrappers."""
        calls: list[str] = []

        def wrapper(executor: Any, *args: Any, **kwargs: Any) -> Any:
            calls.append("wrapped")
            return executor(*args, **kwargs)

        wrappers = {"diffusion_model": {"pack": [wrapper]}, "outer_sample": {"pack": [print]}}
        given = {"wrappers": wrappers}
        predict(patcher, **given)
        found = host.of(Predict)
        assert found.guests
        assert found.rest["transformer_options"] == {"wrappers": {"diffusion_model": {"pack": [wrapper]}}}
        assert (calls, set(wrappers)) == (["wrapped"], {"diffusion_model", "outer_sample"})

    @pytest.mark.parametrize(("change", "guests"), [
        (lambda patcher: patcher.add_object_patch("diffusion_model.out.2", torch.nn.Identity()), ("diffusion_model.out.2",)),
        (lambda patcher: patcher.add_object_patch("model_sampling", patcher.model.model_sampling), ()),
        (lambda patcher: patcher.add_weight_wrapper(tiny.KEYS[0], print), (tiny.KEYS[0],)),
        (lambda patcher: patcher.set_injections("pack", [comfy.patcher_extension.PatcherInjection(print, print)]), ("pack",)),
        (lambda patcher: patcher.add_patches(tiny.difference(patcher, 1)), ()),
        (lambda patcher: patcher.set_attachments("pack", object()), ()),
    ], ids=["layer", "schedule", "weight wrapper", "injection", "lora", "attachment"])
    def test_what_is_patched_beside_the_options(self, host: Host, original: Any, change: Any, guests: tuple[str, ...]) -> None:
        """Layers that packs replaced may do anything; weights cannot."""
        patched = original.clone()
        change(patched)
        original.model.current_patcher = patched
        host.act = lambda request, ask: "not computed"
        assert predict(patched) == "not computed"
        original.model.current_patcher = None
        assert host.of(Predict).guests == guests

    @pytest.mark.parametrize(("value", "name"), [
        (print, "builtins.print"), (torch.nn.Identity(), "torch.nn.modules.linear.Identity"), (uuid, "builtins.module"),
        ("".__len__, "str.__len__"), (torch.nn.Identity, "torch.nn.modules.linear.Identity"),
    ], ids=["function", "object", "module", "without a module", "class"])
    def test_packs_are_named(self, host: Host, patcher: Any, value: Any, name: str) -> None:
        """By what they put there; two of a kind are one."""
        predict(patcher, first=value, second=[value])
        (found,) = host.of(Predict).guests
        assert found.endswith(name)

    def test_a_model_that_nobody_samples_is_left_alone(self, host: Host, original: Any, patcher: Any) -> None:
        """Without a patcher, or with one that is another model's."""
        for current in (None, tiny.patcher(9)):
            original.model.current_patcher = current
            predict(patcher)
        assert host.requests == []

    def test_what_predicts_otherwise_is_no_remote(self) -> None:
        """Text encoders, a pack's own objects."""
        assert remote_of(None) is None
        assert remote_of(comfy.model_patcher.ModelPatcher(torch.nn.Linear(2, 2), CPU, CPU)) is None
        assert remote_of(object()) is None


class TestSteps:
    CONDS = [tiny.conditioning(1), tiny.conditioning(2)]

    def branches(self, host: Host, patcher: Any, conds: list[Any], **options: Any) -> Any:
        """Of the step, which is not computed."""
        host.act = lambda request, ask: "not computed"
        assert step(patcher, conds, **options) == "not computed"
        return host.of(SampleStep).branches()

    @pytest.mark.parametrize(("conds", "expected"), [
        ([tiny.conditioning(1), tiny.conditioning(2)], [0, 1]), ([tiny.conditioning(1), None, tiny.conditioning(2)], [0, 2]),
        ([tiny.conditioning(1), []], []), ([tiny.conditioning(1)], []), ([None, None], []), ([], []),
        ([tiny.conditioning(1, control=None, hooks=None), tiny.conditioning(2)], [0, 1]),
        ([tiny.conditioning(1, control=object()), tiny.conditioning(2)], []),
        ([tiny.conditioning(1), tiny.conditioning(2) + tiny.conditioning(3, hooks=object())], []),
        ([tiny.conditioning(1, default=True), tiny.conditioning(2)], []),
    ], ids=["two", "one is none", "one is empty", "one", "none", "no conditioning", "nothing of it", "control", "hooks",
            "default"])
    def test_a_branch_for_each_conditioning(self, host: Host, patcher: Any, conds: list[Any], expected: list[int]) -> None:
        """ControlNets and scheduled LoRA have a state that two threads would share; a default fills what others leave."""
        assert list(self.branches(host, patcher, conds)) == expected

    @pytest.mark.parametrize("options", [
        {"transformer_options": {"patches": {"attn1_patch": [print]}}}, {"transformer_options": {"a_packs_own": [print]}},
        {"model_function_wrapper": print}, {"transformer_options": {"wrappers": {"apply_model": {"pack": [print]}}}},
        {"multigpu_clones": {}},
    ], ids=str)
    def test_what_packs_take_part_in_is_one(self, host: Host, patcher: Any, options: dict[str, Any]) -> None:
        """They may count calls; ComfyUI's own way with several devices is another one."""
        assert self.branches(host, patcher, self.CONDS, **options) == {}

    @pytest.mark.parametrize("conds", [
        CONDS, [CONDS[0], None, CONDS[1]], [CONDS[0] + tiny.conditioning(4, strength=0.4), CONDS[1]],
        [tiny.conditioning(5, area=(4, 4, 2, 2)) + CONDS[0], CONDS[1]],
    ], ids=["two", "a gap", "combined", "area"])
    def test_together_they_are_the_hosts_own_answer(self, host: Host, patcher: Any, conds: list[Any]) -> None:
        """Up to the order of summing in batches of another size; where a branch has nothing to say it says zero."""
        def act(request: Request, ask: Callable[[Request], Any]) -> Any:
            return None if isinstance(request, SampleStep) else ask(request)

        expected = step(patcher, conds)
        host.requests.clear()
        host.act = act
        step(patcher, conds)
        branches = host.of(SampleStep).branches()
        for index, branch in branches.items():
            answer = branch()
            assert len(answer) == len(expected)
            assert all(not one.any() for place, one in enumerate(answer) if place != index)
            torch.testing.assert_close(answer[index], expected[index], rtol=1e-5, atol=1e-5)
        assert [one.any().item() for one in expected] == [index in branches for index in range(len(expected))]
        assert not torch.allclose(expected[0], expected[-1], atol=1e-2)  # the control: they are not all alike

    def test_a_policy_may_run_them_instead(self, host: Host, patcher: Any) -> None:
        """The host's own function is not asked then."""
        def act(request: Request, ask: Callable[[Request], Any]) -> Any:
            if isinstance(request, SampleStep):
                return ask(replace(request, run=lambda: ["instead"]))
            raise AssertionError("nothing is predicted")

        host.act = act
        assert step(patcher, self.CONDS) == ["instead"]

    def test_the_step_knows_its_model(self, host: Host, patcher: Any) -> None:
        """As another process would need it."""
        step(patcher, self.CONDS)
        found = host.of(SampleStep)
        assert found.alone
        assert found.remote.module is patcher.model
        assert all(request.remote.module is patcher.model for request in host.requests if isinstance(request, Predict))

    def test_the_host_asks_for_the_room_of_a_batch(self, host: Host, patcher: Any) -> None:
        """What it is told decides how many conditionings go together."""
        chunks: list[int] = []
        rooms = [2**40]

        def act(request: Request, ask: Callable[[Request], Any]) -> Any:
            if isinstance(request, BatchRoom):
                return rooms[0]
            if isinstance(request, Predict):
                chunks.append(len(request.rest["transformer_options"]["cond_or_uncond"]))
            return ask(request)

        host.act = act
        step(patcher, self.CONDS)
        rooms[0] = 0
        step(patcher, self.CONDS)
        assert chunks == [2, 1, 1]


class TestRemote:
    def test_the_model_as_built(self, patcher: Any) -> None:
        """No patcher and no notes of where its weights are, and yet its own layers; the model itself keeps both."""
        built = RemoteModel(patcher).as_built()
        assert type(built) is type(patcher.model)
        assert (built.current_patcher, built.device, built.model_loaded_weight_memory) == (None, None, 0)
        assert built.current_weight_patches_uuid is None
        assert built.diffusion_model is patcher.model.diffusion_model
        assert patcher.model.current_patcher is patcher
        assert patcher.model.device == CPU

    def test_every_note_is_one_that_the_host_makes(self, patcher: Any) -> None:
        """None is made up."""
        built, fresh = RemoteModel(patcher).as_built(), tiny.patcher().model
        assert set(vars(built)) == set(vars(patcher.model))
        for name in ("model_lowvram", "model_loaded_weight_memory", "lowvram_patch_counter", "current_weight_patches_uuid"):
            assert getattr(built, name) == getattr(fresh, name)

    def test_notes_of_dynamic_vram_stay_here(self, patcher: Any) -> None:
        """They are addresses of this process; afterwards the layers have them again, whatever happened meanwhile."""
        layer = patcher.model.diffusion_model.time_embed[0]
        notes = dict.fromkeys(("_v", "_v_signature", "_v_weight", "_pin", "_pins", "_pin_state", "_prefetch",
                               "weight_lowvram_function"), threading.Lock())
        vars(layer).update(notes, weight_comfy_model_dtype=torch.float32)
        before = dict(vars(layer))
        with pytest.raises(ZeroDivisionError), RemoteModel(patcher).unpaged():
            assert not set(notes) & set(vars(layer))
            assert vars(layer)["weight_comfy_model_dtype"] == torch.float32
            raise ZeroDivisionError
        assert vars(layer) == before

    @pytest.mark.parametrize("change", [
        lambda patcher: patcher.add_patches(tiny.difference(patcher, 1)),
        lambda patcher: patcher.add_object_patch("model_sampling", comfy.model_sampling.ModelSamplingDiscrete()),
        lambda patcher: patcher.add_weight_wrapper(tiny.KEYS[0], print),
        lambda patcher: patcher.set_injections("pack", [comfy.patcher_extension.PatcherInjection(print, print)]),
    ], ids=["lora", "object", "weight wrapper", "injection"])
    def test_the_token_changes_with_what_is_patched(self, original: Any, change: Callable[[Any], Any]) -> None:
        """In place, or in a clone."""
        patched = original.clone()
        remote = RemoteModel(patched)
        before = remote.token()
        assert RemoteModel(patched).token() == before
        change(patched)
        assert remote.token() != before

    def test_a_clones_token_is_its_own(self, original: Any) -> None:
        """It has its original's `patches_uuid`, and maybe other objects."""
        first, second = original.clone(), original.clone()
        assert first.patches_uuid == second.patches_uuid
        assert RemoteModel(first).token() != RemoteModel(second).token()

    def test_a_token_is_never_that_of_one_that_is_gone(self, original: Any) -> None:
        """A clone may lie where another lay, and has its `id` then."""
        first = original.clone()
        token = RemoteModel(first).token()
        gone = weakref.ref(first)
        del first
        gc.collect()
        assert gone() is None
        assert all(RemoteModel(original.clone()).token() != token for _ in range(20))

    def test_the_token_keeps_nothing_alive(self) -> None:
        """Models end when the host lets go of them."""
        made = tiny.patcher()
        gone: list[str] = []
        weakref.finalize(made.model, gone.append, "model")
        token = RemoteModel(made).token()
        del made
        gc.collect()
        assert gone == ["model"]
        assert token is not None

    def test_the_token_changes_with_scheduled_hooks(self, original: Any) -> None:
        """When they are turned on, and with their strength."""
        patched, group = tiny.hooked(original)
        remote = RemoteModel(patched)
        tokens = [remote.token()]
        with torch.inference_mode():
            for strength in (1.0, 0.5):
                group.hooks[0].hook_keyframe._current_keyframe = comfy.hooks.HookKeyframe(strength)
                patched.patch_hooks(group)
                assert group.hooks[0].strength == strength
                tokens.append(remote.token())
            patched.patch_hooks(None)
        assert len({str(token) for token in tokens}) == 3
        assert remote.token() == tokens[0]

    def test_what_is_patched_is_told(self, original: Any) -> None:
        """All that a clone elsewhere needs."""
        patched, _ = tiny.hooked(tiny.with_lora(original))
        found = RemoteModel(patched).patches()
        assert set(found["patches"]) == set(tiny.KEYS)
        assert found["patches_uuid"] == patched.patches_uuid
        assert found["hook_patches"] is patched.hook_patches
        assert found["current_hooks"] is None
        assert {"object_patches", "weight_wrapper_patches", "injections", "attachments"} <= set(found)

    def test_layers_are_known_by_their_names(self, original: Any) -> None:
        """A patch that refers to one need not carry it."""
        known = RemoteModel(original).known()
        assert known[id(original.model)] == ""
        assert known[id(original.model.diffusion_model.out)] == "diffusion_model.out"
        assert len(known) == sum(1 for _ in original.model.modules())

    def test_it_is_placed_as_the_host_does(self, host: Host, original: Any) -> None:
        """With its LoRA, so that it can predict here."""
        patched = tiny.with_lora(original)
        weight = original.model.state_dict()[tiny.KEYS[0]].clone()
        RemoteModel(patched).place()
        assert any(one.model is patched for one in comfy.model_management.current_loaded_models)
        assert not torch.equal(original.model.state_dict()[tiny.KEYS[0]], weight)
        patched.unpatch_model()
        assert torch.equal(original.model.state_dict()[tiny.KEYS[0]], weight)
