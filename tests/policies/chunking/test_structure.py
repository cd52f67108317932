"""Which modules are feed-forwards: in ComfyUI's own models by their paths, and what looks like one and is none."""
from __future__ import annotations

import pytest
import torch
from residency.policies.chunking.structure import feed_forwards, is_feed_forward
from support.families import DEAF, FAMILIES
from torch import nn

WIDTH = 32


def sequential() -> nn.Sequential:
    return nn.Sequential(nn.Linear(WIDTH, 96), nn.GELU(), nn.Dropout(0.0), nn.Linear(96, WIDTH))


class Gated(nn.Module):
    """SwiGLU, with a norm."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH)
        self.gate, self.up, self.down = nn.Linear(WIDTH, 64), nn.Linear(WIDTH, 64), nn.Linear(64, WIDTH)

    def forward(self, x: torch.Tensor, *more: torch.Tensor) -> torch.Tensor:
        x = self.norm(x)
        return self.down(nn.functional.silu(self.gate(x)) * self.up(x))


class Conditioned(Gated):
    def forward(self, x: torch.Tensor, vector: torch.Tensor) -> torch.Tensor:  # type: ignore[override]
        return super().forward(x) + vector


class Positions(Gated):
    def __init__(self) -> None:
        super().__init__()
        self.places = nn.Parameter(torch.zeros(1, 64, WIDTH))


class Remembering(Gated):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(WIDTH))


class Listing(Gated):
    def __init__(self) -> None:
        super().__init__()
        self.seen: list[int] = []


class Experts(nn.Module):
    """The whole is none; its experts are."""

    def __init__(self) -> None:
        super().__init__()
        self.experts, self.gate = nn.ModuleList([Gated(), Gated()]), nn.Linear(WIDTH, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        choice = self.gate(x).argmax(-1, keepdim=True)
        return torch.where(choice == 0, self.experts[0](x), self.experts[1](x))


FOUND = {
    "flux": {"double_blocks.0.img_mlp", "double_blocks.0.txt_mlp"},
    "chroma": {"double_blocks.0.img_mlp", "double_blocks.0.txt_mlp"},
    "wan": {"blocks.0.ffn", "blocks.1.ffn"},
    "sd3": {"joint_blocks.0.x_block.mlp", "joint_blocks.0.context_block.mlp", "joint_blocks.1.x_block.mlp"},
    "qwen with a mask": {f"transformer_blocks.{block}.{stream}_mlp" for block in (0, 1) for stream in ("img", "txt")},
    "lumina": {"layers.0.feed_forward", "layers.1.feed_forward", "context_refiner.0.feed_forward",
               "noise_refiner.0.feed_forward"},
    "ltxv": {"transformer_blocks.0.ff", "transformer_blocks.1.ff"},
    "hunyuan": {"double_blocks.0.img_mlp", "double_blocks.0.txt_mlp", "txt_in.individual_token_refiner.blocks.0.mlp",
                "txt_in.individual_token_refiner.blocks.1.mlp"},
    "ernie": {"layers.0.mlp", "layers.1.mlp"},
}


@pytest.mark.parametrize("family", FOUND)
def test_all_of_a_real_model_and_nothing_else(family: str) -> None:
    """No embedding, modulation, attention, or block of them; of Flux, Chroma and HunyuanVideo no single block."""
    model = {**FAMILIES, **DEAF}[family].build()
    names = {id(module): name for name, module in model.named_modules()}

    assert {names[id(module)] for module in feed_forwards(model)} == FOUND[family]


def test_a_unets_are_found_by_their_transformers() -> None:
    model = FAMILIES["sdxl"].build()
    names = {id(module): name for name, module in model.named_modules()}

    found = {names[id(module)] for module in feed_forwards(model)}

    assert found == {name for name in names.values() if name.endswith(".ff")}
    assert len(found) == 7


@pytest.mark.parametrize("made", [sequential, Gated, lambda: nn.Sequential(nn.LayerNorm(WIDTH), sequential())])
def test_is_one(made: type[nn.Module]) -> None:
    assert is_feed_forward(made())


@pytest.mark.parametrize("made", [
    pytest.param(lambda: nn.Linear(WIDTH, WIDTH), id="a layer alone"),
    pytest.param(lambda: nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.SiLU(), nn.Linear(WIDTH, WIDTH)), id="widens nothing"),
    pytest.param(lambda: nn.Sequential(nn.Linear(WIDTH, 96), nn.SiLU(), nn.Linear(96, 48)), id="another width than before"),
    pytest.param(lambda: nn.Sequential(nn.SiLU(), nn.Linear(WIDTH, 96)), id="a modulation"),
    pytest.param(lambda: nn.Sequential(nn.Linear(WIDTH, 96), nn.BatchNorm1d(96), nn.Linear(96, WIDTH)),
                 id="a norm over tokens"),
    pytest.param(lambda: nn.Sequential(nn.Linear(WIDTH, 96), nn.Conv1d(96, 96, 3), nn.Linear(96, WIDTH)), id="a convolution"),
    pytest.param(lambda: nn.Sequential(nn.Linear(WIDTH, 96), nn.LayerNorm((4, 96)), nn.Linear(96, WIDTH)),
                 id="a norm over two dimensions"),
    pytest.param(lambda: nn.Sequential(nn.Linear(WIDTH, 96), nn.Dropout(0.1), nn.Linear(96, WIDTH)), id="random numbers"),
    pytest.param(lambda: nn.MultiheadAttention(WIDTH, 2), id="attention"),
    pytest.param(lambda: nn.ModuleList(sequential()), id="a list"),
    pytest.param(Conditioned, id="takes more than tokens"),
    pytest.param(Positions, id="a weight for each place"),
    pytest.param(Remembering, id="a buffer"),
    pytest.param(Listing, id="a list that may grow"),
    pytest.param(Experts, id="a mixture of experts"),
])
def test_is_none(made: type[nn.Module]) -> None:
    assert not is_feed_forward(made())


def test_experts_are_found_in_their_mixture() -> None:
    mixture = Experts()

    assert set(feed_forwards(mixture)) == set(mixture.experts)


def test_a_module_in_two_places_is_found_once() -> None:
    shared = sequential()

    assert list(feed_forwards(nn.ModuleList([shared, nn.ModuleList([shared])]))) == [shared]


def test_what_a_pack_has_replaced_is_left_alone() -> None:
    """A `forward` of its own, of the module or of a layer in it, as bypassing LoRA have; and hooks."""
    replaced, inner, hooked, before = (sequential() for _ in range(4))
    replaced.forward = lambda x: x  # type: ignore[method-assign]
    inner[0].forward = lambda x: x  # type: ignore[method-assign]
    hooked[1].register_forward_hook(lambda *_: None)
    before.register_forward_pre_hook(lambda *_: None)

    assert not list(feed_forwards(nn.ModuleList([replaced, inner, hooked, before])))


def test_what_is_compiled_is_left_alone() -> None:
    inside = sequential()
    inside.compile()
    block = torch.compile(nn.Sequential(sequential()))

    assert not list(feed_forwards(nn.ModuleList([block, inside])))  # type: ignore[list-item]
