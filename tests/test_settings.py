"""Settings: what is read, what is refused and in which words, and when they are read again."""
from __future__ import annotations

import dataclasses
import logging
import os
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from residency import policies, settings
from residency.settings import Memory, Settings, SettingsError, Telemetry, Watch, load

SHIPPED = Path(settings.__file__).parent / "settings.toml"
TABLES = policies.tables()
DEFAULTS = {name: kind() for name, kind in TABLES.items()}


def write(file: Path, text: str, at: int = 0) -> Path:
    """Writes a settings file whose modification time is `at` seconds, so that no clock has a say."""
    file.write_text(text, encoding="utf-8")
    os.utime(file, (at, at))
    return file


def refusal(folder: Path, text: str) -> str:
    """What `load` says about a file with this text, without the file's name, which it must begin with."""
    file = write(folder / "settings.toml", text)
    with pytest.raises(SettingsError) as caught:
        load([SHIPPED, file], TABLES)
    name, message = str(caught.value)[:len(str(file))], str(caught.value)[len(str(file)):]
    assert name == str(file)
    return message


def keys(table: dict[str, Any], prefix: str = "") -> set[str]:
    """Every dotted key of a table."""
    return {dotted for key, value in table.items()
            for dotted in (keys(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key})}


def test_shipped_file_is_the_defaults() -> None:
    """What the reference manual shows is what holds without it, in the tables of the policies too."""
    assert load([SHIPPED], TABLES) == Settings(tables=DEFAULTS, origin=str(SHIPPED))


def test_shipped_file_has_every_key() -> None:
    """A key that the file does not show is one that nobody finds."""
    expected = {"enabled", "policies"}
    for name, kind in {"telemetry": Telemetry, "memory": Memory, **TABLES}.items():
        expected |= {f"{name}.{field.metadata.get('key', field.name)}" for field in dataclasses.fields(kind)}
    assert keys(settings.tomllib.loads(SHIPPED.read_text(encoding="utf-8"))) == expected


def test_an_old_name_is_taken_and_wins_over_the_shipped_file(tmp_path: Path) -> None:
    """`system_ram_pad_gb` is what a pack that came before calls `pad_gb`."""
    file = write(tmp_path / "settings.toml", "[memory]\nsystem_ram_pad_gb = 3")
    assert load([SHIPPED, file], TABLES).memory.pad_gb == 3


def test_defaults_hold_without_any_file(tmp_path: Path) -> None:
    """A deleted file is no error."""
    assert load([tmp_path / "none.toml"], TABLES) == Settings(tables=DEFAULTS)


def test_missing_user_file_is_skipped(tmp_path: Path) -> None:
    """Most users never make one, and the folder for it may be missing or a file."""
    blocked = write(tmp_path / "residency", "")
    for user in (tmp_path / "none.toml", tmp_path / "none" / "settings.toml", blocked / "settings.toml"):
        assert load([SHIPPED, user], TABLES) == Settings(tables=DEFAULTS, origin=str(SHIPPED))


def test_user_file_wins_key_by_key(tmp_path: Path) -> None:
    """The keys beside a changed one keep what the shipped file says."""
    shipped = write(tmp_path / "shipped.toml", '[telemetry]\nconsole = "debug"\nkeep = 7\n[zero_copy]\nread_ahead = false')
    user = write(tmp_path / "user.toml", "[telemetry]\nkeep = 9\n[zero_copy]\nkeep_gb = 1.5\n[memory]\nram_gb = 8")
    got = load([shipped, user], TABLES)
    assert got.telemetry == Telemetry(console="debug", keep=9)
    assert got.memory == Memory(ram_gb=8)
    assert got.tables["zero_copy"] == TABLES["zero_copy"](keep_gb=1.5, read_ahead=False)
    assert got.origin == str(user)


def test_list_of_policies_is_replaced_as_a_whole(tmp_path: Path) -> None:
    """Otherwise nobody could turn a policy off."""
    assert load([SHIPPED, write(tmp_path / "user.toml", "policies = []")], TABLES).policies == ()


