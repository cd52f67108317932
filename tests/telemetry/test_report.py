"""`python -m telemetry report` on files that telemetry wrote itself, and on ones that went wrong."""
from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from residency import telemetry
from residency.telemetry import emit
from residency.telemetry.__main__ import DEFAULT, main
from residency.telemetry.sinks import JsonLines

PLUGIN = Path(telemetry.__file__).parents[1]
MB = 2**20

EXPECTED = """\
prompt  id        ok   seconds  placing  read MB  private MB  file MB  cuda:0 MB  cuda:1 MB
------  --------  ---  -------  -------  -------  ----------  -------  ---------  ---------
     1  1ec408c7  yes     4.21     1.04      807        1484     2195        877          -
     2  004240a2  no      3.00     0.50        0        1498     2195        891         12

predicted by      prompt  dispatch  compute  transfer  sent MB  received MB  speed-up  MB of workers  private
----------------  ------  --------  -------  --------  -------  -----------  --------  -------------  --------
rows 4, tiles 12       1      0.10     2.00      0.05        3            1      1.80  548, 549       440, 441
rows 2, local 1        2         -        -         -        -            -         -  -              -

not by  prompt  why
------  ------  ----------------------------------
heads        2  no attention of it could be shared
local        2  a b c

model         placed  seconds  device MB  mapped MB  host MB  released  released MB  seconds
------------  ------  -------  ---------  ---------  -------  --------  -----------  -------
Flux               2     0.75        500        307        1         1          807     0.25
SD1ClipModel       0     0.00          -          -        -         1          236     0.10

split         device  mode    figure      rule        budget MB  device MB  streamed MB
------------  ------  ------  ----------  ----------  ---------  ---------  -----------
Flux          cuda:0  hybrid  the rule's  flux*.gguf        600        598          200
SD1ClipModel  cuda:0  pages   the rule's  -                 100          -            -

file                  mapped  mapped MB  copied MB  from bank  released
--------------------  ------  ---------  ---------  ---------  --------
big_flux.safetensors       2       1614          3          1  unknown
模型.safetensors           0          0          0          0  yes
gone.safetensors           0          0          0          0  no
idle.safetensors           0          0          0          2  -

GGUF       architecture  header seconds  types
---------  ------------  --------------  ---------------------
flux.gguf  flux                    0.04  Q4_K 700 MB, F32 2 MB

kept     hits  misses  seconds of hits  evicted  why it missed or left last
-------  ----  ------  ---------------  -------  --------------------------
a.sft       2       1             0.50        1  over the budget
new.sft     0       1             0.00        0  not loaded before

out of memory in  model  repeated  freed MB  seconds to free
----------------  -----  --------  --------  ---------------
a sampling step   Flux          2       900             0.75
loading           Flux          1         0             0.25

event               about                                   times  why
------------------  --------------------------------------  -----  -------------------------------------
hook.declined       comfy.utils.load_torch_file                 1  the host has no parameter 'ckpt'
hook.shadowed       comfy.model_management.load_models_gpu      1  custom_nodes.multigpu
hook.retired        comfy.sd.VAE.__init__                       1  another plugin wrapped on top of it
hook.failed         comfy.sd.VAE.__init__                       1  KeyError: 'sd'
policy.declined     zero_copy                                   2  --disable-mmap
policy.ineffective  zero_copy                                   1  Flux copies its weights
policy.failed       zero_copy                                   1  RuntimeError: Error(s): size mismatch
file.changed        big_flux.safetensors                        1  it was overwritten
cache.skipped       main model                                  1  there is no 'a'
rescue.failed       Flux                                        1  NPU out of memory
worker.lost         cuda:1                                      1  it is dead
shard.broken        workers                                     1  ImportError: no comfy

total
---------------------------  ----
prompts                         2
prompts that failed             1
seconds                      7.21
seconds placing models       1.54
MB read from storage          807
MB restored without a copy    900
MB restored with a copy         7
MB dequantised               1800
seconds dequantising, about  0.25
"""


@pytest.fixture
def file(tmp_path: Path) -> Iterator[Path]:
    """A telemetry file that is being written."""
    sink = telemetry.attach(JsonLines(tmp_path / "telemetry.jsonl", 1, 4))
    yield tmp_path / "telemetry.jsonl"
    telemetry.detach(sink)


