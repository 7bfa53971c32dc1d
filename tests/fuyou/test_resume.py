"""Resume: other plans, moved directories, crashes while a store is made, stores that do not fit. See test_crash.py, too."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import logging
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import fuyou
from io_engine import StoreError
from tests.fuyou.tiny_run import SEED, adamw, assert_same, batches, exported, open_model, train
from tests.tiny_models import tiny_model_config


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module", params=[None, 0.5], ids=["backward-window", "forward-window"])
def uninterrupted(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Losses and final weights of a run that nothing disturbed, for either window."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("uninterrupted")
    losses: dict[int, float] = {}
    train(folder / "store", request.param, on_step=losses.__setitem__)
    weights = exported(folder / "store", folder / "out")
    torch.set_num_threads(threads)
    return request.param, losses, weights


def test_resume_with_another_plan_in_a_moved_directory(uninterrupted: Any, tmp_path: Path) -> None:
    """Memory, plan and place may change at any time without changing a bit."""
    max_grad_norm, expected, weights = uninterrupted
    losses: dict[int, float] = {}
    train(tmp_path / "a", max_grad_norm, until=3, on_step=losses.__setitem__)
    (tmp_path / "drive").mkdir()
    shutil.move(tmp_path / "a", tmp_path / "drive" / "b")
    tight = {"host_memory": "3MiB"}
    train(tmp_path / "drive" / "b", max_grad_norm, until=5, on_step=losses.__setitem__, **tight)
    model = open_model(tmp_path / "drive" / "b")
    plan = model.fuyou.plan
    model.fuyou.close()
    edited = dataclasses.replace(
        plan,
        host_memory_bytes=2**30,
        gradient_pool_bytes=2**28,
        prefetch_depth=1,
        num_io_threads=1,
        blocks=tuple(
            dataclasses.replace(
                b,
                update_window="forward" if i % 3 else "backward",
                states_in_host=False,
                weights_in_host=i % 2 == 0,
                gradient="spill" if i % 2 else "host",
            )
            for i, b in enumerate(plan.blocks)
        ),
    )
    train(tmp_path / "drive" / "b", max_grad_norm, until=8, on_step=losses.__setitem__, plan=edited.to_json())
    shutil.move(tmp_path / "drive" / "b", tmp_path / "c")
    train(tmp_path / "c", max_grad_norm, on_step=losses.__setitem__)
    assert losses == expected
    assert_same(exported(tmp_path / "c", tmp_path / "out"), weights)


# --- a crash while the store is made -----------------------------------------------------------------------------------

CRASH = """
import os, signal, sys, torch
torch.set_num_threads(1)
from pathlib import Path
from io_engine import Store
import fuyou.runtime, fuyou.opening
from tests.fuyou import tiny_run as t

where, number = sys.argv[2], int(sys.argv[3])

def killing(function):
    def wrapper(*args, **kwargs):
        global number
        number -= 1
        if number < 0:
            os.kill(os.getpid(), signal.SIGKILL)
        return function(*args, **kwargs)
    return wrapper

if where == "fill":
    fuyou.opening.write_block = killing(fuyou.opening.write_block)
elif where == "commit":
    Store.commit = killing(Store.commit)
elif where == "publish":
    Store._publish = killing(Store._publish)
elif where == "prewrite":
    import io_engine.store
    io_engine.store.write_zeros = killing(io_engine.store.write_zeros)
t.train(Path(sys.argv[1]), 0.5, until=2, on_step=lambda *_: None)
"""


@pytest.mark.parametrize(
    ("where", "number"),
    [
        pytest.param("publish", 0, marks=pytest.mark.slow),  # the store exists, without an extent
        pytest.param("fill", 0, marks=pytest.mark.slow),
        pytest.param("fill", 2, marks=pytest.mark.slow),
        pytest.param("commit", 0, marks=pytest.mark.slow),  # filled, not committed
        pytest.param("prewrite", 0, marks=pytest.mark.slow),  # the states' file is there, half written
        ("publish", 2),  # the states' layout is written, the manifest does not name it
    ],
)
def test_crash_while_the_store_is_made(where: str, number: int, tmp_path: Path) -> None:
    """The next start goes on from there, to the same weights."""
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    crashed = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", CRASH, str(tmp_path / "store"), where, str(number)],
        cwd=Path(__file__).parents[2],
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert crashed.returncode == -signal.SIGKILL, crashed.stderr[-2000:]
    losses: dict[int, float] = {}
    train(tmp_path / "store", 0.5, until=2, on_step=losses.__setitem__)
    reference: dict[int, float] = {}
    train(tmp_path / "reference", 0.5, until=2, on_step=reference.__setitem__)
    assert losses == reference
    assert_same(exported(tmp_path / "store", tmp_path / "out"), exported(tmp_path / "reference", tmp_path / "out2"))


def test_failure_while_the_states_are_laid_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An error leaves the model open and the store as it was; the next call succeeds."""
    model = open_model(tmp_path / "store")
    with model.fuyou:
        before = sorted(os.listdir(tmp_path / "store"))

        def fail(*_args: Any, **_kwargs: Any) -> None:
            raise OSError(28, "No space left on device", "states")

        with monkeypatch.context() as patch:
            patch.setattr("io_engine.store.write_zeros", fail)
            with pytest.raises(OSError, match="No space left"):
                adamw(model, None)
        assert sorted(os.listdir(tmp_path / "store")) == before
        optimizer = adamw(model, None)
        model(**batches()[0]).loss.backward()
        optimizer.step()
    assert model.fuyou.committed_step == 1


# --- stores that do not fit the run ------------------------------------------------------------------------------------


