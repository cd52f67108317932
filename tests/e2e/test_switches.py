"""Settings and switches, on a running server and at start."""
from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from conftest import COMFYUI
from e2e.conftest import troubles
from support import workflows
from support.server import Server

FLOW = workflows.text_to_latent("flux_a_fp32")


@pytest.fixture(scope="module")
def server(models: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with Server(COMFYUI, tmp_path_factory.mktemp("plugin"), models) as server:
        server.run(FLOW)
        yield server


def set_(server: Server, text: str) -> None:
    """Writes the user's settings and runs a prompt, before which they are read."""
    server.settings(text)
    server.run(workflows.text_to_latent("flux_a_fp32", seed=abs(hash(text)) % 1000))


def test_bad_settings_keep_the_last_good_ones(server: Server) -> None:
    """One line names the file, the key and the nearest match; the next good file is taken."""
    set_(server, "[zero_copy]\nkep_gb = 1\n")

    lines = [line for line in server.log().splitlines() if "kep_gb" in line]
    assert len(lines) == 1
    assert str(server.base / "user" / "residency" / "settings.toml") in lines[0]
    assert "'zero_copy.kep_gb', perhaps you meant 'keep_gb'" in lines[0]

    set_(server, "[zero_copy]\nkeep_gb = 1\n")
    assert server.events("settings.changed")[-1]["policies"] == ["hybrid_split", "preload_cache", "zero_copy"]


def test_settings_that_are_not_toml_are_named(server: Server) -> None:
    """The prompt runs, and one line says which file to mend."""
    set_(server, "policies = [\n")

    assert [line for line in server.log().splitlines() if "this is not TOML" in line and "settings.toml" in line]


def test_a_policy_is_turned_off_and_on_between_prompts(server: Server) -> None:
    """Models that are mapped stay so; the next load is ComfyUI's own, and after turning on it is mapped again."""
    set_(server, "policies = []\n")
    before = len(server.events("weights.mapped"))
    server.run(workflows.text_to_latent("flux_b_fp32"))
    off = server.latents()
    assert len(server.events("weights.mapped")) == before

    set_(server, "")
    server.run(workflows.text_to_latent("sd3", clip_type="sd3"))  # ComfyUI drops the other models
    server.run(workflows.text_to_latent("flux_b_fp32"))
    assert "flux_b_fp32.safetensors" in [event["file"] for event in server.events("weights.mapped")[before:]]
    assert torch.equal(off, server.latents())


def test_a_telemetry_file_that_cannot_be_written_costs_one_line(server: Server) -> None:
    """The file's name and the cure are in the line, and prompts go on."""
    set_(server, f"[telemetry]\nfile = '{server.log_file}/below/a/file.jsonl'\n")

    lines = [line for line in server.log().splitlines() if "cannot be written" in line]
    assert len(lines) == 1
    assert "telemetry.file" in lines[0]


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full")
def test_a_full_disk_costs_one_line(server: Server) -> None:
    """Telemetry stops, says so once, and the prompt succeeds."""
    set_(server, "[telemetry]\nfile = '/dev/full'\n")
    server.run(FLOW)

    assert len([line for line in server.log().splitlines() if "telemetry" in line and "/dev/full" in line]) == 1


def start(models: Path, folder: Path, **options: object) -> Server:
    return Server(COMFYUI, folder, models, **options)  # type: ignore[arg-type]


def test_an_unknown_setting_at_start_leaves_the_plugin_dormant(models: Path, tmp_path: Path) -> None:
    """ComfyUI starts and works as without us, and one line says what to mend."""
    with start(models, tmp_path, settings="polices = []\n") as server:
        server.run(FLOW)

        lines = [line for line in server.log().splitlines() if "[residency]" in line]
        assert len(lines) == 1
        assert "'polices', perhaps you meant 'policies'" in lines[0]
        assert server.events() == []


def test_the_kill_switch_leaves_no_trace(models: Path, tmp_path: Path) -> None:
    """RESIDENCY_DISABLE=1 installs nothing and says nothing."""
    with start(models, tmp_path, env={"RESIDENCY_DISABLE": "1"}) as server:
        server.run(FLOW)

        assert "[residency]" not in server.log()
        assert server.events() == []


def test_disable_mmap_is_the_users_word(models: Path, tmp_path: Path) -> None:
    """With --disable-mmap zero_copy steps aside, says so once, and nothing is mapped."""
    with start(models, tmp_path, args=["--disable-mmap"]) as server:
        server.run(FLOW)

        declined = server.events("policy.declined")
        assert [(event["policy"], "--disable-mmap" in event["reason"]) for event in declined] == [("zero_copy", True)]
        assert server.maps("flux_a_fp32.safetensors") == []
        assert [event for event in troubles(server) if event["event"] != "policy.declined"] == []
