"""Models travel between processes: what lies in files by name, the rest by value, and all of it bit for bit."""
from __future__ import annotations

import hashlib
import os
import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any

import gguf
import numpy
import pytest
import torch
from safetensors.torch import load_file, save_file
from support import gguf_files
from support.fixtures import make_models
from support.loading import COMFYUI, TREES

pytest.importorskip("ray")

from residency.hooks.gguf_weights.layout import wrap
from residency.policies.files.bank import Bank
from residency.policies.files.likeness import Likeness
from residency.policies.files.maps import MAPS
from residency.policies.files.provenance import FileChanged
from residency.policies.ray_shard.abroad import pieces
from residency.policies.ray_shard.packing import SHARED_FROM
from residency.policies.ray_shard.parcels import Parcel, pack, unpack

linux = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="only Linux lists mappings")
Q8_0 = gguf.GGMLQuantizationType.Q8_0
FLUX = "diffusion_models/flux_a"

_RECEIVER = """
import gc, hashlib, pickle, sys
sys.path.insert(0, sys.argv[1])
from support.loading import load
load()
import torch
from residency.policies.ray_shard.parcels import unpack

def anonymous():
    with open("/proc/self/smaps_rollup") as file:
        return next(int(line.split()[1]) * 1024 for line in file if line.startswith("Anonymous:"))

parcel = pickle.load(open(sys.argv[2], "rb"))
unpack(pickle.load(open(sys.argv[3], "rb")))
gc.collect()
before = anonymous()
state = unpack(parcel)
state = state if isinstance(state, dict) else state.state_dict()
digests = {key: hashlib.sha256(value.detach().reshape(-1).view(torch.uint8).numpy()).hexdigest()
           for key, value in state.items()}
pickle.dump((anonymous() - before, digests), open(sys.argv[4], "wb"))
"""


def digests(state: dict[str, torch.Tensor]) -> dict[str, str]:
    return {key: hashlib.sha256(value.detach().reshape(-1).view(torch.uint8).numpy()).hexdigest()
            for key, value in state.items()}


def in_another_process(parcel: Parcel, folder: Path) -> tuple[int, dict[str, str]]:
    """(bytes of private memory that unpacking and reading cost, digests of the tensors) in a new process."""
    files = [folder / name for name in ("parcel", "warm", "answer")]
    files[0].write_bytes(pickle.dumps(parcel))
    files[1].write_bytes(pickle.dumps(pack(torch.nn.Linear(64, 64))))
    subprocess.run([sys.executable, "-c", _RECEIVER, str(Path(__file__).parents[2]), *map(str, files)], check=True)
    answer: tuple[int, dict[str, str]] = pickle.loads(files[2].read_bytes())
    return answer


def twin(value: Any, **options: Any) -> Any:
    return unpack(pickle.loads(pickle.dumps(pack(value))), **options)


def frozen(parcel: Parcel) -> Parcel:
    """As out of a store that processes share: nobody may write to the buffers."""
    for buffer in parcel.buffers:
        buffer.setflags(write=False)
    return parcel


@pytest.fixture
def file(tmp_path: Path) -> str:
    """32 MB of weights."""
    path = str(tmp_path / "weights.safetensors")
    save_file({f"t{index}": torch.randn(1024, 1024).to([torch.float32, torch.bfloat16][index % 2])
               for index in range(11)}, path)
    return path


