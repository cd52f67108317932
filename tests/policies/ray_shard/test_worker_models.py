"""The worker's side in this process: a real model of the host's, sent as it is sent, predicts as the host does."""
from __future__ import annotations

import copy
import hashlib
import importlib
import os
import pickle
import subprocess
import sys
import textwrap
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import comfy.model_management
import comfy.model_patcher
import psutil
import pytest
import torch
from support import tiny

pytest.importorskip("ray")

from residency.hooks.remote import RemoteModel
from residency.policies.chunking import Chunking, run
from residency.policies.ray_shard import packing
from residency.policies.ray_shard.parcels import Parcel, pack, unpack
from residency.policies.ray_shard.worker.models import Model, Models
from residency.policies.ray_shard.worker.start import PathNames, _lives

CPU = torch.device("cpu")


def travelled(parcel: Parcel) -> Parcel:
    """As it comes out of Ray's store: nobody may write to it, and who does raises an error or ends the process."""
    arrived: Parcel = pickle.loads(pickle.dumps(parcel))
    for buffer in arrived.buffers:
        buffer.setflags(write=False)
    return arrived


class Host:
    """A model here, and how it predicts."""

    def __init__(self, seed: int = 0) -> None:
        self.patcher = tiny.patcher(seed)
        self.built = travelled(pack(RemoteModel(self.patcher).as_built()))

    def predict(self, patcher: Any = None, hooks: Any = None) -> torch.Tensor:
        patcher = patcher or self.patcher
        comfy.model_management.load_models_gpu([patcher])
        patcher.pre_run()
        patcher.patch_hooks(hooks)
        answer: torch.Tensor = patcher.model._apply_model(**tiny.arguments())
        patcher.patch_hooks(None)
        patcher.detach()
        patcher.model.current_patcher = None
        comfy.model_management.current_loaded_models.clear()
        return answer

    def patches(self, patcher: Any = None, hooks: Any = None) -> Parcel:
        patcher = patcher or self.patcher
        patcher.current_hooks = hooks
        remote = RemoteModel(patcher)
        try:
            return travelled(pack(remote.patches(), known=remote.known()))
        finally:
            patcher.current_hooks = None


@pytest.fixture(autouse=True)
def inference() -> Iterator[None]:
    with torch.inference_mode():
        yield
    comfy.model_management.current_loaded_models.clear()


@pytest.fixture(scope="module", autouse=True)
def large() -> Iterator[None]:
    """These weights are small, and yet read where the store has them; and too small for several threads."""
    before, threads = packing.SHARED_FROM, torch.get_num_threads()
    packing.SHARED_FROM = packing.SMALL
    torch.set_num_threads(1)
    yield
    packing.SHARED_FROM = before
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def host(large: None) -> Host:
    with torch.inference_mode():
        return Host()


def sent(host: Host) -> str:
    """A digest of all that was sent."""
    digest = hashlib.sha256()
    for buffer in host.built.buffers:
        digest.update(buffer)
    return digest.hexdigest()


def weights(model: Model) -> dict[str, torch.Tensor]:
    return {name: parameter.clone() for name, parameter in model._model.named_parameters()}


def places(model: Model) -> dict[str, int]:
    return {name: parameter.data_ptr() for name, parameter in model._model.named_parameters()}


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return set(one) == set(other) and all(torch.equal(value, other[name]) for name, value in one.items())


