"""Bad files and bad moments: ComfyUI's own error or one line that names the file and the cure, the server lives, the next
good prompt succeeds, and nothing stays half swapped."""
from __future__ import annotations

import json
import os
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from conftest import COMFYUI
from e2e.conftest import SMALL_DEVICE_MB
from support import workflows
from support.server import TESTING_NODES, PromptFailed, Server

GOOD = workflows.text_to_latent("flux_a")


@pytest.fixture(scope="module")
def own_models(models: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A models folder whose small files may be spoilt."""
    folder = tmp_path_factory.mktemp("models")
    for kind in ("diffusion_models", "text_encoders", "loras", "vae"):
        (folder / kind).mkdir()
    for name in ("text_encoders/clip_l", "loras/flux_one"):
        (folder / f"{name}.safetensors").symlink_to(models / f"{name}.safetensors")
    for name in ("flux_a", "flux_b", "flux_a_fp32", "flux_b_fp32"):
        shutil.copy(models / f"diffusion_models/{name}.safetensors", folder / "diffusion_models")
    return folder


@pytest.fixture(scope="module", params=["cpu", "npu"])
def server(request: pytest.FixtureRequest, own_models: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    device_mb = None
    if request.param == "npu":
        request.getfixturevalue("simulated_npu")
        device_mb = SMALL_DEVICE_MB
    with Server(COMFYUI, tmp_path_factory.mktemp("plugin"), own_models, device_mb=device_mb, packs=[TESTING_NODES]) as server:
        yield server
        assert [event for event in server.events() if event["event"] in ("hook.failed", "policy.failed")] == []


@pytest.fixture
def twins(server: Server) -> tuple[str, str]:
    """Two models that are mapped here: the CPU computes in float32, so there a bf16 file would be converted."""
    return ("flux_a", "flux_b") if server.simulated else ("flux_a_fp32", "flux_b_fp32")


@pytest.fixture(scope="module")
def good(server: Server) -> torch.Tensor:
    server.run(GOOD)
    return server.latents()


def fails(server: Server, workflow: workflows.Workflow) -> str:
    with pytest.raises(PromptFailed) as failure:
        server.run(workflow)
    return str(failure.value)


def still_works(server: Server, good: torch.Tensor, seed: int = 1) -> None:
    flow = workflows.text_to_latent("flux_a", seed=seed)
    flow["sample"]["inputs"]["steps"] = 3  # not what the node cache holds
    server.run(flow)
    flow["sample"]["inputs"]["steps"] = 2
    server.run(flow)
    assert torch.equal(good, server.latents())


def header(file: Path) -> tuple[dict[str, dict[str, object]], bytes]:
    data = file.read_bytes()
    size = int.from_bytes(data[:8], "little")
    return json.loads(data[8:8 + size]), data[8 + size:]


def with_header(file: Path, change: Callable[[dict[str, dict[str, object]]], object]) -> None:
    entries, body = header(file)
    change(entries)
    text = json.dumps(entries).encode()
    file.write_bytes(len(text).to_bytes(8, "little") + text + body)


def first_two(entries: dict[str, dict[str, object]]) -> list[dict[str, object]]:
    return [entry for name, entry in entries.items() if name != "__metadata__"][:2]


SPOILERS: dict[str, Callable[[Path], object]] = {
    "truncated": lambda file: os.truncate(file, file.stat().st_size // 2),
    "header longer than the file": lambda file: file.write_bytes((2**40).to_bytes(8, "little") + file.read_bytes()[8:]),
    "offsets past the end": lambda file: with_header(file, lambda e: first_two(e)[0].update(data_offsets=[0, 2**40])),
    "overlapping tensors": lambda file: with_header(
        file, lambda e: first_two(e)[1].update(data_offsets=first_two(e)[0]["data_offsets"])),
    "a dtype that does not fit": lambda file: with_header(file, lambda e: first_two(e)[0].update(dtype="F64")),
    "a dtype that does not exist": lambda file: with_header(file, lambda e: first_two(e)[0].update(dtype="Q17")),
    "no bytes": lambda file: file.write_bytes(b""),
}


@pytest.mark.parametrize("spoil", SPOILERS.values(), ids=SPOILERS)
def test_a_bad_file_is_an_error_of_one_prompt(server: Server, good: torch.Tensor, own_models: Path,
                                              spoil: Callable[[Path], object]) -> None:
    """The prompt fails with ComfyUI's message, nothing stays mapped, and a good prompt follows."""
    bad = own_models / "diffusion_models" / "bad.safetensors"
    bad.unlink(missing_ok=True)
    shutil.copy(own_models / "diffusion_models" / "flux_b.safetensors", bad)
    spoil(bad)

    message = fails(server, workflows.text_to_latent("bad"))

    assert message
    assert server.maps("bad.safetensors") == []
    still_works(server, good)


def test_a_truncated_file_is_named_with_the_cure(server: Server, own_models: Path) -> None:
    """ComfyUI's message does not always give the path; a line of ours does."""
    bad = own_models / "diffusion_models" / "bad.safetensors"
    bad.write_bytes((own_models / "diffusion_models" / "flux_b.safetensors").read_bytes()[:-4096])

    fails(server, workflows.text_to_latent("bad"))

    lines = [line for line in server.log().splitlines() if "file.unreadable" in line]
    assert str(server.base / "models" / "diffusion_models" / "bad.safetensors") in lines[-1]
    assert "download or copy it again" in lines[-1]


def test_a_directory_is_an_error_of_one_prompt(server: Server, good: torch.Tensor, own_models: Path) -> None:
    """A folder with a weight file's name is refused by ComfyUI, as ever."""
    folder = own_models / "diffusion_models" / "folder.safetensors"
    folder.mkdir(exist_ok=True)

    assert fails(server, workflows.text_to_latent("folder"))
    still_works(server, good)
    folder.rmdir()


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_no_permission_is_an_error_of_one_prompt(server: Server, good: torch.Tensor, own_models: Path) -> None:
    """A file that may not be read fails with the system's message."""
    bad = own_models / "diffusion_models" / "bad.safetensors"
    bad.chmod(0)

    assert fails(server, workflows.text_to_latent("bad"))
    bad.chmod(0o644)
    still_works(server, good)


def reuse(server: Server, seed: int) -> None:
    """Runs a prompt on a model that ComfyUI has in its cache."""
    server.run(workflows.text_to_latent("reused", seed=seed))


def test_a_file_replaced_between_prompts_serves_the_model_it_made(server: Server, own_models: Path) -> None:
    """As with ComfyUI alone, a cached model goes on with the weights that it was built from; a new load reads the new file."""
    file = own_models / "diffusion_models" / "reused.safetensors"
    shutil.copy(own_models / "diffusion_models" / "flux_a.safetensors", file)
    reuse(server, 1)
    expected = server.latents()
    new = file.with_suffix(".new")
    shutil.copy(own_models / "diffusion_models" / "flux_b.safetensors", new)
    new.replace(file)

    reuse(server, 2)
    reuse(server, 1)
    assert torch.equal(expected, server.latents())

    server.free()
    server.run(workflows.text_to_latent("flux_b"))
    of_the_new_file = server.latents()
    reuse(server, 1)
    assert torch.equal(of_the_new_file, server.latents())


def test_a_file_overwritten_between_prompts_is_loaded_again(server: Server, own_models: Path, twins: tuple[str, str]) -> None:
    """Writing into a mapped file changes the weights under a cached model, so the models are built anew, and that is said."""
    file = own_models / "diffusion_models" / "overwritten.safetensors"
    shutil.copy(own_models / "diffusion_models" / f"{twins[0]}.safetensors", file)
    server.run(workflows.text_to_latent("overwritten"))
    with file.open("r+b") as stream:
        stream.write((own_models / "diffusion_models" / f"{twins[1]}.safetensors").read_bytes())

    server.run(workflows.text_to_latent("overwritten", seed=2))
    found = server.latents()

    server.run(workflows.text_to_latent(twins[1], seed=2))
    assert torch.equal(server.latents(), found)
    assert "overwritten.safetensors" in [event["file"] for event in server.events("file.changed")]


def test_a_file_truncated_between_prompts_fails_one_prompt(server: Server, good: torch.Tensor, own_models: Path,
                                                           twins: tuple[str, str]) -> None:
    """Pages past the end of a mapped file would kill the process; the prompt fails with an error instead."""
    file = own_models / "diffusion_models" / "shrunk.safetensors"
    shutil.copy(own_models / "diffusion_models" / f"{twins[1]}.safetensors", file)
    server.run(workflows.text_to_latent("shrunk"))
    os.truncate(file, 100_000)

    assert fails(server, workflows.text_to_latent("shrunk", seed=2))
    assert "shrunk.safetensors" in [event["file"] for event in server.events("file.changed")]
    still_works(server, good)


def test_cancel_while_a_model_is_built(server: Server, good: torch.Tensor) -> None:
    """The host's own Cancel goes up through our hooks as it is, and nothing stays mapped half built."""
    flow = workflows.text_to_latent("flux_b")
    flow["model"] = workflows.node("CancelWhileBuilding", unet_name="flux_b.safetensors")

    assert fails(server, flow) == "interrupted"
    still_works(server, good)


def test_cancel_while_sampling(server: Server, good: torch.Tensor) -> None:
    """The Cancel button works in the middle of a prompt."""
    prompt = server.queue(workflows.text_to_latent("flux_a", steps=3000))
    time.sleep(1.5)
    server.interrupt()

    with pytest.raises(PromptFailed, match="interrupted"):
        server.finish(prompt)
    still_works(server, good)
