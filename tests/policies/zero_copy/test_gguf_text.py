"""Text encoders in GGUF: names, row order, norms, vocabularies and the image half, against ComfyUI's own classes."""
from __future__ import annotations

import base64
import io
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import comfy.ops
import comfy.text_encoders.hidream
import comfy.text_encoders.llama as llama
import comfy.text_encoders.t5 as t5
import gguf
import numpy as np
import pytest
import torch
from residency.hooks.gguf_weights import is_gguf
from residency.hooks.gguf_weights.ops import Ops
from residency.hooks.host import Formats
from residency.policies.files.bank import Bank
from residency.policies.files.gguf_header import GGUFError
from residency.policies.files.gguf_rows import apart
from residency.policies.zero_copy.gguf import weights
from support.gguf_files import save

ARCH = gguf.MODEL_ARCH
CONFIGS = Path(t5.__file__).parent
Q8 = gguf.GGMLQuantizationType.Q8_0


def t5_class(config: str, **changes: Any) -> Callable[[Any], torch.nn.Module]:
    values = {**json.loads((CONFIGS / config).read_text()), **changes}
    return lambda ops: t5.T5(values, torch.float32, "cpu", ops)


def llama_class(name: str, **changes: Any) -> Callable[[Any], torch.nn.Module]:
    return lambda ops: getattr(llama, name)(changes, torch.float32, "cpu", ops)


SMALL = {"vocab_size": 96, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4,
         "num_key_value_heads": 2}
SMALL_T5 = {"d_model": 64, "d_kv": 16, "num_heads": 4, "d_ff": 96, "num_layers": 2, "vocab_size": 96}
# The architecture as llama.cpp names it, its table of names there, and ComfyUI's class for it.
FAMILIES = [
    pytest.param("t5encoder", ARCH.T5ENCODER, t5_class("t5_config_xxl.json", **SMALL_T5), id="t5"),
    pytest.param("t5", ARCH.T5, t5_class("t5_config_base.json", **SMALL_T5), id="t5 without gate"),
    pytest.param("t5encoder", ARCH.T5ENCODER, t5_class("umt5_config_xxl.json", **SMALL_T5), id="umt5"),
    pytest.param("llama", ARCH.LLAMA, llama_class("Llama2", **SMALL), id="llama"),
    pytest.param("llama", ARCH.LLAMA, llama_class("Mistral3Small24B", **SMALL), id="mistral"),
    pytest.param("mistral3", ARCH.MISTRAL3, llama_class("Mistral3Small24B", **SMALL), id="mistral3"),
    pytest.param("qwen2", ARCH.QWEN2, llama_class("Qwen25_3B", **SMALL), id="qwen2"),
    pytest.param("qwen2vl", ARCH.QWEN2VL, llama_class("Qwen25_3B", **SMALL), id="qwen2vl"),
    pytest.param("qwen3", ARCH.QWEN3, llama_class("Qwen3_4B", **SMALL), id="qwen3"),
    pytest.param("qwen3vl", ARCH.QWEN3VL, llama_class("Qwen3_8B", **SMALL, lm_head=True), id="qwen3vl"),
    pytest.param("gemma2", ARCH.GEMMA2, llama_class("Gemma2_2B", **SMALL), id="gemma2"),
    pytest.param("gemma3", ARCH.GEMMA3, llama_class("Gemma3_4B", **SMALL), id="gemma3"),
]


def llama_cpp_name(table: Any, key: str) -> str:
    """The converter's name for a model's key, from the gguf package."""
    key = key.replace("model.lm_head.", "lm_head.")
    for known in (key, re.sub(r"^encoder\.block", "encoder.block", key)):
        name = table.get_name(known, (".weight", ".bias"))
        if name is not None:
            return str(name)
    raise KeyError(key)


