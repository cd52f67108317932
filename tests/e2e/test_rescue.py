"""Out of memory on the simulated accelerator, in every part of a prompt: it costs a repeated step and no other latents."""
from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from conftest import COMFYUI
from e2e.conftest import troubles, wait_for
from support import workflows
from support.server import MB, PromptFailed, Server
from support.workflows import Workflow

DEVICE_MB = 3000
# Small models: two threads that wait for each other are slower on a busy machine.
ONE_THREAD = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
Flow = Callable[[int], Workflow]


def sampler(flow: Workflow, name: str) -> Workflow:
    flow["sample"]["inputs"]["sampler_name"] = name
    return flow


FLOWS: dict[str, Flow] = {
    "plain": lambda seed: workflows.text_to_latent("flux_a", seed=seed),
    "SDE sampler": lambda seed: sampler(workflows.text_to_latent("flux_a", seed=seed, steps=3), "dpmpp_2m_sde"),
    "LoRA": lambda seed: workflows.text_to_latent("flux_a", seed=seed, loras=(("flux_one", 1.0),)),
    "scheduled LoRA": lambda seed: workflows.hooked_lora("flux_a", "flux_one", seed=seed),
    "ControlNet": lambda seed: _seeded(workflows.with_controlnet("flux_a", "flux"), seed),
    "GGUF with LoRA": lambda seed: workflows.text_to_latent("flux_mixed.gguf", seed=seed, loras=(("flux_mixed", 1.0),)),
}


def _seeded(flow: Workflow, seed: int) -> Workflow:
    flow["sample"]["inputs"]["seed"] = seed
    return flow