def test_byte_order_mark_is_skipped(tmp_path: Path) -> None:
    """Notepad writes one."""
    file = tmp_path / "settings.toml"
    file.write_bytes(b"\xef\xbb\xbfenabled = false\r\n")
    assert not load([SHIPPED, file], TABLES).enabled


@pytest.mark.parametrize(("text", "expected"), [
    ("enable = true", ": unknown key 'enable', perhaps you meant 'enabled'"),
    ("[telemetrie]", ": unknown key 'telemetrie', perhaps you meant 'telemetry'"),
    ("[zero_cpoy]", ": unknown key 'zero_cpoy', perhaps you meant 'zero_copy'"),
    ("[telemetry]\norigin = 'x'", ": unknown key 'telemetry.origin'; known are console, file, keep, max_mb"),
    ("[telemetry]\nconsol = 'off'", ": unknown key 'telemetry.consol', perhaps you meant 'console'"),
    ("[memory]\nsystem_ram_pad_gb = 1\npad_gb = 2", ": 'memory.pad_gb' is there twice, once as 'system_ram_pad_gb'"),
    ("[hybrid_split]\noverhead_percent = 31",
     ": 'hybrid_split.overhead_percent' must be a number from 10 to 30, not 31"),
    ("[hybrid_split]\nconservative_factor = 0.4",
     ": 'hybrid_split.conservative_factor' must be a number from 0.5 to 0.9, not 0.4"),
    ("[[hybrid_split.rules]]\nconservative_factor = 1",
     ": 'hybrid_split.rules.conservative_factor' must be \"auto\" or a number from 0.5 to 0.9, not 1"),
    ("[memory]\nqqq = 1", ": unknown key 'memory.qqq'; known are pad_gb, pinned_gb, ram_gb"),
    ("[zero_copy]\nkeep_bg = 1", ": unknown key 'zero_copy.keep_bg', perhaps you meant 'keep_gb'"),
    ("[zero_copy.read_ahead]\nx = 1", ": 'zero_copy.read_ahead' must be true or false, not {'x': 1}"),
    ("policies = ['zero_cpoy']", ": 'policies' names 'zero_cpoy', which does not exist, perhaps you meant 'zero_copy'"),
    ("policies = ['zero_copy', 'zero_copy']", ": 'policies' names 'zero_copy' twice"),
])
def test_refuses_what_it_does_not_know(tmp_path: Path, text: str, expected: str) -> None:
    """The message has the file, the dotted key and the nearest match."""
    assert refusal(tmp_path, text) == expected


@pytest.mark.parametrize(("text", "expected"), [
    ("enabled = 1", ": 'enabled' must be true or false, not 1"),
    ("enabled = 'yes'", ": 'enabled' must be true or false, not 'yes'"),
    ("policies = 'zero_copy'", ": 'policies' must be a list of strings, not 'zero_copy'"),
    ("policies = [1]", ": 'policies' must be a list of strings, not [1]"),
    ("[telemetry]\nconsole = 'loud'", ": 'telemetry.console' must be one of \"off\", \"info\", \"debug\", not 'loud'"),
    ("[telemetry]\nconsole = true", ": 'telemetry.console' must be one of \"off\", \"info\", \"debug\", not True"),
    ("[telemetry]\nfile = false", ": 'telemetry.file' must be a string, not False"),
    ("[telemetry]\nmax_mb = '16'", ": 'telemetry.max_mb' must be a number, not '16'"),
    ("[telemetry]\nmax_mb = true", ": 'telemetry.max_mb' must be a number, not True"),
    ("[telemetry]\nkeep = 1.5", ": 'telemetry.keep' must be a whole number, not 1.5"),
    ("[telemetry]\nkeep = true", ": 'telemetry.keep' must be a whole number, not True"),
    ("[memory]\nram_gb = 'lots'", ": 'memory.ram_gb' must be \"auto\" or a number of gigabytes, not 'lots'"),
    ("[memory]\nram_gb = true", ": 'memory.ram_gb' must be \"auto\" or a number of gigabytes, not True"),
    ("[zero_copy]\nkeep_gb = false", ": 'zero_copy.keep_gb' must be \"auto\" or a number of gigabytes, not False"),
    ("[zero_copy]\nread_ahead = 0", ": 'zero_copy.read_ahead' must be true or false, not 0"),
])
def test_refuses_a_wrong_type(tmp_path: Path, text: str, expected: str) -> None:
    """TOML tells true from 1 and 1 from "1", and so do we."""
    assert refusal(tmp_path, text) == expected


