"""kill -9 at random moments of training runs: every resume goes on bit for bit, and no committed step is lost.

A run makes a store, fills it, trains a tiny model with a clipping limit that some steps exceed, makes a checkpoint, and
exports; each of its processes follows another plan, with updates in both windows. Processes are forked from this one,
which has imported everything, so that a kill costs a fraction of a second. Exit code 1 and a message at the first
broken promise.

With --power-loss (root only) the stores lie on a file system in a file of its own, which is shut down at the same
moments without flushing its journal (FS_IOC_SHUTDOWN), together with the process, and mounted again.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import fcntl
import os
import random
import shutil
import signal
import struct
import subprocess
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from transformers import LlamaConfig

import fuyou
import fuyou.opening
import fuyou.runtime
from io_engine import Store
from io_engine.directories import sync_directory
from optim import kernels, norm

NUM_STEPS = 6
CHECKPOINT_STEP = 3
SEED = 11
LIMIT = 1.6
"""Clips some steps of this run and not others; checked against the run that nothing disturbs."""

PHASES = ("create", "fill", "allocate", "step", "commit", "checkpoint", "export")
LONGEST_DELAY_SECONDS = {"create": 0.02, "fill": 0.01, "allocate": 0.02, "commit": 0.015, "checkpoint": 0.03}
"""From the beginning of a phase to the kill, at most; the others take `STEP_SECONDS`."""
STEP_SECONDS = 0.1
MOST_OFTEN = {"fill": 4, "allocate": 2}
"""How often a phase comes in a run, if neither once nor in each step."""

MOST_OFTEN_UNCOMMITTED = 3
"""Steps from commit to commit, at most, with --durability checkpoint."""
SHUTDOWN, WITHOUT_FLUSH = 0x8004587D, 2
"""FS_IOC_SHUTDOWN of Linux, and its flag that leaves even the journal unwritten."""
IMAGE_BYTES = 512 * 2**20

CONFIG = LlamaConfig(
    vocab_size=64,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=3,
    num_attention_heads=2,
    num_key_value_heads=1,
    attention_dropout=0.1,
    max_position_embeddings=32,
    bos_token_id=None,
    eos_token_id=None,
)

MOST_REPEATED = {"step": 2, "checkpoint": MOST_OFTEN_UNCOMMITTED + 1}
"""Steps that a crash may cost: those since the last commit, and the one in flight."""

Tell = Callable[[str], None]


class Broken(Exception):
    """A promise that was not kept."""


def main() -> int:
    """Kill, resume and compare; prints what was killed when."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("num_kills", type=int, nargs="?", default=20, metavar="N", help="kills (20)")
    parser.add_argument("--seed", type=int, default=0, help="of phases, delays and plans (0)")
    parser.add_argument("--folder", type=Path, help="where the stores lie meanwhile (a temporary folder)")
    parser.add_argument("--durability", choices=("step", "checkpoint"), default="step", help="of the runs (step)")
    parser.add_argument("--power-loss", choices=("ext4", "xfs"), help="shut a file system of this type down, too")
    options = parser.parse_args()
    torch.set_num_threads(1)
    kernels.warm_up("float32")
    norm.warm_up()
    with tempfile.TemporaryDirectory(prefix="fuyou-crash-", dir=options.folder) as folder:
        machine = _Machine() if options.power_loss is None else _PowerLoss(Path(folder), options.power_loss)
        try:
            with machine.switched_on(Path(folder)) as place:
                choose = random.Random(options.seed)
                print(_kill_and_resume(place, options.num_kills, choose, options.durability, machine))
        except Broken as error:
            print(f"crash_test: {error} (--seed {options.seed})", file=sys.stderr)
            return 1
    return 0