class TestPredicting:
    def test_bit_for_bit_as_the_host(self, host: Host, model: Model) -> None:
        """Each time."""
        model.patch("plain", host.patches())
        expected = host.predict()
        for _ in range(2):
            assert torch.equal(model.predict(tiny.arguments()), expected)
        assert expected.std() > 0.1

    def test_a_file_that_is_wider_than_the_model_is_cast_at_use(self, host: Host) -> None:
        """As dynamic VRAM has it: the weights stay as they are in the file, and the answer is that of the narrow model."""
        wide = unpack(host.built).double()
        for layer, other in zip(wide.modules(), host.patcher.model.modules(), strict=True):
            for leaf, value in (*other.named_parameters(recurse=False), *other.named_buffers(recurse=False)):
                setattr(layer, f"{leaf}_comfy_model_dtype", value.dtype)
        places = {name: parameter.data_ptr() for name, parameter in wide.named_parameters()}
        model = Model(wide, CPU, CPU)
        model.patch("plain", host.patches())
        assert torch.equal(model.predict(tiny.arguments()), host.predict())
        assert {name: parameter.data_ptr() for name, parameter in wide.named_parameters()} == places
        assert {parameter.dtype for parameter in wide.parameters()} == {torch.float64}

    def test_large_weights_lie_where_they_were_sent(self, host: Host, model: Model) -> None:
        """In the store that all workers share; only small ones are copied."""
        large = [name for name, parameter in model._model.named_parameters() if parameter.nbytes >= packing.SHARED_FROM]
        buffers = [range(buffer.ctypes.data, buffer.ctypes.data + buffer.nbytes) for buffer in host.built.buffers]
        lying = places(model)
        assert set(tiny.KEYS) <= set(large)
        assert all(any(lying[name] in buffer for buffer in buffers) for name in large)

    def test_lora_on_off_and_on_again(self, host: Host, model: Model) -> None:
        """Bit for bit, and the weights are those that were sent when it is off."""
        before = weights(model)
        plain, one, two = (host.patches(), *(host.patches(tiny.with_lora(host.patcher, seed)) for seed in (1, 2)))
        expected = [host.predict(), *(host.predict(tiny.with_lora(host.patcher, seed)) for seed in (1, 2))]
        for index, parcel in ((1, one), (0, plain), (1, one), (2, two), (1, one), (0, plain)):
            model.patch(str(index), parcel)
            assert torch.equal(model.predict(tiny.arguments()), expected[index])
        assert not torch.allclose(expected[0], expected[1], atol=1e-2)
        assert not torch.allclose(expected[1], expected[2], atol=1e-2)
        model.release()
        assert same(weights(model), before)

    def test_a_strength_of_its_own(self, host: Host, model: Model) -> None:
        """The same LoRA, twice as strong."""
        patched = tiny.with_lora(host.patcher, strength=2.0)
        model.patch("strong", host.patches(patched))
        assert torch.equal(model.predict(tiny.arguments()), host.predict(patched))

    @pytest.mark.parametrize("lora", [False, True])
    def test_after_a_release(self, host: Host, model: Model, lora: bool) -> None:
        """It is placed again when it is asked."""
        patched = tiny.with_lora(host.patcher) if lora else host.patcher.clone()
        expected = host.predict(patched)
        model.patch("digest", host.patches(patched))
        for _ in range(2):
            assert torch.equal(model.predict(tiny.arguments()), expected)
            model.release()
            model.release()

    def test_a_replaced_schedule(self, host: Host, model: Model) -> None:
        """Objects are patched too, and put back."""
        patched = host.patcher.clone()
        schedule = copy.deepcopy(host.patcher.model.model_sampling)
        schedule.set_sigmas(torch.linspace(0.01, 40.0, 1000))
        patched.add_object_patch("model_sampling", schedule)
        expected = host.predict(patched), host.predict()
        model.patch("other", host.patches(patched))
        assert torch.equal(model.predict(tiny.arguments()), expected[0])
        model.patch("plain", host.patches())
        assert torch.equal(model.predict(tiny.arguments()), expected[1])

    def test_two_models(self, host: Host, models: Models) -> None:
        """One after the other, each with its own patches."""
        other = Host(seed=5)
        models.add("other", "diffusion_model", other.built)
        models["model"].patch("lora", host.patches(tiny.with_lora(host.patcher)))
        models["other"].patch("plain", other.patches())
        expected = host.predict(tiny.with_lora(host.patcher)), other.predict()
        for _ in range(2):
            assert torch.equal(models["model"].predict(tiny.arguments()), expected[0])
            assert torch.equal(models["other"].predict(tiny.arguments()), expected[1])
        models.release("other")
        assert torch.equal(models["model"].predict(tiny.arguments()), expected[0])

    def test_it_wants_the_patches_that_are_asked_for(self, host: Host, model: Model) -> None:
        """A step with others would be another image."""
        model.must_have("")
        model.patch("digest", host.patches())
        model.must_have("digest")
        with pytest.raises(KeyError, match="digest"):
            model.must_have("other")