@pytest.mark.parametrize(("text", "expected"), [
    ("[telemetry]\nmax_mb = 0.5", ": 'telemetry.max_mb' must be a number of at least 1, not 0.5"),
    ("[telemetry]\nkeep = 0", ": 'telemetry.keep' must be a whole number of at least 1, not 0"),
    ("[memory]\nram_gb = -1", ": 'memory.ram_gb' must be \"auto\" or a number of gigabytes of at least 0, not -1"),
    ("[zero_copy]\nkeep_gb = -0.1", ": 'zero_copy.keep_gb' must be \"auto\" or a number of gigabytes of at least 0, not -0.1"),
    ("[telemetry]\nmax_mb = inf", ": 'telemetry.max_mb' must be a number of at most 1000000000000, not inf"),
    ("[memory]\nram_gb = nan", ": 'memory.ram_gb' must be \"auto\" or a number of gigabytes of at most 1000000000000, not nan"),
    ("[telemetry]\nkeep = 0x1_000_000_000_000", ": 'telemetry.keep' must be a whole number of at most 1000000000000, "
     "not 281474976710656"),
    *((f"[{policy}]\nffn_chunks = {number}", f": '{policy}.ffn_chunks' must be a whole number from 1 to 64, not {number}")
      for policy in ("hybrid_split", "ray_shard") for number in (0, 65, -2)),
])
def test_refuses_a_number_out_of_range(tmp_path: Path, text: str, expected: str) -> None:
    """TOML has infinity, which no budget can be, and not-a-number, which compares with nothing."""
    assert refusal(tmp_path, text) == expected


@pytest.mark.parametrize(("text", "expected"), [
    ("telemetry = 'off'", ": 'telemetry' is a table, write [telemetry]"),
    ("memory = 8", ": 'memory' is a table, write [memory]"),
    ("zero_copy = true", ": 'zero_copy' is a table, write [zero_copy]"),
    ("[[zero_copy]]", ": 'zero_copy' is a table, write [zero_copy]"),
    ("[enabled]\nx = 1", ": 'enabled' must be true or false, not {'x': 1}"),
    ("[policies]\nzero_copy = true", ": 'policies' must be a list of strings, not {'zero_copy': True}"),
    ("[memory.ram_gb]\nx = 1", ": 'memory.ram_gb' must be \"auto\" or a number of gigabytes, not {'x': 1}"),
])
def test_refuses_a_scalar_for_a_table_and_a_table_for_a_scalar(tmp_path: Path, text: str, expected: str) -> None:
    """`zero_copy = true` is what people try first."""
    assert refusal(tmp_path, text) == expected


@pytest.mark.parametrize("text", ["enabled = yes", "[telemetry", "enabled = true\nenabled = true", "x = " + 2000 * "[",
                                  "[telemetry]\nkeep = " + 5000 * "9"])
def test_refuses_what_is_not_toml(tmp_path: Path, text: str) -> None:
    """The message says that it is the file's grammar, and the cure."""
    message = refusal(tmp_path, text)
    assert message.startswith(": this is not TOML: ")
    assert message.endswith(". Mend the line, or delete the file to get the defaults back.")


def test_refuses_what_is_not_utf8(tmp_path: Path) -> None:
    """An old editor's Latin-1 is named as such, not as a traceback."""
    file = tmp_path / "settings.toml"
    file.write_bytes('# größer\nenabled = "ü"'.encode("latin-1"))
    with pytest.raises(SettingsError, match="'utf-8' codec can't decode byte") as caught:
        load([SHIPPED, file], TABLES)
    assert str(caught.value).startswith(f"{file}: this is not TOML: ")


def test_refuses_a_file_that_cannot_be_read(tmp_path: Path) -> None:
    """A folder of that name is there, so it is not skipped as missing."""
    with pytest.raises(SettingsError, match="cannot be read") as caught:
        load([tmp_path], TABLES)
    assert str(caught.value).startswith(str(tmp_path))


