"""A GGUF file's tensors over one mapping."""
from __future__ import annotations

import gc
import sys
from collections.abc import Callable
from pathlib import Path

import gguf
import numpy
import pytest
import torch
from residency.policies.files import gguf_header
from residency.policies.files.gguf_file import GGUFFile
from residency.policies.files.gguf_header import GGUFError
from support.gguf_files import finish

linux = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="needs /proc")
Q8_0 = gguf.GGMLQuantizationType.Q8_0
Write = Callable[[gguf.GGUFWriter], None]


@pytest.fixture
def made(tmp_path: Path) -> Callable[[Write], str]:
    """Writes a file and returns its path."""
    def make(write: Write) -> str:
        path = str(tmp_path / "model.gguf")
        writer = gguf.GGUFWriter(path, "flux")
        write(writer)
        finish(writer)
        return path
    return make


def quantised(rows: int = 4, columns: int = 64) -> numpy.ndarray:
    return gguf.quants.quantize(numpy.arange(rows * columns, dtype=numpy.float32).reshape(rows, columns), Q8_0)


@pytest.mark.parametrize("kind", [numpy.float32, numpy.float16, numpy.float64, numpy.int8, numpy.int16, numpy.int32,
                                  numpy.int64])
def test_numbers_come_in_their_own_dtype_and_shape(made: Callable[[Write], str], kind: type) -> None:
    """Torch's order of dimensions."""
    array = numpy.arange(24).reshape(2, 3, 4).astype(kind)

    tensor = GGUFFile(made(lambda writer: writer.add_tensor("t", array))).get_tensor("t")

    assert torch.equal(torch.from_numpy(array), tensor)
    assert torch.from_numpy(array).dtype == tensor.dtype


def test_bfloat16_comes_as_itself(made: Callable[[Write], str]) -> None:
    """Numpy has no such type, so it is written as bytes."""
    dense = torch.randn(3, 8).bfloat16()

    def write(writer: gguf.GGUFWriter) -> None:
        writer.add_tensor("t", dense.view(torch.uint8).numpy(), raw_dtype=gguf.GGMLQuantizationType.BF16)

    assert torch.equal(dense, GGUFFile(made(write)).get_tensor("t"))


def test_blocks_are_the_bytes_of_rows(made: Callable[[Write], str]) -> None:
    """The shape of the weights is told apart."""
    blocks = quantised()
    file = GGUFFile(made(lambda writer: writer.add_tensor("t", blocks, raw_dtype=Q8_0)))

    assert torch.equal(torch.from_numpy(blocks), file.get_tensor("t"))
    assert ((4, 64), int(Q8_0)) == (file.shape("t"), file.kind("t"))


def test_a_folded_tensor_has_the_shape_that_the_converter_kept(made: Callable[[Write], str]) -> None:
    """Its rows were made to fill whole blocks."""
    def write(writer: gguf.GGUFWriter) -> None:
        writer.add_array("comfy.gguf.orig_shape.t", [8, 8, 4])
        writer.add_tensor("t", quantised(), raw_dtype=Q8_0)

    assert (8, 8, 4) == GGUFFile(made(write)).shape("t")


@pytest.mark.parametrize("shape", [[8, 8, 5], [0], [-4, -64], ["a"]])
def test_a_shape_that_the_weights_cannot_have_is_refused(made: Callable[[Write], str], shape: list[int] | list[str]) -> None:
    """With the file, the tensor and both shapes."""
    def write(writer: gguf.GGUFWriter) -> None:
        writer.add_array("comfy.gguf.orig_shape.t", shape)
        writer.add_tensor("t", quantised(), raw_dtype=Q8_0)

    file = GGUFFile(made(write))
    with pytest.raises(GGUFError, match=r"model.gguf: tensor t has the shape \(4, 64\), and"):
        file.shape("t")


def test_a_type_that_cannot_be_dequantised_is_refused_before_anything_is_mapped(made: Callable[[Write], str]) -> None:
    """With what to do about it."""
    path = made(lambda writer: writer.add_tensor("t", numpy.zeros((4, 32), numpy.float32)))
    data = Path(path).read_bytes()
    place = data.index(b"\x01\0\0\0\0\0\0\0t") + 9 + 4 + 16
    Path(path).write_bytes(data[:place] + (27 + 4).to_bytes(4, "little") + data[place + 4:])

    with pytest.raises(GGUFError, match=r"model\.gguf"):
        GGUFFile(path)


def test_texts_are_metadata(made: Callable[[Write], str]) -> None:
    """As a safetensors file holds them; numbers are left out."""
    def write(writer: gguf.GGUFWriter) -> None:
        writer.add_uint32("some.number", 3)
        writer.add_tensor("t", quantised(), raw_dtype=Q8_0)

    assert {"general.architecture": "flux"} == dict(GGUFFile(made(write)).metadata())


def test_what_is_written_to_a_tensor_is_not_in_the_file(made: Callable[[Write], str]) -> None:
    """The mapping is copy on write."""
    path = made(lambda writer: writer.add_tensor("t", numpy.zeros((4, 4), numpy.float32)))
    before = Path(path).read_bytes()

    GGUFFile(path).get_tensor("t").fill_(1)

    assert before == Path(path).read_bytes()


@pytest.mark.parametrize("inference", [True, False])
def test_tensors_are_of_the_mode_that_they_are_made_in(made: Callable[[Write], str], inference: bool) -> None:
    """Whoever fills a model with them is in the same."""
    file = GGUFFile(made(lambda writer: writer.add_tensor("t", quantised(), raw_dtype=Q8_0)))

    with torch.inference_mode(inference):
        assert inference == file.get_tensor("t").is_inference()


@linux
def test_the_mapping_ends_with_the_last_tensor(made: Callable[[Write], str]) -> None:
    """Not with the file's handle. What the header keeps is apart."""
    path = made(lambda writer: writer.add_tensor("t", quantised(), raw_dtype=Q8_0))
    tensor = GGUFFile(path).get_tensor("t")
    gguf_header.forget()
    gc.collect()
    assert path in Path("/proc/self/maps").read_text()

    del tensor
    gc.collect()

    assert path not in Path("/proc/self/maps").read_text()