def _kill_and_resume(folder: Path, num_kills: int, choose: random.Random, durability: str, machine: _Machine) -> str:
    expected = _uninterrupted(folder / "reference")
    started_seconds = time.perf_counter()
    run = _Run(folder / "0", expected, durability, machine)
    killed: Counter[str] = Counter()
    num_runs, num_repeated = 1, 0
    to_come: list[str] = []
    while killed.total() < num_kills:
        # In an order in which one run can come to most of them.
        to_come = to_come or [*PHASES[:3], *choose.sample(PHASES[3:6], 3), PHASES[6]]
        phase = to_come.pop(0)
        while run.is_complete or not run.may_reach(phase):
            if run.is_complete:
                num_repeated += run.check_end()
                run, num_runs = _Run(folder / str(num_runs), expected, durability, machine), num_runs + 1
            else:
                run.live(choose, None)
        killed[phase] += run.live(choose, phase)
    while not run.is_complete:
        run.live(choose, None)
    num_repeated += run.check_end()
    phases = ", ".join(f"{killed[phase]} {phase}" for phase in PHASES)
    return (
        f"{killed.total()} kills ({phases}) of {num_runs} runs in {time.perf_counter() - started_seconds:.0f} s: every resume "
        f"went on bit for bit, no committed step was lost, {num_repeated} steps were repeated, {MOST_REPEATED[durability]} "
        "at most at a time"
    )


# --------------------------------------------------------------------------------------------- what ends a process


class _Machine:
    """Processes are killed; everything that they wrote stays."""

    @contextlib.contextmanager
    def switched_on(self, folder: Path) -> Iterator[Path]:
        """Where the stores may lie meanwhile."""
        yield folder

    def stop(self, process_id: int) -> None:
        """End the process, now."""
        with contextlib.suppress(ProcessLookupError):
            os.kill(process_id, signal.SIGKILL)

    def restart(self) -> None:
        """After the process has ended: what follows finds what a restart would."""


class _PowerLoss(_Machine):
    """The stores' file system goes down with the process, and forgets what it has not written yet."""

    def __init__(self, folder: Path, file_system: str) -> None:
        self._image, self._place, self._type = folder / "image", folder / "mounted", file_system
        self._is_down = False

    @contextlib.contextmanager
    def switched_on(self, folder: Path) -> Iterator[Path]:
        with open(self._image, "wb") as file:
            file.truncate(IMAGE_BYTES)
        self._place.mkdir()
        _run_tool(f"mkfs.{self._type}", "-q", str(self._image))
        self._mount()
        try:
            yield self._place
        finally:
            self._unmount()

    def stop(self, process_id: int) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.kill(process_id, signal.SIGSTOP)  # it would see errors, and say so, between one and the other
        directory = os.open(self._place, os.O_RDONLY)
        try:
            fcntl.ioctl(directory, SHUTDOWN, struct.pack("I", WITHOUT_FLUSH))
        finally:
            os.close(directory)
        self._is_down = True
        super().stop(process_id)

    def restart(self) -> None:
        if self._is_down:
            self._unmount()
            self._mount()
            self._is_down = False

    def _unmount(self) -> None:
        # The kernel may be closing the files of a killed process still.
        for _ in range(200):
            if subprocess.run(("umount", str(self._place)), capture_output=True).returncode == 0:
                return
            time.sleep(0.1)
        _run_tool("umount", str(self._place))

    def _mount(self) -> None:
        _run_tool("mount", "-o", "loop", "-t", self._type, str(self._image), str(self._place))


def _run_tool(*command: str) -> None:
    try:
        done = subprocess.run(command, capture_output=True, text=True)
    except FileNotFoundError:
        raise Broken(f"--power-loss needs {command[0]}: install e2fsprogs or xfsprogs, and util-linux") from None
    if done.returncode:
        raise Broken(f"{' '.join(command)} failed ({done.stderr.strip()}): --power-loss needs root and loop devices")


# ------------------------------------------------------------------------------------------- a run and its processes