def emit_weights() -> None:
    """What happens to models and files in two prompts."""
    for source in ("file", "bank"):
        emit("weights.read", file="big_flux.safetensors", bytes=807 * MB, seconds=0.02, source=source)
        emit("weights.mapped", file="big_flux.safetensors", bytes=807 * MB, copied_bytes=1.5 * MB, seconds=0.02)
    emit("weights.released", file="big_flux.safetensors", bytes=807 * MB, unmapped=None)
    emit("weights.released", file="模型.safetensors", bytes=MB, unmapped=True)
    emit("weights.released", file="gone.safetensors", bytes=MB, unmapped=False)
    emit("weights.released", file="idle.safetensors", bytes=MB, unmapped=True)
    for _ in range(2):
        emit("weights.read", file="idle.safetensors", bytes=MB, seconds=0.0, source="bank")
    emit("split.planned", model="Flux", device="cuda:0", mode="hybrid", figure="the rule's", predicted_bytes=598 * MB,
         streamed_bytes=200 * MB, rule="flux*.gguf", budget_bytes=600 * MB)
    emit("split.capped", model="SD1ClipModel", device="cuda:0", figure="the rule's", budget_bytes=100 * MB)
    emit("gguf.read", file="flux.gguf", architecture="flux", header_seconds=0.044,
         types_bytes={"F32": 2 * MB, "Q4_K": 700 * MB})
    emit("gguf.dequantised", prompt="1ec408c7-4a5d", bytes=900 * MB, seconds=0.25)
    emit("gguf.dequantised", prompt="004240a2-4a5d", bytes=900 * MB, seconds=None)
    for seconds, placed, mapped in ((0.5, 807 * MB, 0), (0.25, 500 * MB, 307 * MB)):
        emit("model.placed", model="Flux", device="cuda:0", seconds=seconds, device_bytes=placed, mapped_bytes=mapped,
             host_bytes=MB)
    emit("model.released", model="Flux", device="cuda:0", bytes=807 * MB, seconds=0.25, partly=False)
    emit("model.released", model="SD1ClipModel", device="cuda:0", bytes=236 * MB, seconds=0.1, partly=True)
    emit("weights.restored", model="Flux", bytes=800 * MB, copied_bytes=7 * MB, seconds=0.1)
    emit("weights.restored", model="Flux", bytes=100 * MB, copied_bytes=0, seconds=0.1)


def emit_kept() -> None:
    """One model that was kept for a while, and one that is new."""
    emit("cache.miss", model="a.sft", reason="not loaded before")
    for _ in range(2):
        emit("cache.hit", model="a.sft", bytes=MB, seconds=0.25)
    emit("cache.evicted", model="a.sft", bytes=MB, private_bytes=0, reason="over the budget")
    emit("cache.miss", model="new.sft", reason="not loaded before")


def emit_trouble() -> None:
    """One of everything that a user may have to act on."""
    emit("hook.installed", hook="comfy.sd.VAE.__init__", exercised=True)
    emit("hook.declined", hook="comfy.utils.load_torch_file", reason="the host has no parameter 'ckpt'")
    emit("hook.shadowed", hook="comfy.model_management.load_models_gpu", by="custom_nodes.multigpu")
    emit("hook.retired", hook="comfy.sd.VAE.__init__")
    emit("hook.failed", hook="comfy.sd.VAE.__init__", error="KeyError: 'sd'")
    for _ in range(2):
        emit("policy.declined", policy="zero_copy", reason="--disable-mmap")
    emit("policy.ineffective", policy="zero_copy", predicted_bytes=9, observed_bytes=0, reason="Flux copies its weights")
    emit("policy.failed", policy="zero_copy", request="FillModule", error="RuntimeError: Error(s):\n\tsize mismatch")
    emit("file.changed", file="big_flux.safetensors", reason="it was overwritten")
    emit("cache.skipped", model="main model", reason="there is no 'a'")
    emit("rescue.failed", what="sampling", model="Flux", attempts=5, freed_bytes=900 * MB, error="NPU out of memory")
    emit("worker.lost", worker=1, device="cuda:1", reason="it is dead")
    emit("worker.replaced", worker=1, device="cuda:1", seconds=6.0)
    emit("shard.broken", reason="ImportError: no comfy")


def emit_repeated() -> None:
    """Two repeats of a step, and one of a load."""
    for attempt in (1, 2):
        emit("rescue.repeated", what="a sampling step", model="Flux", attempt=attempt, freed_bytes=450 * MB, seconds=0.375,
             error="out of memory")
    emit("rescue.repeated", what="loading", model="Flux", attempt=1, freed_bytes=0, seconds=0.25, error="out of memory")