def permuted(array: np.ndarray, heads: int) -> np.ndarray:
    """As llama.cpp's LlamaModel.permute has it."""
    return array.reshape(heads, 2, array.shape[0] // heads // 2, *array.shape[1:]).swapaxes(1, 2).reshape(array.shape)


def write(path: Path, architecture: str, tensors: dict[str, Any], tokenizer: Callable[[Any], None] = lambda writer: None,
          **values: int) -> str:
    def more(writer: Any) -> None:
        for name, value in values.items():
            writer.add_uint32(f"{architecture}.{name.replace('__', '.')}", value)
        tokenizer(writer)

    return save(path, architecture, tensors, more)


def read(path: str) -> dict[str, torch.Tensor]:
    bank = Bank()
    return weights(bank.lease(path), Formats(), bank.lease)


def pieces(writer: Any, model: str = "llama") -> None:
    """A vocabulary of a few pieces, as every Gemma needs one."""
    writer.add_tokenizer_model(model)
    writer.add_token_list(["<pad>", "<eos>", "<bos>", "<unk>", "a"])
    writer.add_token_scores([0.0] * 5)
    writer.add_token_types([3, 3, 3, 2, 1])


def converted(model: torch.nn.Module, architecture: str, arch: Any) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """A model's random weights as the converter would write them, and what they are once they are dequantised."""
    table, tensors, dense = gguf.get_tensor_name_map(arch, 4), {}, {}
    generator = torch.Generator().manual_seed(5)
    for key, value in model.state_dict().items():
        array = torch.randn(value.shape, generator=generator).numpy() * 0.2
        name = llama_cpp_name(table, key)
        if architecture.startswith("gemma") and key.endswith("norm.weight"):
            tensors[name], dense[key] = array + 1, torch.from_numpy((array + 1) - 1)
            continue
        kind = Q8 if array.ndim == 2 and array.shape[1] % 32 == 0 else gguf.GGMLQuantizationType.F32
        blocks = gguf.quants.quantize(array, kind)
        dense[key] = torch.from_numpy(gguf.quants.dequantize(blocks, kind).reshape(array.shape).copy())
        heads = {"attn_q": 4, "attn_k": 2}.get(name.split(".")[-2]) if architecture in ("llama", "mistral3") else None
        tensors[name] = (permuted(blocks, heads) if heads else blocks), kind
    return tensors, dense


@pytest.mark.parametrize(("architecture", "arch", "build"), FAMILIES)
def test_a_model_computes_what_its_dequantised_weights_compute(architecture: str, arch: Any, build: Any,
                                                               tmp_path: Path) -> None:
    """Every key of ComfyUI's class is there and no other, each weight is the dense one, and so is the output."""
    reference = build(comfy.ops.manual_cast)
    tensors, dense = converted(reference, architecture, arch)
    path = write(tmp_path / "encoder.gguf", architecture, tensors, pieces if "gemma" in architecture else lambda writer: None,
                 attention__head_count=4, attention__head_count_kv=2)
    found = read(path)
    if "lm_head.weight" in found:
        found["model.lm_head.weight"] = found.pop("lm_head.weight")  # as ComfyUI does itself
    found.pop("spiece_model", None)

    assert found.keys() == dense.keys()
    for key, value in dense.items():
        assert torch.equal(found[key].dequantize() if is_gguf(found[key]) else found[key], value), key
    assert any(is_gguf(value) for value in found.values())
    model = build(Ops)
    model.load_state_dict(found, strict=True)
    reference.load_state_dict(dense, strict=True)
    tokens = torch.tensor([[1, 5, 90, 7]])
    outputs = [each(tokens, attention_mask=torch.ones_like(tokens), dtype=torch.float32)[0] for each in (reference, model)]
    assert torch.isfinite(outputs[0]).all()
    assert torch.equal(*outputs)


def test_rows_come_back_in_order() -> None:
    """Of matrices and biases; an order that is not undone would show."""
    for shape in ((64, 3), (64,)):
        rows = np.random.default_rng(1).normal(size=shape)
        assert not np.array_equal(permuted(rows, 4), rows)
        assert np.array_equal(apart(torch.from_numpy(permuted(rows, 4)), 4).numpy(), rows)


def test_plain_queries_are_put_into_order_too(tmp_path: Path) -> None:
    query = np.random.default_rng(2).normal(size=(64, 8)).astype(np.float16)
    path = write(tmp_path / "plain.gguf", "llama", {"token_embd.weight": query, "blk.0.attn_q.weight": permuted(query, 4)},
                 attention__head_count=4)

    assert torch.equal(read(path)["model.layers.0.self_attn.q_proj.weight"], torch.from_numpy(query))


def test_a_header_without_heads_is_an_error(tmp_path: Path) -> None:
    rows = np.zeros((64, 32), np.float32)
    path = write(tmp_path / "headless.gguf", "llama", {"token_embd.weight": rows, "blk.0.attn_q.weight": rows})

    with pytest.raises(GGUFError, match=r"llama\.attention.head_count is missing"):
        read(path)


@pytest.mark.parametrize("architecture", ["clip", "t5encoder", "flux"])
def test_names_that_are_comfyuis_already_stay(architecture: str, tmp_path: Path) -> None:
    key = "text_model.encoder.layers.0.mlp.fc1.weight"

    assert list(read(write(tmp_path / "own.gguf", architecture, {key: np.zeros((4, 4), np.float32)}))) == [key]


def test_what_no_encoder_needs_is_left_out(tmp_path: Path) -> None:
    """T5's decoder, and Llama's table of rotations."""
    one = np.zeros((4, 4), np.float32)
    t5_file = write(tmp_path / "t5.gguf", "t5",
                    {"token_embd.weight": one, "dec.blk.0.attn_q.weight": one, "output.weight": one})
    llama_file = write(tmp_path / "llama.gguf", "llama", {"token_embd.weight": one, "rope_freqs.weight": one})

    assert (list(read(t5_file)), list(read(llama_file))) == (["shared.weight"], ["model.embed_tokens.weight"])


def test_rows_that_the_file_leaves_out_are_zero(tmp_path: Path) -> None:
    """The converter drops rows that no token has, and ComfyUI's classes count them."""
    table = Ops.Embedding(100, 64, dtype=torch.float32)
    values = np.random.default_rng(3).normal(size=(96, 64)).astype(np.float32)
    path = write(tmp_path / "short.gguf", "qwen3", {"token_embd.weight": (gguf.quants.quantize(values, Q8), Q8)})
    table.load_state_dict({"weight": read(path)["model.embed_tokens.weight"]})
    found = table(torch.tensor([[3, 95, 96, 99]]), out_dtype=torch.float32)

    assert found[0, :2].abs().sum() > 0
    assert not found[0, 2:].any()


SENTENCES = ["a cat sits on the mat", "  two   cats,  one mat ", "the mat the cat the dog", "zebra \u00e9\u00e8 \u4f60 cat"]


def trained(kind: str, **options: Any) -> bytes:
    import sentencepiece
    model = io.BytesIO()
    corpus = [f"{a} {b} sits on the {c}, {d}" for a in ("the", "a", "one") for b in ("cat", "dog", "mat", "bird")
              for c in ("mat", "sun") for d in ("now", "then", "never", "always")]
    sentencepiece.SentencePieceTrainer.train(sentence_iterator=iter(corpus), model_writer=model, vocab_size=300,
                                             model_type=kind, byte_fallback=True, hard_vocab_limit=False, minloglevel=2,
                                             **options)
    return model.getvalue()


def kind_of(words: Any, index: int) -> int:
    """As the converter has it: it writes down a turn of a conversation as a control token, which it is not in the original."""
    if words.is_unknown(index):
        return 2
    if words.is_control(index) or "turn" in words.id_to_piece(index):
        return 3
    return 6 if words.is_byte(index) else 1


@pytest.mark.parametrize(("architecture", "model", "kind", "options"), [
    pytest.param("t5encoder", "t5", "unigram", {"pad_id": 0, "eos_id": 1, "unk_id": 2, "bos_id": -1}, id="umt5"),
    pytest.param("gemma2", "llama", "bpe", {"pad_id": 0, "eos_id": 1, "bos_id": 2, "unk_id": 3, "add_dummy_prefix": False,
                                            "remove_extra_whitespaces": False, "normalization_rule_name": "identity",
                                            "bos_piece": "<bos>", "eos_piece": "<eos>",
                                            "user_defined_symbols": ["<turn>", "  "]},
                 id="gemma2"),
])
def test_a_vocabulary_from_the_header_encodes_as_the_original(architecture: str, model: str, kind: str,
                                                              options: dict[str, Any], tmp_path: Path) -> None:
    import sentencepiece
    proto = trained(kind, **options)
    original = sentencepiece.SentencePieceProcessor(model_proto=proto, add_bos=architecture == "gemma2", add_eos=True)
    ids = range(original.get_piece_size())

    def tokenizer(writer: Any) -> None:
        writer.add_tokenizer_model(model)
        writer.add_token_list([original.id_to_piece(index) for index in ids])
        writer.add_token_scores([original.get_score(index) for index in ids])
        writer.add_token_types([kind_of(original, index) for index in ids])
        writer.add_add_space_prefix(architecture != "gemma2")
        for name in ("bos", "eos", "unk", "pad"):
            if options[f"{name}_id"] >= 0:
                getattr(writer, f"add_{name}_token_id")(options[f"{name}_id"])

    rows = np.zeros((200000, 2), np.float16)
    state_dict = read(write(tmp_path / "words.gguf", architecture, {"token_embd.weight": rows}, tokenizer))
    rebuilt = sentencepiece.SentencePieceProcessor(model_proto=state_dict["spiece_model"].numpy().tobytes(),
                                                   add_bos=architecture == "gemma2", add_eos=True)

    texts = [*SENTENCES, "<turn>cat"] if architecture == "gemma2" else SENTENCES
    assert [rebuilt.encode(text) for text in texts] == [original.encode(text) for text in texts]
    assert rebuilt.pad_id() == original.pad_id()


def test_t5_of_the_size_whose_vocabulary_comfyui_ships_gets_none(tmp_path: Path) -> None:
    """ComfyUI takes a T5 with a vocabulary of its own for another model."""
    path = write(tmp_path / "t5.gguf", "t5encoder", {"token_embd.weight": np.zeros((32128, 2), np.float16)},
                 lambda writer: pieces(writer, "t5"))

    assert list(read(path)) == ["shared.weight"]


def test_a_vocabulary_that_is_needed_and_missing_is_an_error(tmp_path: Path) -> None:
    path = write(tmp_path / "gemma.gguf", "gemma3", {"token_embd.weight": np.zeros((4, 4), np.float32)})

    with pytest.raises(GGUFError, match=r"no tokenizer\.ggml\.scores"):
        read(path)


def test_mistrals_vocabulary_is_the_json_that_comfyui_reads(tmp_path: Path) -> None:
    def tokenizer(writer: Any) -> None:
        writer.add_tokenizer_model("gpt2")
        writer.add_tokenizer_pre("tekken")
        writer.add_token_list(["<unk>", "<s>", "A", "\u0120", "\u00e9", "\u0120A"])
        writer.add_token_types([3, 3, 1, 1, 1, 1])

    path = write(tmp_path / "mistral.gguf", "llama", {"token_embd.weight": np.zeros((6, 4), np.float32)}, tokenizer)
    data = json.loads(read(path)["tekken_model"].numpy().tobytes())

    assert [(each["rank"], each["token_str"]) for each in data["special_tokens"]] == [(0, "<unk>"), (1, "<s>")]
    assert [base64.b64decode(each["token_bytes"]) for each in data["vocab"]] == [b"A", b" ", b"\xe9", b" A"]
    assert data["config"]["default_vocab_size"] == 6