@pytest.mark.parametrize("key", ["tables", "origin"])
def test_refuses_our_own_bookkeeping(tmp_path: Path, key: str) -> None:
    """Fields that no file fills are no keys."""
    assert refusal(tmp_path, f"{key} = 'x'").startswith(f": unknown key '{key}'")


def test_error_names_the_file_that_holds_it(tmp_path: Path) -> None:
    """A mistake in the shipped file is not put on the user's."""
    shipped = write(tmp_path / "shipped.toml", "enable = true")
    user = write(tmp_path / "user.toml", "enabled = true")
    with pytest.raises(SettingsError) as caught:
        load([shipped, user], TABLES)
    assert str(caught.value) == f"{shipped}: unknown key 'enable', perhaps you meant 'enabled'"


LINES = st.sampled_from([
    "enabled = ", "policies = ", "telemetry = ", "[telemetry]\n", "keep = ", "max_mb = ", "console = ", "[memory]\n",
    "ram_gb = ", "[zero_copy]\n", "keep_gb = ", "read_ahead = ", "true\n", "1\n", "-1.5\n", "inf\n", "nan\n", '"auto"\n',
    "[]\n", "['zero_copy']\n", "{}\n", "{keep = 1}\n", "1979-05-27\n", "'", '"""', "\n", "#", ".", "x", "\x00", "\ufeff",
])


@given(st.one_of(st.binary(), st.text().map(str.encode), st.lists(LINES, max_size=12).map("".join).map(str.encode)))
def test_any_bytes_are_settings_or_a_settings_error(tmp_path_factory: pytest.TempPathFactory, content: bytes) -> None:
    """Whatever a file holds, the plugin knows what to do."""
    file = tmp_path_factory.getbasetemp() / "any.toml"
    file.write_bytes(content)
    try:
        assert isinstance(load([SHIPPED, file], TABLES), Settings)
    except SettingsError as error:
        assert str(file) in str(error)


def test_watch_sees_no_change_where_there_is_none(tmp_path: Path) -> None:
    """The files are not read again for every prompt."""
    watch = Watch([SHIPPED, write(tmp_path / "user.toml", "enabled = true", at=1)], TABLES)
    before = watch.now
    assert not watch.changed()
    assert before is watch.now


def test_watch_raises_at_first_reading(tmp_path: Path) -> None:
    """There are no last good settings yet, so the plugin stays dormant."""
    with pytest.raises(SettingsError):
        Watch([SHIPPED, write(tmp_path / "user.toml", "enable = true")], TABLES)


def test_watch_follows_a_change_a_new_file_and_a_deleted_one(tmp_path: Path) -> None:
    """What the user does to the file holds at the next prompt."""
    file = tmp_path / "user.toml"
    watch = Watch([SHIPPED, file], TABLES)
    seen = [(watch.changed(), watch.now.enabled)]
    write(file, "enabled = false", at=1)
    seen.append((watch.changed(), watch.now.enabled))
    write(file, "enabled = true", at=2)
    seen.append((watch.changed(), watch.now.enabled))
    write(file, "enabled = false", at=3)
    seen.append((watch.changed(), watch.now.enabled))
    file.unlink()
    seen.append((watch.changed(), watch.now.enabled))
    assert seen == [(False, True), (True, False), (True, True), (True, False), (True, True)]


def test_watch_keeps_the_last_good_settings_and_says_so_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """A typo while ComfyUI runs costs one line; mending it is noticed."""
    file = write(tmp_path / "user.toml", "[telemetry]\nkeep = 9", at=1)
    watch = Watch([SHIPPED, file], TABLES)
    write(file, "[telemetry]\nkep = 8", at=2)
    with caplog.at_level(logging.ERROR, "residency"):
        assert [watch.changed(), watch.changed()] == [False, False]
    assert watch.now.telemetry.keep == 9
    assert [record.getMessage() for record in caplog.records] == \
        [f"[residency] {file}: unknown key 'telemetry.kep', perhaps you meant 'keep'. The last good settings stay."]
    write(file, "[telemetry]\nkeep = 8", at=3)
    assert watch.changed()
    assert watch.now.telemetry.keep == 8