@pytest.fixture(scope="module")
def server(models: Path, simulated_npu: None, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """With room for everything, until it fails on purpose."""
    with Server(COMFYUI, tmp_path_factory.mktemp("rescue"), models, device_mb=DEVICE_MB, env=ONE_THREAD) as server:
        yield server
        # Whoever looks at weights on a device that is full may be refused too; ComfyUI answers then.
        assert [trouble for trouble in troubles(server) if "out of memory" not in trouble.get("error", "")] == []


def unload(server: Server) -> None:
    """Takes the models off the device; nodes keep their results."""
    server.free(memory=False)
    wait_for(lambda: server.device()["used"] < MB)


@pytest.mark.parametrize("name", FLOWS)
def test_a_failure_while_sampling_changes_nothing(server: Server, name: str) -> None:
    """Wherever it falls: before the first step, in a step, and in the sampler's own arithmetic, which draws the same noise."""
    flow = FLOWS[name]
    server.run(flow(1))
    expected = server.latents()
    count = server.allocations(flow(2))

    more = (1, count // 3, count - 2) if name in ("plain", "SDE sampler") else ()
    repeated = []
    for at in (count // 4, count * 2 // 3, *more):
        server.run(flow(2))  # everything is on the device again, and the node cache holds another seed
        repeated += server.run_failing(flow(1), at)
        assert torch.equal(expected, server.latents())

    assert set(repeated) == ({"sampling", "a sampling step"} if more else {"a sampling step"})


def test_a_failure_while_a_model_is_loaded_changes_nothing(server: Server) -> None:
    """It is loaded with less, and the next prompt loads it as it sees fit."""
    flow = FLOWS["LoRA"]
    server.run(flow(1))
    expected = server.latents()
    server.run(flow(2))
    for at in (2, 4, 30):  # the first two are in the arithmetic of a LoRA, where ComfyUI goes on without it
        unload(server)
        assert "loading" in server.run_failing(flow(1), at)
        assert torch.equal(expected, server.latents())
        server.run(flow(2))


def test_a_failure_while_encoding_text_changes_nothing(server: Server) -> None:
    """With an encoder that is on the device, and with one in GGUF."""
    for clip in ("clip_l", "clip_l_q8.gguf"):
        flows = [workflows.text_to_latent("flux_a", clip=clip) for _ in range(2)]
        flows[1]["positive"]["inputs"]["text"] = "a dog"
        server.run(flows[0])
        expected = server.latents()
        server.run(flows[1])
        for at in (5, 120) if clip == "clip_l" else (40,):
            assert server.run_failing(flows[0], at) == ["a text encoding"]
            assert torch.equal(expected, server.latents())
            server.run(flows[1])


def test_a_decode_and_an_encode_are_repeated_whole_before_comfyui_goes_on_in_tiles(server: Server) -> None:
    """In tiles the image would be another one."""
    plain, full = (lambda seed, vae=vae: workflows.text_to_latent("flux_a", seed=seed, vae=vae) for vae in (None, "taesd"))
    server.run(full(1))
    expected = server.latents("out_vae")
    sampling, whole = server.allocations(plain(2)), server.allocations(full(3))

    repeated = []
    for at in (sampling + 3, (sampling + whole) // 2 - 4, (sampling + whole) // 2 + 20, whole - 6):
        server.run(full(2))
        repeated += server.run_failing(full(1), at)
        assert torch.equal(expected, server.latents("out_vae"))

    assert set(repeated) == {"a VAE decode", "a VAE encode"}


def test_a_lora_is_neither_applied_twice_nor_left_on(server: Server) -> None:
    """Weights that gave their place back are patched where they are: the next prompts start from the file's."""
    with_lora, without = FLOWS["LoRA"], FLOWS["plain"]
    expected = {}
    for name, flow in (("on", with_lora), ("off", without)):
        for seed in (1, 2):
            server.run(flow(seed))
            expected[name, seed] = server.latents()
    assert not torch.equal(expected["on", 1], expected["off", 1])

    server.run(with_lora(3))
    count = server.allocations(with_lora(4))
    assert server.run_failing(with_lora(1), count // 2)
    assert torch.equal(expected["on", 1], server.latents())
    server.run(with_lora(2))
    assert torch.equal(expected["on", 2], server.latents())
    assert server.run_failing(with_lora(1), count // 2)
    server.run(without(2))
    assert torch.equal(expected["off", 2], server.latents())


def test_prompts_go_on_when_somebody_else_takes_the_devices_memory(server: Server) -> None:
    """In the middle of sampling, with a LoRA, and for the prompts after it."""
    flow = workflows.text_to_latent("middle_a", steps=20, loras=(("middle", 1.0),))
    other = workflows.text_to_latent("middle_a", steps=4)
    server.run(flow)
    expected = server.latents()
    server.run(other)
    after = server.latents()
    server.run(FLOWS["plain"](1))  # of another model: nothing is in the cache of nodes
    seen = len(server.events("rescue.repeated"))

    logged = len(server.log())
    prompt = server.queue(flow)
    wait_for(lambda: " 2/20 [" in server.log()[logged:])
    server.shrink(60)  # the model has 71
    try:
        server.finish(prompt)
        assert torch.equal(expected, server.latents())
        repeated = server.events("rescue.repeated")[seen:]
        assert {event["what"] for event in repeated} == {"a sampling step"}
        assert sum(event["freed_bytes"] for event in repeated) > 20 * MB
        server.run(other)
        assert torch.equal(after, server.latents())
    finally:
        server.shrink(DEVICE_MB)


def test_failures_that_keep_coming_end_in_one_clear_error(server: Server) -> None:
    """ComfyUI's own, with our figures; the next prompt works."""
    flow = FLOWS["plain"]
    server.run(flow(1))
    expected = server.latents()
    count = server.allocations(flow(2))
    for at in (3, count // 2):
        with pytest.raises(PromptFailed) as failed:
            server.run_failing(flow(1), at, on=True)
        message = str(failed.value)
        assert message.startswith("NPU out of memory. Tried to allocate")
        assert message.count("Residency freed") == 1
        assert f"of {DEVICE_MB} MB free, Flux has" in message
        told = server.events("rescue.failed")[-1]
        assert 1 <= told["attempts"] <= 5
        server.run(flow(1))
        assert torch.equal(expected, server.latents())
        server.run(flow(2))


def test_cancel_ends_a_prompt_that_is_repeated(server: Server) -> None:
    """Right after the failure."""
    flow = workflows.text_to_latent("flux_a", steps=3000, seed=7)
    seen = len(server.events("rescue.repeated"))
    server.fail(1500)
    prompt = server.queue(flow)
    wait_for(lambda: len(server.events("rescue.repeated")) > seen)
    server.interrupt()

    with pytest.raises(PromptFailed, match="interrupted"):
        server.finish(prompt)


def test_without_the_rescue_the_same_prompt_is_lost(server: Server) -> None:
    """The control: the failures above are real, and the setting turns the rescue off and on between prompts."""
    flow = FLOWS["plain"]
    server.run(flow(1))
    expected = server.latents()
    count = server.allocations(flow(2))
    server.settings("[hybrid_split]\nrescue = false\n")
    with pytest.raises(PromptFailed, match="out of memory"):
        server.run_failing(flow(1), count // 2)

    server.settings("")
    server.run(flow(2))
    assert server.run_failing(flow(1), count // 2)
    assert torch.equal(expected, server.latents())


def test_dynamic_vram_is_rescued(models: Path, simulated_npu: None, tmp_path: Path) -> None:
    """ComfyUI's dynamic patchers give pages back."""
    with Server(COMFYUI, tmp_path, models, device_mb=DEVICE_MB, dynamic_vram=True, env=ONE_THREAD) as server:
        for name in ("LoRA", "GGUF with LoRA"):
            flow = FLOWS[name]
            server.run(flow(1))
            expected = server.latents()
            count = server.allocations(flow(2))
            for at in (1, count // 2):
                assert server.run_failing(flow(1), at)
                assert torch.equal(expected, server.latents())
                server.run(flow(2))
        assert troubles(server) == []