class TestFeedForwardsInPieces:
    """Each of its calls is cut at the fewest tokens; the U-Net has sixteen and four, in two rows."""

    @pytest.fixture(autouse=True)
    def short(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(run, "LEAST", 2)
        monkeypatch.setattr(run, "_SAMPLE", 2)

    def model(self, host: Host, pieces: int) -> Model:
        models = Models(CPU, CPU, Chunking(pieces))
        models.add("model", "diffusion_model", host.built)
        model: Model = models["model"]
        model.patch("plain", host.patches())
        return model

    def test_the_prediction_is_the_hosts(self, host: Host, monkeypatch: pytest.MonkeyPatch) -> None:
        cut: list[int] = []
        in_pieces = run.in_pieces
        monkeypatch.setattr(run, "in_pieces", lambda forward, x, pieces: cut.append(pieces) or in_pieces(forward, x, pieces))
        model = self.model(host, 3)

        found = model.predict(tiny.arguments())

        expected = host.predict()
        assert (found - expected).abs().max() <= 1e-6 * expected.abs().max()
        assert set(cut) == {3}
        assert model.whole == ""

    def test_why_it_stays_whole(self, host: Host, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(run, "LEAST", 1000)
        model = self.model(host, 3)

        assert torch.equal(model.predict(tiny.arguments()), host.predict())
        assert "fewer than 2000 tokens" in model.whole

    def test_one_piece_is_as_before(self, host: Host) -> None:
        model = self.model(host, 1)

        assert torch.equal(model.predict(tiny.arguments()), host.predict())
        assert model.whole == ""


class TestHooks:
    def test_scheduled_lora(self, host: Host, model: Model) -> None:
        """On, with another strength, off, and with a LoRA of the ordinary kind beside it."""
        patched, group = tiny.hooked(tiny.with_lora(host.patcher))
        expected = [host.predict(patched, hooks) for hooks in (None, group)]
        for index, hooks in ((1, group), (0, None), (1, group)):
            model.patch(str(index), host.patches(patched, hooks))
            assert torch.equal(model.predict(tiny.arguments()), expected[index])
        assert not torch.allclose(expected[0], expected[1], atol=1e-2)
        model.patch("plain", host.patches())
        assert torch.equal(model.predict(tiny.arguments()), host.predict())

    def test_they_write_to_memory_of_their_own(self, host: Host, model: Model) -> None:
        """The host's hooks patch in place; others read the same bytes where they were sent."""
        before, lying, digest = weights(model), places(model), sent(host)
        patched, group = tiny.hooked(host.patcher)
        model.patch("hooked", host.patches(patched, group))
        model.predict(tiny.arguments())

        now = places(model)
        assert {name for name in now if now[name] != lying[name]} == set(tiny.KEYS)
        assert sent(host) == digest
        assert not same(weights(model), before)

        model.release()
        assert same(weights(model), before)
        assert places(model) == lying

    def test_a_model_that_is_removed(self, host: Host, models: Models) -> None:
        """Nothing of it is left, hooked or not; twice is once."""
        patched, group = tiny.hooked(host.patcher)
        models["model"].patch("hooked", host.patches(patched, group))
        models["model"].predict(tiny.arguments())
        models.remove("model")
        models.remove("model")
        assert list(models) == []
        assert comfy.model_management.current_loaded_models == []


class TestReleasing:
    @pytest.mark.parametrize("lora", [False, True])
    def test_weights_are_where_they_were(self, host: Host, model: Model, lora: bool) -> None:
        """Nothing is copied, so that all workers go on to read the same bytes."""
        lying, before = places(model), weights(model)
        model.patch("digest", host.patches(tiny.with_lora(host.patcher) if lora else None))
        model.predict(tiny.arguments())
        model.release()
        assert places(model) == lying
        assert same(weights(model), before)
        assert comfy.model_management.current_loaded_models == []

    def test_also_after_patches_were_changed_meanwhile(self, host: Host, model: Model) -> None:
        """What the first had patched is not taken for the file's."""
        lying, before = places(model), weights(model)
        for seed in (1, 2):
            model.patch(str(seed), host.patches(tiny.with_lora(host.patcher, seed)))
            model.predict(tiny.arguments())
        model.patch("plain", host.patches())
        model.release()
        model.predict(tiny.arguments())
        model.release()
        assert same(weights(model), before)
        assert places(model) == lying

    @pytest.mark.parametrize("lora", [False, True])
    def test_after_the_host_gave_its_parameters_other_memory(self, host: Host, model: Model, lora: bool) -> None:
        """So it moves them to a device: the parameter is the same one."""
        lying, before = places(model), weights(model)
        model.patch("digest", host.patches(tiny.with_lora(host.patcher) if lora else None))
        for _ in range(2):
            model.predict(tiny.arguments())
            for parameter in model._model.parameters():
                parameter.data = parameter.data.clone()
            assert places(model) != lying
            model.release()
            assert (places(model), same(weights(model), before)) == (lying, True)

    @pytest.mark.parametrize("error", [torch.OutOfMemoryError("full"), KeyboardInterrupt()], ids=repr)
    def test_after_a_placing_that_failed(self, host: Host, model: Model, monkeypatch: pytest.MonkeyPatch,
                                         error: BaseException) -> None:
        """The next one starts anew."""
        lying = places(model)
        patched, group = tiny.hooked(tiny.with_lora(host.patcher))
        expected = host.predict(patched, group)
        model.patch("hooked", host.patches(patched, group))
        pre_run = comfy.model_patcher.ModelPatcher.pre_run

        def fail(patcher: Any) -> None:
            raise error

        monkeypatch.setattr(comfy.model_patcher.ModelPatcher, "pre_run", fail)
        with pytest.raises(type(error)):
            model.predict(tiny.arguments())
        assert (places(model), comfy.model_management.current_loaded_models) == (lying, [])
        monkeypatch.setattr(comfy.model_patcher.ModelPatcher, "pre_run", pre_run)
        assert torch.equal(model.predict(tiny.arguments()), expected)

    def test_after_patches_that_nobody_used(self, host: Host, model: Model) -> None:
        """The weights are still on the device as they were patched before."""
        lying, before = places(model), weights(model)
        model.patch("lora", host.patches(tiny.with_lora(host.patcher)))
        model.predict(tiny.arguments())
        model.patch("plain", host.patches())
        model.release()
        assert (places(model), same(weights(model), before)) == (lying, True)
        assert comfy.model_management.current_loaded_models == []

    def test_where_a_layer_is_replaced(self, host: Host, model: Model) -> None:
        """By one that has no weights; its own come back with it."""
        lying = places(model)
        patched = tiny.with_lora(host.patcher)
        patched.add_object_patch("diffusion_model.middle_block.1.transformer_blocks.0.attn2.to_out.1", torch.nn.Identity())
        patched.add_object_patch("diffusion_model.out.2", torch.nn.Conv2d(32, 4, 1, bias=False).requires_grad_(False))
        expected = host.predict(patched)
        model.patch("layers", host.patches(patched))
        assert torch.equal(model.predict(tiny.arguments()), expected)
        model.release()
        assert places(model) == lying

    def test_of_one_or_of_all(self, host: Host, models: Models) -> None:
        """None is all; a model that was not placed has nothing to release."""
        models.add("other", "diffusion_model", Host(seed=5).built)
        for name in models:
            models[name].patch("plain", host.patches())
        for released, left in (("model", 1), (None, 0), ("gone", 0)):
            if left:
                for name in models:
                    models[name].predict(tiny.arguments())
            models.release(released)
            assert len(comfy.model_management.current_loaded_models) == left


class TestPathNames:
    """ComfyUI imports node packs under the path of their folder, with dots as `_x_`, and single files under their path."""

    @pytest.fixture(autouse=True)
    def finder(self) -> Iterator[None]:
        finder, before = PathNames(), set(sys.modules)
        sys.meta_path.append(finder)
        yield
        sys.meta_path.remove(finder)
        for name in set(sys.modules) - before:
            del sys.modules[name]

    @pytest.mark.parametrize("folder", ["pack", "comfyui-pack.v2", "odd_x_pack", "pack with spaces"])
    def test_a_folder(self, tmp_path: Path, folder: str) -> None:
        """Its own modules are found below it, by relative imports as well."""
        place = tmp_path / folder
        place.mkdir()
        (place / "__init__.py").write_text("from .nodes import Patch\n")
        (place / "nodes.py").write_text("class Patch:\n    scale = 3\n")
        name = str(place).replace(".", "_x_")
        assert importlib.import_module(name).Patch.scale == 3
        module = importlib.import_module(f"{name}.nodes")
        assert pickle.loads(pickle.dumps(module.Patch)) is module.Patch

    def test_a_file(self, tmp_path: Path) -> None:
        """It has no modules below it."""
        (tmp_path / "single.py").write_text("class Patch:\n    scale = 4\n")
        module = importlib.import_module(str(tmp_path / "single"))
        assert module.Patch.scale == 4
        assert pickle.loads(pickle.dumps(module.Patch)) is module.Patch

    @pytest.mark.parametrize("name", ["single", "torch_x_nn"])
    def test_what_is_no_path_is_not_looked_for(self, name: str) -> None:
        """Nor what is not there."""
        assert PathNames().find_spec(name) is None

    def test_a_path_where_nothing_is(self, tmp_path: Path) -> None:
        """The error is Python's own."""
        assert PathNames().find_spec(str(tmp_path / "gone")) is None
        (tmp_path / "empty").mkdir()
        with pytest.raises(ModuleNotFoundError):
            importlib.import_module(str(tmp_path / "empty"))


class TestOrphans:
    CHILD = """
        import sys
        sys.path.insert(0, {tests!r})
        from support.loading import load
        load()
        from residency.policies.ray_shard.worker.start import end_with
        import time
        end_with({pid}, {started})
        print("watching", flush=True)
        time.sleep(60)
    """

    def test_a_worker_ends_soon_after_its_host(self) -> None:
        """However that ended; and not before."""
        parent = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
        try:
            started = psutil.Process(parent.pid).create_time()
            code = textwrap.dedent(self.CHILD).format(tests=str(Path(__file__).parents[2]), pid=parent.pid, started=started)
            child = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
            try:
                assert child.stdout is not None
                assert child.stdout.readline() == "watching\n"
                time.sleep(1.2)
                assert child.poll() is None
                parent.kill()  # it stays a zombie until somebody waits for it
                assert child.wait(10) == 0
            finally:
                child.kill()
                child.wait()
        finally:
            parent.kill()
            parent.wait()

    def test_another_process_of_the_same_number_is_not_it(self) -> None:
        """Numbers are given again."""
        here = psutil.Process(os.getpid())
        assert _lives(here.pid, here.create_time())
        assert not _lives(here.pid, here.create_time() - 60)
        assert not _lives(2**22 + 1, 0.0)