def emit_first() -> None:
    """A prompt."""
    emit("prompt.finished", prompt="1ec408c7-4a5d", ok=True, seconds=4.21, placing_seconds=1.04, read_bytes=807 * MB,
         private_bytes=1484 * MB, file_bytes=2195 * MB, device_bytes={"cuda:0": 877 * MB}, policies={})


def emit_shards() -> None:
    """Two prompts by workers, of which the first is told of in full, just before it ends, and what they hold just after."""
    emit("shard.workers", private_bytes={"worker 0": MB}, shared_bytes={"worker 0": MB}, free_bytes={"worker 0": MB})
    emit("shard.finished", calls={"rows": 4, "tiles": 12}, dispatch_seconds=0.1, compute_seconds=2.0, transfer_seconds=0.05,
         sent_bytes=3 * MB, received_bytes=MB, speedup=1.8)
    emit_first()
    emit("shard.workers", private_bytes={"worker 0": 440 * MB, "worker 1": 441 * MB},
         shared_bytes={"worker 0": 548 * MB, "worker 1": 549 * MB}, free_bytes={"worker 0": MB, "worker 1": MB})
    emit("shard.finished", calls={"rows": 2, "local": 1},
         why={"heads": "no attention of it could be shared", "local": "a\nb\tc"})
    emit_second()


def emit_prompts() -> None:
    """Two prompts."""
    emit_first()
    emit_second()


def emit_second() -> None:
    """One that fails, with a second device."""
    emit("prompt.finished", prompt="004240a2-4a5d", ok=False, seconds=3.0, placing_seconds=0.5, read_bytes=0,
         private_bytes=1498 * MB, file_bytes=2195 * MB, device_bytes={"cuda:0": 891 * MB, "cuda:1": 12 * MB}, policies={})


def numbers(text: str) -> list[str]:
    """The ids in the table of prompts."""
    return re.findall(r"^ +\d+  (\S+)", text, re.MULTILINE)


