"""`scripts/crash_test`: kill -9 at random moments, resumed bit for bit; and a long run that leaks nothing."""

from __future__ import annotations

import collections
import gc
import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from tests.fuyou import tiny_run
from tests.tiny_models import tiny_batches, tiny_model_config

ROOT = Path(__file__).parents[2]
ONE_THREAD = dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"), "1")


def crash_test(num_kills: int, seed: int, folder: Path, *options: str) -> str:
    """What the script prints, in a process of its own: it forks, which this one must not."""
    arguments = [str(num_kills), "--seed", str(seed), "--folder", str(folder), *options]
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "scripts/crash_test.py", *arguments],
        cwd=ROOT,
        env=os.environ | ONE_THREAD | {"PYTHONPATH": os.pathsep.join([str(ROOT), *sys.path])},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert not list(folder.iterdir())
    return done.stdout


SLOW = [pytest.mark.slow, pytest.mark.timeout(3600)]


@pytest.mark.parametrize(
    ("num_kills", "seed", "durability"),
    [(20, 1, "step"), pytest.param(200, 2, "step", marks=SLOW), pytest.param(100, 3, "checkpoint", marks=SLOW)],
)
def test_kills_at_random_moments(num_kills: int, seed: int, durability: str, tmp_path: Path) -> None:
    """In every phase of a run, the making of the store and the export included."""
    said = crash_test(num_kills, seed, tmp_path, "--durability", durability)
    assert said.startswith(f"{num_kills} kills (")
    phases = dict(reversed(part.split()) for part in said[said.index("(") + 1 : said.index(")")].split(", "))
    assert len(phases) == 7
    assert sum(count != "0" for count in phases.values()) >= 5  # a process may end before its signal arrives


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.skipif(os.geteuid() != 0 or not Path("/dev/loop-control").exists(), reason="needs root and loop devices")
@pytest.mark.parametrize("file_system", ["ext4", "xfs"])
def test_power_losses(file_system: str, tmp_path: Path) -> None:
    """The file system goes down without writing its journal: committed steps are there all the same."""
    if shutil.which(f"mkfs.{file_system}") is None:
        pytest.skip(f"needs mkfs.{file_system}")
    assert crash_test(10, 4, tmp_path, "--power-loss", file_system).startswith("10 kills (")


@pytest.fixture
def _one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def resources() -> tuple[float, int, int, list[str]]:
    """Megabytes of memory that is not of files, number of descriptors, number of threads, and names of Python's."""
    gc.collect()
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    threads = sorted(thread.name for thread in threading.enumerate())
    return int(status["RssAnon"].split()[0]) / 1e3, len(os.listdir("/proc/self/fd")), int(status["Threads"]), threads


def soak(store: Path, num_steps: int) -> list[tuple[float, int, int, list[str]]]:
    """Train so many steps, in turns of which each opens the store again; resources after each turn."""
    found = []
    num_turns = 5
    config = tiny_model_config("llama")
    todo = [step[0] for step in tiny_batches(config, 10, 1, batch_size=2, sequence_length=8)]
    for turn in range(1, num_turns + 1):
        # Most of a step is compute, and most of that torch's bfloat16 products where the processor has none.
        model = tiny_run.open_model(store, compute_dtype="float32", micro_batch_size=1)
        with model.fuyou:
            optimizer = tiny_run.adamw(model, 0.5)
            while optimizer.step_count < num_steps * turn // num_turns:
                model(**todo[optimizer.step_count % len(todo)]).loss.backward()
                optimizer.step()
                optimizer.zero_grad()
                if optimizer.step_count % 50 == 0:
                    model.fuyou.flush()
                    model.fuyou.store.checkpoint("latest")
            during = resources()
        del model, optimizer
        after = resources()
        found.append((during[0], after[1], after[2], after[3]))
    return found


@pytest.mark.usefixtures("_one_thread")
@pytest.mark.skipif(not Path("/proc/self/status").is_file(), reason="reads memory and descriptors from /proc")
@pytest.mark.parametrize("num_steps", [100, pytest.param(10_000, marks=SLOW)], ids=["sample", "soak"])
def test_long_runs_take_no_more_than_short_ones(num_steps: int, tmp_path: Path) -> None:
    """Memory, descriptors, threads and files are those of the second turn (the first warms up) to the end."""
    first, *later = soak(tmp_path / "store", num_steps)[1:]
    for memory_mb, num_descriptors, num_threads, threads in later:
        assert memory_mb < first[0] + 20
        assert num_descriptors == first[1]
        assert num_threads == first[2], (threads, first[3])
    counts = collections.Counter(path.name.split("-")[0] for path in (tmp_path / "store").iterdir())
    assert (counts["checkpoint"], counts["extents"], counts["layout"]) == (2, 2, 1)