@linux
class TestMappedWeights:
    def test_another_process_has_the_same_bits_and_no_copy_of_them(self, file: str, tmp_path: Path) -> None:
        """Two processes, one copy."""
        state = {key: torch.nn.Parameter(value, False) for key, value in load_file(file).items()}
        parcel = pack(state)
        size = sum(value.nbytes for value in state.values())

        private, found = in_another_process(parcel, tmp_path)

        assert found == digests(state)
        assert (parcel.mapped_bytes, parcel.copied_bytes) == (size, 0)
        assert [(found.name.path, found.size) for found in parcel.files] == [(file, size)]
        assert len(parcel.data) < 10_000 and parcel.buffers == []
        assert private < size * 0.04

    def test_clones_travel_by_value_and_cost_a_copy(self, file: str, tmp_path: Path) -> None:
        """The control."""
        state = {key: value.clone() for key, value in load_file(file).items()}
        parcel = pack(state)
        size = sum(value.nbytes for value in state.values())

        private, found = in_another_process(parcel, tmp_path)

        assert found == digests(state)
        assert (parcel.mapped_bytes, parcel.copied_bytes, parcel.files) == (0, size, ())
        assert len(parcel.data) < 10_000
        assert private > size * 0.9

    def test_a_written_weight_travels_by_value(self, file: str) -> None:
        state = load_file(file)
        state["t0"][5, 5] = 77
        parcel = pack(state)

        assert parcel.copied_bytes == state["t0"].nbytes
        assert unpack(parcel)["t0"][5, 5] == 77

    def test_a_file_that_changed_on_the_way_is_an_error(self, file: str) -> None:
        parcel = pack(load_file(file))
        os.utime(file, ns=(1, 1))

        with pytest.raises(FileChanged, match=r"weights\.safetensors"):
            unpack(parcel)

    def test_a_parameter_and_its_state_stay_what_they_are(self, file: str) -> None:
        state = load_file(file)
        with torch.inference_mode():
            made = twin([torch.nn.Parameter(state["t0"], True), torch.nn.Parameter(load_file(file)["t1"], False)])
            assert made[1].is_inference()
        plain = twin(torch.nn.Parameter(state["t2"], True))

        assert [type(value) for value in (*made, plain)] == [torch.nn.Parameter] * 3
        assert [value.requires_grad for value in (*made, plain)] == [True, False, True]
        assert plain.is_leaf and not plain.is_inference()

    def test_gguf_blocks_travel_as_their_place_in_the_file(self, tmp_path: Path) -> None:
        """Inside the host's quantised tensors, as parameters or not."""
        array = gguf.quants.quantize(numpy.random.default_rng(1).standard_normal((64, 256), dtype=numpy.float32), Q8_0)
        lease = Bank().lease(gguf_files.save(tmp_path / "m.gguf", "flux", {"a": (array, Q8_0)}))
        weight = wrap(lease.tensors["a"], int(Q8_0), (64, 256))
        parcel = pack([weight, torch.nn.Parameter(weight, False)])

        made = unpack(parcel)

        assert parcel.copied_bytes == 0 and parcel.mapped_bytes == 2 * array.nbytes
        assert [type(value) for value in made] == [type(weight)] * 2
        assert [isinstance(value, torch.nn.Parameter) for value in made] == [False, True]
        assert torch.equal(made[1]._qdata, lease.tensors["a"])
        assert torch.equal(made[1].dequantize(), weight.dequantize())
        assert made[0]._params == weight._params

    def test_a_subclass_keeps_its_class_its_attributes_and_its_memory(self, file: str) -> None:
        weight = load_file(file)["t0"].as_subclass(Packed)
        weight.kind, weight.patches = 8, [("a", 1.0)]
        parcel = pack(weight)

        made = unpack(parcel)

        assert type(made) is Packed and (made.kind, made.patches) == (8, [("a", 1.0)])
        assert parcel.mapped_bytes == weight.nbytes and parcel.copied_bytes == 0
        assert torch.equal(made.as_subclass(torch.Tensor), weight.as_subclass(torch.Tensor))


