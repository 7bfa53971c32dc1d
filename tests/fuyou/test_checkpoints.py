"""Checkpoints of runs: made on request and every so many steps, pruned, gone back to bit for bit; and damage found."""

from __future__ import annotations

import dataclasses
import errno
import json
import re
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import fuyou
from fuyou.cli import main
from fuyou.config import format_bytes
from io_engine import Store, StoreCorruptError
from tests.fuyou import tiny_run
from tests.fuyou.command_line import metrics, same_numbers, train, write_recipe


@pytest.fixture(scope="module", autouse=True)
def _small_and_private(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """One compute thread, and caches of our own."""
    import datasets

    with pytest.MonkeyPatch.context() as patch:
        caches = str(tmp_path_factory.mktemp("caches"))
        patch.setenv("HF_DATASETS_CACHE", caches)
        patch.setattr(datasets.config, "HF_DATASETS_CACHE", caches)
        threads = torch.get_num_threads()
        torch.set_num_threads(1)
        yield
        torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run of five steps with checkpoints of steps 2 and 4."""
    folder = tmp_path_factory.mktemp("trained")
    assert train(write_recipe(folder, training__save_steps=2)) == 0
    return folder


@pytest.fixture
def run(trained: Path, tmp_path: Path) -> Path:
    """A copy of it, with the recipe of a run that makes no checkpoints."""
    shutil.copytree(trained, tmp_path, dirs_exist_ok=True)
    write_recipe(tmp_path)
    return tmp_path


def checkpoints(folder: Path) -> list[tuple[str, int]]:
    return [(c["name"], c["step"]) for c in fuyou.inspect_store(folder / "store")["checkpoints"]]


def test_steps_are_saved_and_gone_back_to(trained: Path, run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """From step 2 on the run is what it was."""
    assert checkpoints(run) == [("step-2", 2), ("step-4", 4)]
    assert main(["train", str(run / "recipe.yaml"), "--resume", "2"]) == 0
    assert "resumed at step 2" in (said := capsys.readouterr().out)
    assert "restored from its checkpoint step-2; it stood at step 5" in said
    assert same_numbers(metrics(run)) == same_numbers(metrics(trained))
    for file in (trained / "out" / "model").glob("*.safetensors"):
        assert (run / "out" / "model" / file.name).read_bytes() == file.read_bytes()
    assert checkpoints(run) == [("step-2", 2), ("step-4", 4)]
    assert main(["verify", str(run / "store")]) == 0


def test_inspect_lists_them(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", str(run / "store")]) == 0
    assert "step-2:\n    step: 2\n" in capsys.readouterr().out


def test_inspect_shows_sizes_and_times_for_people(
    run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """JSON keeps the numbers."""
    monkeypatch.setenv("TZ", "UTC-5:30")  # east of it
    time.tzset()
    try:
        assert main(["inspect", str(run / "store")]) == 0
        said = capsys.readouterr().out
    finally:
        monkeypatch.undo()
        time.tzset()
    assert main(["inspect", str(run / "store"), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    checkpoint = found["checkpoints"][0]
    east = time.gmtime(checkpoint["created_seconds"] + 5.5 * 3600)
    assert f"    created: {time.strftime('%Y-%m-%d %H:%M:%S', east)}+05:30\n" in said
    assert f"    num_bytes: {format_bytes(checkpoint['num_bytes'])}\n" in said
    assert f"\nsize_bytes: {format_bytes(found['size_bytes'])}\n" in said
    assert not re.search(r"_bytes: \d+$|_seconds: ", said, re.MULTILINE)
    assert f"num_parameters: {found['num_parameters']}\n" in said


def test_inspect_shows_a_time_that_is_none_as_it_is(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(fuyou, "inspect_store", lambda _: {"created_seconds": 1e300, "size_bytes": None})
    assert main(["inspect", "store"]) == 0
    assert capsys.readouterr().out == "created_seconds: 1e+300\nsize_bytes: none\n"


def test_a_limited_number_is_kept(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Those with names of their own are not counted."""
    recipe = write_recipe(tmp_path, training__save_steps=1, training__save_total_limit=2)
    assert main(["train", str(recipe), "--steps", "1"]) == 0
    assert "1 checkpoint to come" in capsys.readouterr().out
    assert main(["checkpoint", str(tmp_path / "store"), "--name", "mine"]) == 0
    assert train(recipe) == 0
    assert checkpoints(tmp_path) == [("mine", 1), ("step-4", 4), ("step-5", 5)]


def test_too_little_space_is_said_before_the_first_step(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = write_recipe(tmp_path, training__save_steps=1)
    assert train(recipe, "--steps", "1") == 0
    capsys.readouterr()
    monkeypatch.setattr(Store, "free_bytes", lambda _: 100)
    assert train(recipe) == 1
    assert "4 checkpoints to come" in capsys.readouterr().err
    assert fuyou.inspect_store(tmp_path / "store")["step"] == 1


def test_the_command(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Made, restored, removed; names that are taken, unknown or impossible."""
    store = str(run / "store")
    assert main(["checkpoint", store]) == 0
    assert capsys.readouterr().out.startswith("step 5 kept as checkpoint step-5, ")
    assert main(["checkpoint", store, "--name", "best", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["step"] == 5
    assert main(["checkpoint", store, "--restore", "step-4"]) == 0
    assert "stands at step 4 again" in capsys.readouterr().out
    assert fuyou.inspect_store(store)["step"] == 4
    assert main(["checkpoint", store, "--remove", "step-2"]) == 0
    assert [name for name, _ in checkpoints(run)] == ["step-4", "step-5", "best"]
    for options, code, message in (
        (["--name", "best"], 1, "already"),
        (["--restore", "step-2"], 1, "no checkpoint 'step-2'; it has step-4, step-5, best"),
        (["--remove", "../lock"], 1, "no checkpoint"),
        (["--name", "../x"], 2, "letters"),
        (["--name", "a", "--remove", "b"], 2, "not allowed with"),
    ):
        assert main(["checkpoint", store, *options]) == code
        assert message in capsys.readouterr().err
    assert main(["checkpoint", str(run)]) == 1


def test_steps_that_are_not_kept(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert train(run / "recipe.yaml", "--resume", "3") == 1
    assert "keeps checkpoints of the steps 2, 4" in capsys.readouterr().err
    assert fuyou.inspect_store(run / "store")["step"] == 5


def test_a_limit_without_steps_is_refused(tmp_path: Path) -> None:
    with pytest.raises(fuyou.ConfigError, match="save_total_limit"):
        from fuyou.recipe import load_recipe

        load_recipe(write_recipe(tmp_path, training__save_total_limit=2))


def test_a_full_drive_stops_the_run_at_a_committed_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And the same command goes on when space was made."""
    recipe = write_recipe(tmp_path, training__save_steps=2)

    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device", "store")

    with monkeypatch.context() as patch:
        patch.setattr("io_engine.checkpoints.check_space", full)
        assert train(recipe) == 1
    assert fuyou.inspect_store(tmp_path / "store")["step"] == 2
    assert train(recipe) == 0
    assert checkpoints(tmp_path) == [("step-4", 4)]


# --- flipped bits ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def store_of_steps(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store at step 3, with a checkpoint of step 2."""
    store = tmp_path_factory.mktemp("flips") / "store"
    for until in (2, 3):
        tiny_run.train(store, 0.5, until=until, on_step=lambda *_: None)
        if until == 2:
            assert main(["checkpoint", str(store)]) == 0
    return store


EXTENTS = ("prologue/weight", "prologue/state", "model.layers.1/weight", "model.layers.1/state", "epilogue/state")


@pytest.mark.parametrize("window", ["backward", pytest.param("forward", marks=pytest.mark.slow)])
@pytest.mark.parametrize("name", EXTENTS)
def test_a_flipped_bit_never_reaches_the_weights(name: str, window: str, store_of_steps: Path, tmp_path: Path) -> None:
    """Found when it is first read, named, nothing committed; the checkpoint is the way out."""
    store = tmp_path / "store"
    shutil.copytree(store_of_steps, store)
    snapshot = Store.peek(store)
    if name not in snapshot.extents:
        pytest.skip(f"this model has no {name}")
    file_index, offset, _ = snapshot.extents[name].slots[snapshot.slots[name]][0]
    path = sorted(store.glob("extents-*.bin"))[file_index]
    position = offset + 40
    with open(path, "r+b") as file:
        file.seek(position)
        byte = file.read(1)[0]
        file.seek(position)
        file.write(bytes([byte ^ 0x20]))
    model = tiny_run.open_model(store)
    model.fuyou.close()
    plan = dataclasses.replace(
        model.fuyou.plan,
        host_memory_bytes=2**28,
        gradient_pool_bytes=2**25,
        blocks=tuple(
            dataclasses.replace(b, update_window=window, gradient="host", states_in_host=False)
            for b in model.fuyou.plan.blocks
        ),
    )
    with pytest.raises(StoreCorruptError) as caught:
        tiny_run.train(store, None, until=5, on_step=lambda *_: None, plan=plan.to_json())
    message = str(caught.value)
    assert f"{name!r} is damaged: its bytes 0 to " in message
    assert f"at offset {offset} of {path}" in message
    shard = next(s for s in fuyou.inspect_store(store)["shards"] if s["name"] == name.rpartition("/")[0])
    assert f", of {next(iter(shard['parameters']))}" in message
    assert "step-2 (step 2), with `fuyou checkpoint STORE --restore NAME`" in message
    assert Store.peek(store).step == 3
    assert any(name in problem for problem in fuyou.verify_store(store))
    assert main(["checkpoint", str(store), "--restore", "step-2"]) == 0
    losses: dict[int, float] = {}
    tiny_run.train(store, 0.5, until=4, on_step=losses.__setitem__)
    assert list(losses) == [2, 3]
    assert fuyou.verify_store(store) == []


@pytest.mark.parametrize("name", ["manifest.json", "layout", "store-id.json"])
def test_a_flipped_bit_in_a_small_file(
    name: str, store_of_steps: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Named; and where the previous manifest is as good, it is taken, which is said."""
    store = tmp_path / "store"
    shutil.copytree(store_of_steps, store)
    layout = json.loads((store / "manifest.json").read_bytes())["body"]["layout"]["file"]
    path = store / (layout if name == "layout" else name)
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 0x04
    path.write_bytes(data)
    code = main(["verify", str(store)])
    if name == "manifest.json":
        assert code == 0
        assert fuyou.inspect_store(store)["step"] == 2
        with tiny_run.open_model(store).fuyou as runtime:
            assert "resumed at step 2" in runtime.resumed
    else:
        assert code == 1
        message = capsys.readouterr().err
        assert str(path) in message
        assert "backup" in message