class _Run:
    """One store, and what its processes have said so far."""

    def __init__(self, folder: Path, expected: dict[str, Any], durability: str, machine: _Machine) -> None:
        folder.mkdir(parents=True)
        sync_directory(str(folder.parent))
        self.folder, self._expected = folder, expected
        self._durability, self._machine = durability, machine
        self.is_filled = self.is_complete = False
        self.num_repeated = 0
        self._num_returned = 0
        """Steps whose call has returned, in any process."""
        self._committed = 0
        """The last step that a process knew to be committed."""

    def live(self, choose: random.Random, phase: str | None) -> bool:
        """Let a process go on with the run; kill it in `phase`, if that comes. Returns whether it was killed."""
        num_left = max(1, NUM_STEPS - self._num_returned)
        number_in_phase = choose.randint(1, num_left if phase in ("step", "commit") else MOST_OFTEN.get(phase or "", 1))
        delay_seconds = choose.random() * LONGEST_DELAY_SECONDS.get(phase or "", STEP_SECONDS)
        plan_seed = choose.randrange(2**31)
        with _process(lambda tell: _train(self.folder, plan_seed, self._durability, tell)) as (process_id, lines):
            killed = False
            for line in lines:
                self._take_in(line)
                word = line.split()[0]
                if word == phase and not killed:
                    number_in_phase -= 1
                    if number_in_phase == 0:
                        time.sleep(delay_seconds)
                        self._machine.stop(process_id)
                        killed = True
        status = os.waitstatus_to_exitcode(os.waitpid(process_id, 0)[1])
        self._machine.restart()
        if status not in (0, -signal.SIGKILL if killed else 0):
            raise Broken(f"a process to be killed in {phase} ended with {status}, after step {self._num_returned}")
        self.is_complete = status == 0
        return status == -signal.SIGKILL

    def _take_in(self, line: str) -> None:
        words = line.split()
        if words[0] == "resumed":
            step = int(words[1])
            if step < self._committed:
                raise Broken(f"step {self._committed} was committed, but the run resumed at {step}")
            if self._num_returned - step > MOST_REPEATED[self._durability]:
                raise Broken(f"{self._num_returned} steps had returned, but the run resumed at {step}")
            self.num_repeated += max(0, self._num_returned - step)
        elif words[0] == "filled":
            self.is_filled = True
        elif words[0] == "committed":
            self._committed = max(self._committed, int(words[1]))
        elif words[0] == "loss":
            step, loss = int(words[1]), words[2]
            if loss != self._expected["losses"][step]:
                raise Broken(
                    f"the loss of step {step} is {loss}, of the undisturbed run {self._expected['losses'][step]}"
                )
            self._num_returned = max(self._num_returned, step + 1)
        elif words[0] == "problem":
            raise Broken(f"fuyou verify says: {line}")

    def may_reach(self, phase: str) -> bool:
        """Whether the next process can come to this phase: a store is made once."""
        if phase == "create":
            return not any(self.folder.iterdir())
        if phase in ("fill", "allocate"):
            return not self.is_filled
        if phase == "checkpoint":
            return self._num_returned < CHECKPOINT_STEP
        return phase == "export" or self._num_returned < NUM_STEPS

    def check_end(self) -> int:
        """Compare the exported model with the undisturbed run's and remove the run; returns the steps repeated."""
        _check_equal(_weights(self.folder / "out"), self._expected["weights"])
        shutil.rmtree(self.folder)
        return self.num_repeated


def _uninterrupted(folder: Path) -> dict[str, Any]:
    folder.mkdir(parents=True)
    losses: dict[int, str] = {}
    clipped: list[str] = []
    with _process(lambda tell: _train(folder, 0, "step", tell)) as (process_id, lines):
        for line in lines:
            words = line.split()
            if words[0] == "loss":
                losses[int(words[1])] = words[2]
                clipped.append(words[3])
    if os.waitpid(process_id, 0)[1] or len(losses) != NUM_STEPS:
        raise Broken("the run that nothing disturbs failed")
    if len(set(clipped)) != 2:
        raise Broken(f"the clipping limit {LIMIT} does not tell steps apart: {clipped}; choose another")
    return {"losses": losses, "weights": _weights(folder / "out")}


@contextlib.contextmanager
def _process(work: Callable[[Tell], None]) -> Iterator[tuple[int, Iterator[str]]]:
    """A forked process that does `work`, and the lines that it tells until its end."""
    sys.stdout.flush()
    reader, writer = os.pipe()
    process_id = os.fork()
    if process_id == 0:
        code = 1
        try:
            os.close(reader)
            # One write a line: what is told is told whole, however the process ends.
            work(lambda line: os.write(writer, f"{line}\n".encode()) and None)
            code = 0
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(code)
    os.close(writer)
    with open(reader, encoding="utf-8") as file:
        yield process_id, iter(file)


