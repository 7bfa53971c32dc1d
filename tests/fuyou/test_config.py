"""What users write about offloading is checked when it is written, with the value and a way out in the message."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

import fuyou
from fuyou.config import OffloadConfig, check_place, counted, format_bytes, parse_bytes
from fuyou.errors import ConfigError


@pytest.mark.parametrize(
    ("text", "num_bytes"),
    [
        ("768MiB", 768 * 2**20),
        ("22GB", 22 * 10**9),
        ("22 gib", 22 * 2**30),
        ("1.5 KiB", 1536),
        ("4096", 4096),
        (4096, 4096),
        ("2TiB", 2**41),
        ("7b", 7),
    ],
)
def test_sizes(text: str | int, num_bytes: int) -> None:
    assert parse_bytes(text) == num_bytes


@pytest.mark.parametrize("text", ["", "lots", "12 GiX", "-3GB", "0", 0, -1, True, None, 1.5, "1e9", "GiB"])
def test_bad_sizes_name_the_field(text: Any) -> None:
    with pytest.raises(fuyou.ConfigError, match="host_memory="):
        parse_bytes(text, "host_memory")


@pytest.mark.parametrize(
    ("num_bytes", "text"), [(0, "0 B"), (1023, "1023 B"), (1536, "1.5 KiB"), (768 * 2**20, "768 MiB"), (2**41, "2 TiB")]
)
def test_sizes_for_people(num_bytes: int, text: str) -> None:
    assert format_bytes(num_bytes) == text
    if num_bytes:
        assert parse_bytes(text) == num_bytes


def test_one_thing_is_singular() -> None:
    assert [counted(number, "row") for number in (0, 1, 2)] == ["0 rows", "1 row", "2 rows"]


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("host_memory", "much", "expected a number and a unit"),
        ("gpu_memory", 0, "above zero"),
        ("compute_dtype", "float16", "use bfloat16"),
        ("compute_dtype", "fp8", "choose one of"),
        ("moment_dtype", "int4", "choose one of"),
        ("frozen_dtype", "int4", "choose one of"),
        ("durability", "never", "choose one of"),
        ("durability", "sometimes", "choose one of"),
        ("io", "uring", "choose one of"),
        ("micro_batch_size", 0, "above zero"),
        ("micro_batch_size", "2", "whole number"),
        ("micro_batch_size", True, "whole number"),
        ("resume", "perhaps", "choose"),
        ("resume", -1, "choose"),
        ("resume", True, "choose"),
        ("device", "tpu", 'choose "cpu"'),
        ("store", "", "expected a directory"),
        ("store", [], "at least one"),
        ("store", [""], "expected a directory"),
        ("store", 3, "expected a directory"),
    ],
)
def test_bad_values_are_refused_at_once(field: str, value: Any, message: str) -> None:
    with pytest.raises(fuyou.ConfigError, match=message) as caught:
        OffloadConfig(**{"store": "/somewhere", field: value})
    assert field in str(caught.value)


def test_good_values() -> None:
    config = OffloadConfig(
        store=["~/a", Path("b")],
        device="cuda:1",
        gpu_memory="22GiB",
        host_memory=2**30,
        compute_dtype="float32",
        resume=0,
    )
    assert [d.is_absolute() for d in config.store_directories] == [True, True]
    assert "~" not in str(config.store_directories[0])
    assert OffloadConfig(store="x").resume == "auto"


def test_unknown_fields_and_changes_are_refused() -> None:
    with pytest.raises(TypeError, match="host_memroy"):
        OffloadConfig(store="x", host_memroy="1GiB")  # type: ignore[call-arg]
    with pytest.raises(AttributeError):
        OffloadConfig(store="x").store = "y"  # type: ignore[misc]


def test_a_folder_can_be_made_unless_something_is_in_the_way(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "rows").touch()
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    check_place("a", tmp_path / "new" / "folder", "rows")
    check_place("a", tmp_path / "out", "model")
    check_place("a", "relative/folder")
    for path, blocking in (("file", "file"), ("file/x/y", "file"), ("out", "out/rows"), ("link/x", "link")):
        with pytest.raises(ConfigError) as caught:
            check_place("output.dir", tmp_path / path, "rows")
        assert str(caught.value).startswith(f"output.dir={tmp_path / path}: {tmp_path / blocking} is no folder")