@linux
class TestFilesThatAreMissing:
    def pieces(self, parcel: Parcel) -> list[Any]:
        """As a store that processes share gives them."""
        sent = [pickle.loads(pickle.dumps(pieces(file))) for file in parcel.files]
        for one in sent:
            for buffer in one.buffers.values():
                buffer.setflags(write=False)
        return sent

    def test_their_pieces_stand_for_them(self, file: str) -> None:
        """Bit for bit; large parameters are read where the store has them, all else may be written to."""
        state = load_file(file)
        packed = pickle.dumps(pack([torch.nn.Parameter(state["t0"], False), state["t1"], state["t2"][::2].t()]))
        sent = self.pieces(pickle.loads(packed))
        expected = [state["t0"].clone(), state["t1"].clone(), state["t2"][::2].t().clone()]
        del state
        os.remove(file)

        made = unpack(pickle.loads(packed), sent=sent)

        assert all(torch.equal(one, other) for one, other in zip(made, expected, strict=True))
        assert made[0].data_ptr() in {buffer.ctypes.data for buffer in sent[0].buffers.values()}
        made[1].zero_()
        made[2].zero_()

    def test_only_what_is_used_is_sent(self, file: str) -> None:
        """And each place once."""
        state = load_file(file)
        parcel = pack([state["t0"], torch.nn.Parameter(state["t0"], False), state["t3"]])

        assert parcel.files[0].size == state["t0"].nbytes + state["t3"].nbytes
        assert sum(buffer.nbytes for buffer in self.pieces(parcel)[0].buffers.values()) == parcel.files[0].size

    def test_a_quantised_parameters_blocks_are_shared(self, tmp_path: Path) -> None:
        array = gguf.quants.quantize(numpy.ones((2048, 1024), numpy.float32), Q8_0)
        lease = Bank().lease(gguf_files.save(tmp_path / "m.gguf", "flux", {"a": (array, Q8_0)}))
        parcel = pack(torch.nn.Parameter(wrap(lease.tensors["a"], int(Q8_0), (2048, 1024)), False))
        (sent,) = self.pieces(parcel)

        made = unpack(parcel, sent=[sent])

        assert torch.equal(made._qdata, lease.tensors["a"])
        assert made._qdata.data_ptr() == next(iter(sent.buffers.values())).ctypes.data

    def test_a_file_that_changed_is_not_sent(self, file: str) -> None:
        """Its pieces would be another model's."""
        parcel = pack(load_file(file))
        os.utime(file, ns=(1, 1))

        with pytest.raises(FileChanged, match=r"weights\.safetensors"):
            pieces(parcel.files[0])

    def test_a_copy_on_another_machine_is_mapped_once_it_was_looked_at(self, file: str) -> None:
        """By size and pages: its inode and its time are others."""
        packed = pickle.dumps(pack(load_file(file)))
        expected = {key: value.clone() for key, value in load_file(file).items()}
        name = pickle.loads(packed).files[0].name
        likeness = Likeness.of(file, name.identity, [place[:2] for place in pickle.loads(packed).files[0].places])
        copy = Path(file).with_suffix(".copy")
        copy.write_bytes(Path(file).read_bytes())
        os.replace(copy, file)
        with pytest.raises(FileChanged):
            unpack(pickle.loads(packed))

        assert MAPS.accept(name.identity, likeness)
        assert digests(unpack(pickle.loads(packed))) == digests(expected)

        os.utime(file, ns=(1, 1))  # it changed under the worker
        with pytest.raises(FileChanged):
            unpack(pickle.loads(packed))


class Packed(torch.Tensor):
    """As packs make them for their formats."""

    kind: int
    patches: list[tuple[str, float]]


KINDS = [torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2, torch.int8, torch.int64,
         torch.bool, torch.complex64]