def test_tables_are_aligned_and_complete(file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Everything that a bug report or a tuning user needs, in plain text that survives a paste."""
    emit_weights()
    emit_trouble()
    emit_kept()
    emit_repeated()
    emit_shards()
    assert main(["report", str(file)]) == 0
    assert capsys.readouterr().out == EXPECTED


def test_table_without_rows_is_left_out(file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A day on which nothing went wrong says nothing of what can."""
    emit_prompts()
    main(["report", str(file)])
    heads = [block.split()[0] for block in capsys.readouterr().out.split("\n\n")]
    assert heads == ["prompt", "total"]


def test_rotated_files_are_read_first_oldest_first(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """`.10` is older than `.9`, and a neighbour with a longer name is none of ours."""
    for name in ("t.jsonl.10", "t.jsonl.9", "t.jsonl.1", "t.jsonl", "t.jsonl.bak", "t.jsonl2.1"):
        (tmp_path / name).write_text(f'{{"event": "prompt.finished", "prompt": "{name[-4:]}"}}\n')
    main(["report", str(tmp_path / "t.jsonl")])
    assert numbers(capsys.readouterr().out) == ["l.10", "nl.9", "nl.1", "sonl"]


def test_rotated_files_are_read_where_the_latest_is_gone(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Between a rotation and the next event."""
    (tmp_path / "t.jsonl.1").write_text('{"event": "prompt.finished", "prompt": "a"}\n')
    assert main(["report", str(tmp_path / "t.jsonl")]) == 0
    assert numbers(capsys.readouterr().out) == ["a"]


def test_broken_lines_are_skipped_and_counted(file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A crash leaves half a line, and an editor whatever it likes."""
    emit_prompts()
    with file.open("ab") as lines:
        lines.write(b'\n[1]\n"x"\nnull\n{"at": 1}\n{"event": 5}\n\xff\xfe\n\n  \n')
        lines.write(b"9" * 5000 + b"\n" + b"[" * 100_000 + b"\n")
        lines.write(b'{"at": 1.0, "event": "prompt.fin')
    assert main(["report", str(file)]) == 0
    out = capsys.readouterr().out
    assert numbers(out) == ["1ec408c7", "004240a2"]
    assert out.endswith("\n\n9 broken lines were skipped.\n")


def test_fields_that_are_missing_or_odd_count_as_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Another version of the plugin wrote the file."""
    (tmp_path / "t.jsonl").write_text("".join(f'{{"event": "{name}"{fields}}}\n' for name in (
        "prompt.finished", "model.placed", "model.released", "weights.read", "weights.mapped", "weights.released",
        "weights.restored", "hook.failed", "policy.ineffective", "shard.finished", "shard.workers", "brand.new") for fields in (
        "", ', "seconds": "x", "bytes": [], "device_bytes": 5, "model": {}, "file": 7, "unmapped": [], "reason": null, '
        '"calls": 3, "why": [], "private_bytes": 5, "shared_bytes": {"worker 0": "x"}',
        ', "seconds": NaN, "bytes": Infinity, "device_bytes": {"cuda:0": null}, "placing_seconds": 1e999')))
    assert main(["report", str(tmp_path / "t.jsonl")]) == 0
    out = capsys.readouterr().out
    assert numbers(out) == ["unknown", "unknown", "unknown"]
    assert ["prompts", "3"] in [line.split() for line in out.splitlines()]
    assert "nan" not in out
    assert "inf" not in out


def test_empty_file_says_that_nothing_happened_yet(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """ComfyUI was started, and no more."""
    file = tmp_path / "t.jsonl"
    file.touch()
    assert main(["report", str(file)]) == 0
    assert capsys.readouterr().out == f"{file}: no events yet. Queue a prompt in ComfyUI, then run this again.\n"


@pytest.mark.parametrize("name", ["t.jsonl", "none/t.jsonl"])
def test_missing_file_is_one_line_with_the_cure(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Exit status 2, like a wrong option."""
    assert main(["report", str(tmp_path / name)]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err == f"{tmp_path / name}: no such file. Queue a prompt in ComfyUI first (with telemetry.file set in " \
        "settings.toml), or name the file: python -m telemetry report FILE\n"


def test_folder_for_a_file_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Whatever cannot be read is named, without a traceback."""
    assert main(["report", str(tmp_path)]) == 2
    err = capsys.readouterr().err
    assert err.startswith(f"{tmp_path}: cannot be read (")
    assert err.count("\n") == 1


def test_default_is_where_comfyui_keeps_it() -> None:
    """Two folders above the plugin's is ComfyUI's."""
    assert PLUGIN.parents[1] / "user" / "residency" / "telemetry.jsonl" == DEFAULT


@pytest.mark.parametrize("arguments", [[], ["--help"], ["report", "--help"]])
def test_usage_is_printed(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    """Without a command there is nothing to do but to say which there are."""
    try:
        status = main(arguments)
    except SystemExit as stop:
        assert stop.code == 0
        status = 0
    assert status == 0
    assert capsys.readouterr().out.startswith("usage: python -m telemetry")


def test_runs_in_the_plugins_folder_with_the_standard_library_alone(file: Path) -> None:
    """`-S` hides every installed package, and Python's own folder is no place to leave traces in."""
    emit_prompts()
    done = subprocess.run([sys.executable, "-S", "-B", "-m", "telemetry", "report", file], cwd=PLUGIN, capture_output=True,
                          text=True, encoding="utf-8", timeout=60, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    assert numbers(done.stdout) == ["1ec408c7", "004240a2"]


def test_console_that_cannot_show_a_name_is_no_error(file: Path) -> None:
    """Windows' code pages know few models' names."""
    emit("model.placed", model="模型")
    done = subprocess.run([sys.executable, "-B", "-m", "telemetry", "report", file], cwd=PLUGIN, capture_output=True,
                          env={**os.environ, "PYTHONIOENCODING": "ascii"}, timeout=60, check=False)
    assert (done.returncode, done.stderr) == (0, b"")
    assert b"??  " in done.stdout


def test_reader_that_has_seen_enough_is_no_error(tmp_path: Path) -> None:
    """`| head` closes the pipe while most is still to come."""
    (tmp_path / "t.jsonl").write_text('{"event": "prompt.finished", "prompt": "12345678"}\n' * 20_000)
    with subprocess.Popen([sys.executable, "-B", "-m", "telemetry", "report", tmp_path / "t.jsonl"], cwd=PLUGIN,
                          stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout is not None and process.stderr is not None
        assert process.stdout.readline().startswith(b"prompt")
        process.stdout.close()
        assert process.stderr.read() == b""
    assert process.returncode == 0