def digest(store: Path) -> dict[str, str]:
    """Every file of a store but its lock."""
    return {
        path.name: hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(store.iterdir())
        if "lock" not in path.name
    }


@pytest.fixture
def trained(tmp_path: Path) -> Path:
    train(tmp_path / "store", None, until=2, on_step=lambda *_: None)
    open_model(tmp_path / "store").fuyou.close()  # opening removes superseded files
    return tmp_path / "store"


def other_model(store: Path) -> Any:
    return fuyou.from_config(
        tiny_model_config("gpt2"), offload=fuyou.OffloadConfig(store=store, device="cpu", host_memory="64MiB")
    )


def other_seed(store: Path) -> Any:
    return fuyou.from_config(
        tiny_model_config("llama"),
        offload=fuyou.OffloadConfig(store=store, device="cpu", host_memory="64MiB"),
        seed=SEED + 1,
    )


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (other_model, StoreError, "another model"),
        (lambda s: open_model(s, compute_dtype="float32"), StoreError, "compute_dtype='bfloat16'"),
        (lambda s: open_model(s, moment_dtype="int8"), StoreError, "moment_dtype='float32', this run asks for 'int8'"),
        (lambda s: open_model(s, frozen_dtype="nf4"), StoreError, "frozen_dtype='bfloat16', this run asks for 'nf4'"),
        (
            lambda s: open_model(s, micro_batch_size=1),
            fuyou.ConfigError,
            "=1 conflicts with the run's micro_batch_size=2",
        ),
        (other_seed, fuyou.ConfigError, f"seed={SEED + 1} conflicts with the run's seed={SEED}"),
        (lambda s: open_model(s, resume="never"), StoreError, 'resume="never"'),
        (lambda s: open_model(s, resume=1), StoreError, "stands at step 2"),
        (lambda s: open_model(s, host_memory="1MiB"), fuyou.PlanError, "short"),
    ],
    ids=["model", "compute_dtype", "moments", "frozen", "micro_batch_size", "seed", "never", "step", "host_memory"],
)
def test_a_store_that_does_not_fit_is_refused_and_left_alone(
    call: Callable[[Path], Any], error: type[Exception], message: str, trained: Path
) -> None:
    before = digest(trained)
    with pytest.raises(error, match=message):
        call(trained)
    assert digest(trained) == before
    # The lock is free again, and the run goes on.
    model = open_model(trained, resume=2)
    with model.fuyou:
        assert model.fuyou.committed_step == 2


def test_what_a_crash_left_is_named_and_gone(trained: Path) -> None:
    """Files that are none of ours are neither."""
    for name in ("scratch-0.bin", "extents-9.bin", "mine.bin"):
        (trained / name).write_bytes(bytes(4096))
    model = open_model(trained)
    model.fuyou.close()
    assert "removed scratch-0.bin of an unfinished run" in model.fuyou.resumed
    assert "removed extents-9.bin of an unfinished run" in model.fuyou.resumed
    assert "mine" not in model.fuyou.resumed
    assert sorted(path.name for path in trained.glob("*.bin") if not path.name.startswith("extents-")) == ["mine.bin"]


def test_the_same_cell_again_says_that_it_continues(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """As a notebook's that opens the model and trains; where nothing is set up, Python prints warnings of loggers."""
    caplog.set_level(logging.WARNING, "fuyou.opening")
    train(tmp_path / "store", None, until=1, on_step=lambda *_: None)
    assert caplog.messages == []
    train(tmp_path / "store", None, until=2, on_step=lambda *_: None)
    assert f"resumed at step 1 from {tmp_path / 'store'}" in "".join(caplog.messages)
    train(tmp_path / "store", None, until=2, on_step=lambda *_: None, resume="must")
    assert len(caplog.messages) == 1


@pytest.mark.parametrize("resume", ["must", 0, 3])
def test_nothing_to_resume(resume: str | int, tmp_path: Path) -> None:
    with pytest.raises(StoreError, match="no run"):
        open_model(tmp_path / "store", resume=resume)
    assert not (tmp_path / "store").exists()


def test_a_store_that_was_never_filled_is_no_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`never` may fill it, `must` and exports refuse it."""
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr("fuyou.opening.write_block", _interrupt)
        open_model(tmp_path / "store")
    with pytest.raises(StoreError, match="never filled"):
        open_model(tmp_path / "store", resume="must")
    with pytest.raises(StoreError, match="never filled"):
        fuyou.open_store_model(tmp_path / "store")
    model = open_model(tmp_path / "store", resume="never")
    assert model.fuyou.resumed.startswith("new store")
    model.fuyou.close()


def _interrupt(*_args: Any, **_kwargs: Any) -> None:
    raise KeyboardInterrupt


def test_state_of_the_run_survives(tmp_path: Path) -> None:
    """Hyperparameters are the caller's, but counts, moments and the caller's own state are the store's."""
    model = open_model(tmp_path / "store")
    with model.fuyou:
        optimizer = adamw(model, 0.5)
        assert optimizer.extra == {}
        for step in range(3):
            optimizer.commit_extra({"position": step})
            model(**batches()[step]).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        state = optimizer.state_of("model.norm.weight")
    again = open_model(tmp_path / "store")
    with again.fuyou:
        optimizer = adamw(again, 0.5)
        assert (optimizer.step_count, optimizer.extra) == (3, {"position": 2})
        restored = optimizer.state_of("model.norm.weight")
        assert torch.equal(restored.master, state.master)
        assert torch.equal(restored.exp_avg_sq, state.exp_avg_sq)
        assert restored.step == 3
    assert json.loads(json.dumps(fuyou.inspect_store(tmp_path / "store")))["step"] == 3