class TestByValue:
    @pytest.mark.parametrize("dtype", KINDS)
    @pytest.mark.parametrize("shape", [(), (0, 4), (3, 5), (200, 300)])
    def test_every_kind_of_number_arrives(self, dtype: torch.dtype, shape: tuple[int, ...]) -> None:
        """Small or large, or none of them."""
        tensor = (torch.randn(shape) * 5).to(dtype)
        made = twin(tensor)

        assert (made.dtype, made.shape, made.stride()) == (tensor.dtype, tensor.shape, tensor.stride())
        assert digests({"": made}) == digests({"": tensor})

    def test_the_order_in_memory_stays_and_gaps_go(self) -> None:
        tensor = torch.randn(2, 8, 16, 16)
        for value in (tensor.to(memory_format=torch.channels_last), tensor.transpose(0, 3)):
            made = twin(value)
            assert made.stride() == value.stride() and torch.equal(made, value)
        for value in (tensor[:, ::2], torch.randn(100, 1).expand(100, 90)):
            assert torch.equal(twin(value), value)

    def test_one_tensor_stays_one(self) -> None:
        shared = torch.nn.Linear(64, 64)
        model = torch.nn.Sequential(shared, shared)
        model[0].weight.grad = None
        made = twin(model)

        assert made[0] is made[1]
        assert pack([shared.weight, shared.weight]).copied_bytes == shared.weight.nbytes

    def test_two_views_have_their_own_values(self) -> None:
        base = torch.randn(64, 64)
        one, two = twin((base[:32], base[16:]))

        assert torch.equal(one, base[:32]) and torch.equal(two, base[16:])

    def test_a_large_parameter_is_read_where_the_store_has_it(self) -> None:
        parameter = torch.nn.Parameter(torch.randn(SHARED_FROM // 4), False)
        parcel = frozen(pack(parameter))
        address = parcel.buffers[0].ctypes.data

        assert unpack(parcel).data_ptr() == address
        assert torch.equal(unpack(parcel), parameter)

    def test_whoever_wants_to_write_gets_a_copy(self) -> None:
        parcel = frozen(pack(torch.nn.Parameter(torch.ones(SHARED_FROM), False)))
        made = unpack(parcel, writable=True)
        made.zero_()

        assert unpack(parcel).sum() == SHARED_FROM

    def test_small_parameters_and_tensors_that_are_none_may_be_written_to(self) -> None:
        parcel = frozen(pack([torch.nn.Parameter(torch.ones(5000), False), torch.ones(SHARED_FROM), torch.ones(3),
                              numpy.ones(5000)]))
        made = unpack(parcel)
        for value in made:
            value[:] = 2

        assert [float(value.sum()) for value in unpack(parcel)] == [5000, SHARED_FROM, 3, 5000]

    def test_a_quantised_parameters_blocks_are_read_where_the_store_has_them(self) -> None:
        array = gguf.quants.quantize(numpy.ones((2048, 1024), numpy.float32), Q8_0)
        weight = torch.nn.Parameter(wrap(torch.from_numpy(array), int(Q8_0), (2048, 1024)), False)
        parcel = frozen(pack(weight))

        assert unpack(parcel)._qdata.data_ptr() == parcel.buffers[0].ctypes.data

    def test_meta_and_sparse_tensors_arrive(self) -> None:
        assert twin(torch.empty(3, 4, device="meta")).is_meta
        assert torch.equal(twin(torch.eye(3).to_sparse()).to_dense(), torch.eye(3))

    @pytest.mark.gpu
    def test_a_tensor_of_a_device_arrives_on_the_cpu(self) -> None:
        tensor = torch.randn(64, 64, device="cuda")
        made = twin(torch.nn.Parameter(tensor, False))

        assert type(made) is torch.nn.Parameter and made.device.type == "cpu"
        assert torch.equal(made, tensor.cpu())

    def test_a_parcel_that_lies_about_a_tensors_size_is_an_error(self) -> None:
        parcel = pack(torch.ones(5000))
        short = Parcel(parcel.data, [parcel.buffers[0][:400]], parcel.weights, 0, 0, ())

        with pytest.raises(ValueError, match="20000 bytes"):
            unpack(short)
        with pytest.raises(ValueError, match="0 buffers"):
            unpack(Parcel(parcel.data, [], parcel.weights, 0, 0, ()))


class Config:
    """Answers to every name, as ComfyUI's model configurations do."""

    def __init__(self, value: int) -> None:
        self.value = value

    def __getattr__(self, name: str) -> None:
        return None


@linux
class TestModelsOfTheHost:
    @pytest.fixture
    def path(self) -> str:
        return str(make_models(COMFYUI, TREES.parent / "residency-models", [FLUX]) / f"{FLUX}.safetensors")

    def test_a_whole_model_over_its_file_is_small_and_its_twin_has_the_same_weights(self, path: str, tmp_path: Path) -> None:
        """Configuration, sampling, layers and all; in this process and in another."""
        import comfy.sd
        from comfy.supported_models_base import BASE

        model = comfy.sd.load_diffusion_model(path, {"dtype": torch.bfloat16}).model
        model.load_state_dict({f"diffusion_model.{key}": value for key, value in load_file(path).items()}, assign=True,
                              strict=False)
        weights = sum(value.nbytes for value in model.state_dict().values())
        parcel = pack(model)

        made = unpack(parcel)

        assert len(parcel.data) + sum(buffer.nbytes for buffer in parcel.buffers) < 2**20
        assert parcel.mapped_bytes > weights * 0.9
        assert type(made) is type(model) and isinstance(made.model_config, BASE)
        assert made.model_config.unet_config == model.model_config.unet_config
        assert digests(made.state_dict()) == digests(model.state_dict())
        assert in_another_process(parcel, tmp_path)[1] == digests(model.state_dict())


def test_what_answers_to_every_name_keeps_its_attributes() -> None:
    """Pickle asks such an object for its special methods, and gets an answer."""
    made = twin([Config(3)])[0]

    assert type(made) is Config and vars(made) == {"value": 3}
