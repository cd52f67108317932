"""What a pack's node is about to open is opened as the stock node does it, unless the pack knows more of the file."""
from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import gguf
import numpy
import pytest
from residency.policies.requests import OpenModel
from residency.telemetry.sinks import Ring
from support.gguf_files import save

Write = Callable[..., str]


@pytest.fixture
def write(tmp_path: Path) -> Write:
    """Writes a file with some numbers under these names, and returns its path."""
    def write(architecture: str, *names: str, more: Mapping[str, int] = {}, name: str = "model.gguf") -> str:
        def add(writer: Any) -> None:
            for key, value in more.items():
                writer.add_uint32(key, value)

        return save(tmp_path / name, architecture, {name: numpy.ones((64, 64), numpy.float32) for name in names}, add)
    return write


@pytest.fixture
def ask(house: Any, ring: Ring) -> Callable[..., tuple[Any, str]]:
    """What the host is asked in the end, and the policy's reason."""
    house.policy.start()

    def ask(*paths: str, **attributes: Any) -> tuple[Any, str]:
        asked: list[Any] = []
        house.ask(OpenModel(paths, **attributes), asked.append)
        return asked[0], ring.named("policy.decided")[-1].fields["reason"]
    return ask


T5 = ("token_embd.weight", "enc.blk.0.attn_q.weight")
LLAMA = ("token_embd.weight", "blk.0.attn_q.weight")
HEADS = {"llama.attention.head_count": 4}


def test_a_pack_opens_a_model_as_the_stock_node_does(write: Write, ask: Any, caplog: pytest.LogCaptureFixture) -> None:
    """What the user chose there has no effect any more, and is named."""
    request, reason = ask(write("flux", "weight"), superseded={"dequant_dtype": "float16"})

    assert request.stock
    assert "model.gguf: opened as the stock loader opens them" == reason
    assert "dequant_dtype = float16 is superseded" in caplog.text


@pytest.mark.parametrize(("architecture", "names", "more"), [
    ("t5encoder", T5, {}), ("llama", LLAMA, HEADS), ("clip", ("text_model.weight",), {}), ("pig", ("shared.weight",), {}),
])
def test_text_encoders_that_we_know_are_opened_as_stock(write: Write, ask: Any, architecture: str, names: tuple[str, ...],
                                                        more: Mapping[str, int]) -> None:
    """Those of llama.cpp, and those that have ComfyUI's names. Files of other formats beside them are the host's to read."""
    request, _ = ask("other.safetensors", write(architecture, *names, more=more), text_encoder=True)

    assert request.stock


@pytest.mark.parametrize(("architecture", "names", "more", "words"), [
    ("cow", ("model.weight", "spiece_model"), {}, "a text encoder of the kind cow"),
    ("flux", ("weight",), {}, "a text encoder of the kind flux"),
    ("llama", ("model.embed_tokens.weight",), {}, "a text encoder of the kind llama"),
    ("llama", LLAMA, {}, "llama.attention.head_count is missing or wrong"),
])
def test_text_encoders_that_we_do_not_know_are_the_packs(write: Write, ask: Any, architecture: str, names: tuple[str, ...],
                                                         more: Mapping[str, int], words: str, ring: Ring) -> None:
    """One such file is enough, and the reason names it."""
    known = write("clip", "text_model.weight", name="known.gguf")
    request, reason = ask(known, write(architecture, *names, more=more), text_encoder=True)

    assert not request.stock
    assert "known.gguf, model.gguf: left to the pack" in reason
    (told,) = ring.named("policy.declined")
    assert words in reason
    assert words in told.fields["reason"]


def test_a_file_that_does_not_say_what_it_is_is_the_packs(tmp_path: Path, ask: Any) -> None:
    """stable-diffusion.cpp writes such, with shapes that packs know to mend."""
    class Nameless(gguf.GGUFWriter):
        def add_architecture(self) -> None:
            pass

    path = tmp_path / "nameless.gguf"
    writer = Nameless(str(path), "flux")
    writer.add_tensor("weight", numpy.ones((2, 2), numpy.float32))
    for write in (writer.write_header_to_file, writer.write_kv_data_to_file, writer.write_tensors_to_file, writer.close):
        write()

    request, reason = ask(str(path))

    assert not request.stock
    assert "nameless.gguf does not say what it is a model of" in reason


def test_what_we_cannot_read_the_pack_may(write: Write, tmp_path: Path, ask: Any) -> None:
    """A type that came after us, a damaged file, and one that is not there: the pack has the last word, and we say why."""
    newer = Path(write("flux", "weight"))
    at = newer.read_bytes().index(b"weight") + len("weight") + 4 + 2 * 8  # past the number of dimensions, and two of them
    newer.write_bytes(newer.read_bytes()[:at] + (77).to_bytes(4, "little") + newer.read_bytes()[at + 4:])
    damaged = tmp_path / "damaged.gguf"
    damaged.write_bytes(b"GGUF")

    for path in (str(newer), str(damaged), str(tmp_path / "gone.gguf")):
        request, reason = ask(path)
        assert not request.stock
        assert f"{Path(path).name}: left to the pack, " in reason
