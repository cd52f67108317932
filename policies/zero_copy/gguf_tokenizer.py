"""Vocabularies from GGUF headers, for the encoders whose tokenizer the host expects among the weights.

The host ships the vocabularies of CLIP, T5, Llama 3 and Qwen. Those of UMT5, mT5 and Gemma it reads from `spiece_model`, a
serialised sentencepiece model, and Mistral's from `tekken_model`, Mistral's own JSON; both as tensors of bytes. The header has
the pieces, so they are written down again. They encode every text as the original does, but are not its bytes: what the header
does not keep (how the vocabulary was trained) is left out.

Sources: https://github.com/google/sentencepiece/blob/master/src/sentencepiece_model.proto for the fields' numbers, and
https://github.com/ggml-org/llama.cpp/blob/master/gguf-py/gguf/constants.py for the keys.
"""
from __future__ import annotations

import base64
import json
import struct
from collections.abc import Iterator
from typing import Any

import torch

from ..files.gguf_header import GGUFError, Header

_NORMAL, _CONTROL, _USER_DEFINED, _BYTE = 1, 3, 4, 6  # sentencepiece's numbers, which ggml took over
_UNIGRAM, _BPE = 1, 2
_VARINT, _BYTES, _FLOAT = 0, 2, 5
# The host ships the vocabulary of T5, which has 32128 rows; those that it does not ship are ten times as large.
_SHIPPED_ROWS = 2**17


def of(header: Header) -> dict[str, torch.Tensor]:
    """What goes into the state dict: nothing where the host has the vocabulary itself.

    Raises:
        GGUFError: the vocabulary is needed, and is not in the file.
    """
    architecture, model = header.architecture, header.kv.get("tokenizer.ggml.model")
    if architecture in ("t5", "t5encoder") and header.tensors["token_embd.weight"].shape[0] > _SHIPPED_ROWS:
        return {"spiece_model": _tensor(_spiece(header, _UNIGRAM))}
    if architecture in ("gemma2", "gemma3"):
        return {"spiece_model": _tensor(_spiece(header, _BPE))}
    if architecture in ("llama", "mistral3") and model == "gpt2" and header.kv.get("tokenizer.ggml.pre") == "tekken":
        return {"tekken_model": _tensor(_tekken(header))}
    return {}


def _tensor(data: bytes) -> torch.Tensor:
    return torch.frombuffer(bytearray(data), dtype=torch.uint8)


def _array(header: Header, name: str) -> Any:
    values = header.kv.get(f"tokenizer.ggml.{name}")
    if values is None or not len(values):
        raise GGUFError(f"{header.path}: the header has no tokenizer.ggml.{name}, without which ComfyUI cannot read a prompt "
                        "for this encoder. Take a file that was converted with its tokenizer")
    return values


def _spiece(header: Header, algorithm: int) -> bytes:
    pieces = list(_pieces(header, algorithm))
    model = b"".join(_field(1, _field(1, piece.encode()) + _field(2, score) + _field(3, kind))
                     for piece, score, kind in pieces)
    trainer = _field(3, algorithm) + _field(4, len(pieces)) + _field(35, any(kind == _BYTE for _, _, kind in pieces))
    for number, of_piece, name in ((40, 45, "unknown"), (41, 46, "bos"), (42, 47, "eos"), (43, 48, "padding")):
        token = header.kv.get(f"tokenizer.ggml.{name}_token_id")
        if isinstance(token, int) and token < len(pieces):
            trainer += _field(number, token) + _field(of_piece, pieces[token][0].encode())
        else:
            trainer += _field(number, -1)
    normalizer = _field(3, bool(header.kv.get("tokenizer.ggml.add_space_prefix", True)))
    normalizer += _field(4, bool(header.kv.get("tokenizer.ggml.remove_extra_whitespaces", algorithm == _UNIGRAM)))
    normalizer += _field(5, True)  # spaces become U+2581
    characters = header.kv.get("tokenizer.ggml.precompiled_charsmap")
    if characters is not None:
        normalizer += _field(2, characters.tobytes())
    return model + _field(2, trainer) + _field(3, normalizer)


def _pieces(header: Header, algorithm: int) -> Iterator[tuple[str, float, int]]:
    """Text, score and type of each piece."""
    scores, kinds = _array(header, "scores").tolist(), _array(header, "token_type").tolist()
    for index, (piece, score, kind) in enumerate(zip(_array(header, "tokens"), scores, kinds, strict=True)):
        if algorithm == _BPE and kind == _CONTROL and index > 3:
            # Turns and the like, which the original finds in a text; the first four are the ends, the padding and the unknown.
            kind = _USER_DEFINED
        if algorithm == _BPE and kind == _USER_DEFINED:
            piece = piece.replace(" ", "\u2581")  # the converter wrote runs of spaces as they are in a text
        yield piece, score, kind


def _field(number: int, value: int | float | bytes) -> bytes:
    """A field of a protobuf message, https://protobuf.dev/programming-guides/encoding."""
    if isinstance(value, bytes):
        return _varint(number << 3 | _BYTES) + _varint(len(value)) + value
    if isinstance(value, float):
        return _varint(number << 3 | _FLOAT) + struct.pack("<f", value)
    return _varint(number << 3 | _VARINT) + _varint(value % 2**64)


def _varint(value: int) -> bytes:
    out = bytearray()
    while value > 127:
        out.append(value & 127 | 128)
        value >>= 7
    out.append(value)
    return bytes(out)


def _tekken(header: Header) -> bytes:
    """Mistral's JSON: special tokens first, then the byte strings of the rest, each in the order of its rank."""
    tokens, kinds = _array(header, "tokens"), _array(header, "token_type").tolist()
    special: list[dict[str, Any]] = []
    vocabulary: list[dict[str, Any]] = []
    for index, (token, kind) in enumerate(zip(tokens, kinds, strict=True)):
        if kind != _NORMAL:
            special.append({"rank": index, "token_str": token, "is_control": True})
            continue
        data = bytes(_BYTE_OF[each] for each in token) if all(each in _BYTE_OF for each in token) else token.encode()
        vocabulary.append({"rank": len(vocabulary), "token_bytes": base64.b64encode(data).decode(),
                           "token_str": data.decode("utf-8", "replace")})
    sizes = {"num_vocab_tokens": len(vocabulary), "default_vocab_size": len(tokens)}
    return json.dumps({"config": sizes, "vocab": vocabulary, "special_tokens": special}).encode()


def _byte_characters() -> dict[str, int]:
    """GPT-2's letters for bytes: printable ones stand for themselves, the others follow from U+0100."""
    printable = {*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = (byte for byte in range(256) if byte not in printable)
    return {chr(byte): byte for byte in printable} | {chr(256 + index): byte for index, byte in enumerate(others)}


_BYTE_OF = _byte_characters()