def _weights(folder: Path) -> dict[str, torch.Tensor]:
    weights: dict[str, torch.Tensor] = {}
    for file in sorted(folder.glob("*.safetensors")):
        # Copied: what load_file returns is the mapped file, which would keep its file system from being unmounted.
        weights |= {name: value.clone() for name, value in load_file(file).items()}
    return weights


def _check_equal(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    wrong = [name for name in expected if name not in found or not torch.equal(found[name], expected[name])]
    if wrong or found.keys() != expected.keys():
        raise Broken(f"the exported model differs from the undisturbed run's: {wrong[:3] or sorted(found)[:3]}")


# --------------------------------------------------------------------------------------------------- in the process


def _train(folder: Path, plan_seed: int, durability: Any, tell: Tell) -> None:
    """Go on with the run from wherever the store stands, to its end, telling what begins and what is done."""
    _tell_phases(tell)
    offload = fuyou.OffloadConfig(
        store=folder / "store", device="cpu", micro_batch_size=2, host_memory="64MiB", durability=durability
    )
    plan = _edited(
        fuyou.plan_model(CONFIG, offload=offload, batch_size=4, sequence_length=12, max_grad_norm=LIMIT), plan_seed
    )
    model = fuyou.from_config(CONFIG, offload=dataclasses.replace(offload, plan=plan.to_json()), seed=SEED)
    with model.fuyou:
        tell("filled")
        optimizer = fuyou.AdamW(model, lr=3e-3, weight_decay=0.1, max_grad_norm=LIMIT)
        tell(f"resumed {optimizer.step_count}")
        while optimizer.step_count < NUM_STEPS:
            step = optimizer.step_count
            tell("step")
            model(**_batch(step)).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            metrics = model.fuyou.step_metrics()
            tell(f"loss {step} {metrics['loss'].hex()} {metrics['clipped']}")
            if step + 1 == CHECKPOINT_STEP:
                model.fuyou.flush()
                model.fuyou.store.checkpoint("half")
        model.fuyou.flush()
        model.save_pretrained(str(folder / "out"))
    for problem in fuyou.verify_store(folder / "store"):
        tell(f"problem {problem}")


def _batch(step: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(1000 + step)
    ids = torch.randint(0, CONFIG.vocab_size, (4, 12), generator=generator)
    return {"input_ids": ids, "labels": ids.clone()}


def _edited(plan: fuyou.Plan, seed: int) -> fuyou.Plan:
    """The plan with its choices made at random, updates in both windows where it may have them."""
    choose = random.Random(seed)
    if plan.durability == "checkpoint":
        every = choose.randint(1, MOST_OFTEN_UNCOMMITTED)
        return dataclasses.replace(plan, prefetch_depth=choose.randint(1, 3), commit_every_steps=every)
    windows = ["backward", "forward", *choose.choices(("backward", "forward"), k=len(plan.blocks))]
    return dataclasses.replace(
        plan,
        prefetch_depth=choose.randint(1, 3),
        max_clipped_share=choose.choice((0.25, 1.0)),
        host_memory_bytes=2**28,
        gradient_pool_bytes=2**25,
        blocks=tuple(
            dataclasses.replace(
                block,
                update_window=window,
                states_in_host=False,
                weights_in_host=choose.random() < 0.3,
                gradient=choose.choice(("host", "spill")),
            )
            for block, window in zip(plan.blocks, windows, strict=False)
        ),
    )


def _tell_phases(tell: Tell) -> None:
    """Announce the beginning of each phase, and each step that is committed. Only this process is changed."""

    def announce(owner: Any, attribute: str, phase: str) -> None:
        function = getattr(owner, attribute)

        def announced(*args: Any, **kwargs: Any) -> Any:
            tell(phase)
            result = function(*args, **kwargs)
            if phase == "commit":
                tell(f"committed {kwargs['step']}")
            return result

        setattr(owner, attribute, announced)

    announce(Store, "create", "create")
    announce(Store, "allocate", "allocate")
    announce(Store, "commit", "commit")
    announce(Store, "checkpoint", "checkpoint")
    announce(fuyou.opening, "write_block", "fill")
    announce(fuyou.runtime, "export_checkpoint", "export")


if __name__ == "__main__":
    sys.exit(main())
