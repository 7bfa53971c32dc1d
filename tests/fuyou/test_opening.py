"""Opening, evaluating, interrupting and closing: locks, threads and memory come back, and wrong directories are explained."""

from __future__ import annotations

import contextlib
import errno
import gc
import os
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

import fuyou
from fuyou.executor.weights import WeightStream
from io_engine import PosixEngine, Store, StoreError, StoreLockedError
from optim import OffloadedAdamW
from optim.kernels import AdamWScalars
from tests.tiny_models import tiny_batches, tiny_model_config


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def open_model(store: Path, name: str = "llama", **offload: Any) -> Any:
    options = {"device": "cpu", "host_memory": "64MiB"} | offload
    return fuyou.from_config(tiny_model_config(name), offload=fuyou.OffloadConfig(store=store, **options), seed=3)


def batches(count: int) -> list[dict[str, torch.Tensor]]:
    return [step[0] for step in tiny_batches(tiny_model_config("llama"), count, 1, seed=1)]


def plain(model: Any, folder: Path) -> Any:
    """The model's weights in plain transformers, for evaluation."""
    model.save_pretrained(folder)
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).eval()


def threads_of_ours() -> list[str]:
    return [t.name for t in threading.enumerate() if t.name.startswith(("fuyou", "io_engine"))]


def test_a_store_over_two_directories(tmp_path: Path) -> None:
    """Large extents lie in both; steps and resumed runs have the bits of one directory; a missing one is named."""
    from transformers import LlamaConfig

    config = LlamaConfig(
        vocab_size=4096, hidden_size=1024, intermediate_size=2048, num_hidden_layers=1, num_attention_heads=8
    )
    weights = []
    for number, stores in enumerate(([tmp_path / "one"], [tmp_path / "a", tmp_path / "b"])):
        offload = fuyou.OffloadConfig(store=stores, device="cpu", host_memory="512MiB", compute_dtype="float32")
        for _ in range(2):
            model = fuyou.from_config(config, offload=offload, seed=3)
            optimizer = fuyou.AdamW(model, lr=1e-3)
            ids = torch.arange(12).reshape(2, 6)
            model(input_ids=ids, labels=ids).loss.backward()
            optimizer.step()
            model.fuyou.close()
        assert fuyou.verify_store(stores) == []
        model = fuyou.open_store_model(stores)
        weights.append(plain(model, tmp_path / f"out{number}").state_dict())
        model.fuyou.close()
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])
    sizes = [sum(p.stat().st_size for p in (tmp_path / name).glob("extents-*.bin")) for name in ("a", "b")]
    assert min(sizes) > max(sizes) / 20  # by measured rates of one drive, which wander
    (tmp_path / "b").rename(tmp_path / "c")
    with pytest.raises(StoreError, match=f"{tmp_path / 'b'} has no"):
        fuyou.open_store_model([tmp_path / "a", tmp_path / "b"])


# --- directories -------------------------------------------------------------------------------------------------------


def test_missing_parents_are_made(tmp_path: Path) -> None:
    model = open_model(tmp_path / "a" / "b" / "store")
    model.fuyou.close()
    assert Store.peek(tmp_path / "a" / "b" / "store").step == 0


def test_a_file_in_the_place_of_the_store(tmp_path: Path) -> None:
    (tmp_path / "store").write_text("mine")
    with pytest.raises((OSError, StoreError)) as caught:
        open_model(tmp_path / "store")
    assert str(tmp_path / "store") in str(caught.value)
    assert (tmp_path / "store").read_text() == "mine"
    assert threads_of_ours() == []


def test_a_folder_with_other_files(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("mine")
    with pytest.raises(StoreError, match=r"thesis\.tex"):
        open_model(tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == ["thesis.tex"]


def test_an_unwritable_folder(tmp_path: Path) -> None:
    """Also for root, who may write anywhere but into a kernel's file system."""
    folder = Path("/proc/fuyou-store") if os.geteuid() == 0 else tmp_path / "locked" / "store"
    if os.geteuid() != 0:
        (tmp_path / "locked").mkdir(mode=0o500)
    with pytest.raises(OSError, match="fuyou-store|locked"):
        open_model(folder)
    assert threads_of_ours() == []


@pytest.fixture
def small_drive(tmp_path: Path) -> Iterator[Callable[[int], Path]]:
    """Mounts a tmpfs of so many MiB; skips where that is not allowed."""
    mounted: list[Path] = []

    def mount(size_mib: int) -> Path:
        folder = tmp_path / f"drive{len(mounted)}"
        folder.mkdir()
        done = subprocess.run(
            ["mount", "-t", "tmpfs", "-o", f"size={size_mib}m", "none", str(folder)], capture_output=True, check=False
        )
        if done.returncode:
            pytest.skip("only root may mount a small file system to fill")
        mounted.append(folder)
        return folder

    yield mount
    for folder in mounted:
        subprocess.run(["umount", "-l", str(folder)], check=True)


def test_a_full_drive_when_the_store_is_made(small_drive: Any) -> None:
    """Asked for before anything is written; with room, the same call succeeds."""
    drive = small_drive(3)
    filler = drive / "filler"
    filler.write_bytes(bytes(3 * 2**20 - 64 * 1024))
    with pytest.raises(OSError, match="space|free") as caught:
        open_model(drive / "store")
    assert caught.value.errno == errno.ENOSPC
    assert str(drive) in str(caught.value)
    filler.unlink()
    open_model(drive / "store").fuyou.close()


def test_a_full_drive_when_the_states_are_laid_out(small_drive: Any) -> None:
    """The weights are there already and stay whole; with room, training begins."""
    drive = small_drive(12)
    model = open_model(drive / "store")
    with model.fuyou:
        filler = drive / "filler"
        free = os.statvfs(drive).f_bavail * os.statvfs(drive).f_frsize
        filler.write_bytes(bytes(free - 200 * 1024))
        with pytest.raises(OSError, match="space|free") as caught:
            fuyou.AdamW(model)
        assert caught.value.errno == errno.ENOSPC
        filler.unlink()
        optimizer = fuyou.AdamW(model)
        model(**batches(1)[0]).loss.backward()
        optimizer.step()
    assert fuyou.verify_store(drive / "store") == []
    assert fuyou.inspect_store(drive / "store")["step"] == 1


def test_a_full_drive_in_the_middle_of_a_run(small_drive: Any, tmp_path: Path) -> None:
    """A commit needs no room but for a manifest that grows: then the step is not committed, and with room the run goes on."""
    todo = batches(5)

    def train(store: Path, until: int, before_step: Any = lambda _step: None) -> list[float]:
        model = open_model(store)
        losses = []
        with model.fuyou:
            optimizer = fuyou.AdamW(model, lr=1e-2, max_grad_norm=0.5)
            while optimizer.step_count < until:
                before_step(optimizer.step_count)
                optimizer.commit_extra({"grows": "x" * 6000 * max(0, optimizer.step_count - 2)})
                loss = model(**todo[optimizer.step_count]).loss
                loss.backward()
                optimizer.step()
                optimizer.zero_grad()
                losses.append(loss.item())
        return losses

    drive = small_drive(16)
    filler = drive / "filler"

    def fill(step: int) -> None:
        if step >= 2:
            # Until nothing more goes in: a tmpfs counts roughly.
            with contextlib.suppress(OSError), filler.open("ab", buffering=0) as file:
                while file.write(bytes(4096)):
                    pass

    with pytest.raises(OSError, match="No space left") as caught:
        train(drive / "store", 5, fill)
    assert caught.value.errno == errno.ENOSPC
    assert str(drive) in str(caught.value)
    committed = Store.peek(drive / "store").step
    assert committed in (2, 3)
    filler.unlink()
    assert train(drive / "store", 5) == train(tmp_path / "other", 5)[committed:]
    assert fuyou.verify_store(drive / "store") == []


# --- locks, threads, memory ----------------------------------------------------------------------------------------------


def test_a_store_in_use_is_refused_and_free_after_close(tmp_path: Path) -> None:
    model = open_model(tmp_path / "store")
    with pytest.raises(StoreLockedError):
        open_model(tmp_path / "store")
    model.fuyou.close()
    model.fuyou.close()
    open_model(tmp_path / "store").fuyou.close()
    assert threads_of_ours() == []
    with pytest.raises(fuyou.ModelError, match="closed"):
        model(**batches(1)[0])
    with pytest.raises(fuyou.ModelError, match="closed"):
        fuyou.AdamW(model)


def test_closing_gives_the_memory_back(tmp_path: Path) -> None:
    """No buffer stays mapped when model and optimizer are gone."""
    from io_engine.buffers import _live_mappings

    gc.collect()  # what earlier tests left
    before = len(_live_mappings)
    model = open_model(tmp_path / "store")
    optimizer = fuyou.AdamW(model, max_grad_norm=1.0)
    for batch in batches(2):
        model(**batch).loss.backward()
        optimizer.step()
    model(**batches(1)[0])  # a forward pass without backward holds activations
    model.fuyou.close()
    del model, optimizer
    gc.collect()
    assert len(_live_mappings) == before


def test_an_error_inside_the_with_statement_abandons(tmp_path: Path) -> None:
    model = open_model(tmp_path / "store")
    with pytest.raises(ValueError, match="mine"), model.fuyou:
        optimizer = fuyou.AdamW(model, max_grad_norm=1.0)
        for batch in batches(2):
            model(**batch).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        raise ValueError("mine")
    assert threads_of_ours() == []
    # In this window the second step's updates had not begun.
    assert Store.peek(tmp_path / "store").step == 1
    assert fuyou.verify_store(tmp_path / "store") == []


def test_a_failed_optimizer_leaves_the_model_usable(tmp_path: Path) -> None:
    model = open_model(tmp_path / "store", host_memory="512MiB")  # states are kept in memory
    with model.fuyou:
        for bad in ({"lr": -1.0}, {"betas": (1.0, 0.9)}, {"max_grad_norm": 0.0}):
            with pytest.raises(fuyou.ConfigError):
                fuyou.AdamW(model, **bad)
        optimizer = fuyou.AdamW(model)
        with pytest.raises(fuyou.ConfigError, match="already"):
            fuyou.AdamW(model)
        model(**batches(1)[0]).loss.backward()
        optimizer.step()
    assert model.fuyou.committed_step == 1


def test_a_bad_batch_leaves_the_model_usable(tmp_path: Path) -> None:
    model = open_model(tmp_path / "store")
    with model.fuyou:
        optimizer = fuyou.AdamW(model, max_grad_norm=1.0)
        good = batches(1)[0]
        for bad in (
            {"input_ids": good["input_ids"] + 1000, "labels": good["labels"]},
            {"input_ids": good["input_ids"], "labels": good["labels"][:, :3]},
            {"input_ids": good["input_ids"], "labels": torch.full_like(good["labels"], -100)},
        ):
            with pytest.raises(fuyou.DataError):
                model(**bad)
        model(**good).loss.backward()
        optimizer.step()
    assert model.fuyou.committed_step == 1


# --- interruptions -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("max_grad_norm", [None, 0.5])
@pytest.mark.parametrize(
    ("owner", "name", "after"),
    [
        (WeightStream, "acquire", False),
        (WeightStream, "acquire", True),
        (OffloadedAdamW, "gradient_complete", True),
        (OffloadedAdamW, "start_pending_update", False),
        (OffloadedAdamW, "start_pending_update", True),
        (AdamWScalars, "at_step", False),
    ],
    ids=lambda value: getattr(value, "__name__", None),
)
def test_ctrl_c_leaves_a_store_that_resumes(
    owner: type, name: str, after: bool, max_grad_norm: float | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Wherever it hits, nothing half done is committed, not even by the close() that follows."""
    todo = batches(4)
    model = open_model(tmp_path / "store")
    optimizer = fuyou.AdamW(model, lr=1e-2, max_grad_norm=max_grad_norm)

    def step(batch: dict[str, torch.Tensor]) -> None:
        model(**batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    step(todo[0])
    step(todo[1])
    plain_function, calls = getattr(owner, name), 0

    def interrupted(*args: Any, **kwargs: Any) -> Any:
        nonlocal calls
        if threading.current_thread() is not threading.main_thread():
            return plain_function(*args, **kwargs)
        calls += 1
        if after and calls == 2:
            plain_function(*args, **kwargs)
        if calls == 2:
            raise KeyboardInterrupt
        return plain_function(*args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(owner, name, interrupted)
        try:
            for batch in todo[2:]:
                step(batch)
        except KeyboardInterrupt:
            with pytest.raises(fuyou.ModelError, match="interrupted"):
                model(**todo[2])
            with pytest.raises(fuyou.ModelError, match="interrupted"):
                model.fuyou.flush()
    model.fuyou.close()
    assert threads_of_ours() == []
    assert fuyou.verify_store(tmp_path / "store") == []
    # What it stands at is the undisturbed run's state after as many steps.
    model = open_model(tmp_path / "store")
    committed = model.fuyou.committed_step
    weights = plain(model, tmp_path / "out").state_dict()
    model.fuyou.close()
    assert 0 <= committed <= 4
    model = open_model(tmp_path / "reference")
    optimizer = fuyou.AdamW(model, lr=1e-2, max_grad_norm=max_grad_norm)
    for batch in todo[:committed]:
        step(batch)
    expected = plain(model, tmp_path / "out2").state_dict()
    model.fuyou.close()
    assert weights.keys() == expected.keys()
    for key in weights:
        assert torch.equal(weights[key], expected[key]), key


def test_a_run_keeps_its_compute_threads_until_it_is_closed(tmp_path: Path) -> None:
    open_model(tmp_path / "store").fuyou.close()
    torch.set_num_threads(2)
    model = open_model(tmp_path / "store")
    assert torch.get_num_threads() == 1
    assert "compute threads set to the run's 1" in model.fuyou.resumed
    model.fuyou.close()
    assert torch.get_num_threads() == 2


def test_a_config_that_holds_infinity(tmp_path: Path) -> None:
    """As those of bamba and mamba2 do: JSON has no such number, the store keeps it all the same."""
    config = tiny_model_config("llama")
    config.time_step_limit = (0.0, float("inf"))
    offload = fuyou.OffloadConfig(store=tmp_path / "store", device="cpu", host_memory="64MiB")
    fuyou.from_config(config, offload=offload).fuyou.close()
    model = fuyou.open_store_model(tmp_path / "store")
    assert list(model.config.time_step_limit) == [0.0, float("inf")]
    model.fuyou.close()


@pytest.mark.parametrize(
    "numerics",
    [
        None,
        {"seed": None},
        {"seed": "3"},
        {"micro_batch_size": 0},
        {"num_threads": -1},
        {"num_threads": 2**40},
        {"device": 7},
    ],
)
def test_numerics_that_no_run_can_have(numerics: Any, tmp_path: Path) -> None:
    """A manifest that another program wrote: refused before anything is computed with it."""
    open_model(tmp_path / "store").fuyou.close()
    with PosixEngine() as engine, Store.open([tmp_path / "store"], engine=engine) as store:
        stored = 5 if numerics is None else store.state["numerics"] | numerics
        store.commit(step=0, slots={}, checksums={}, state=dict(store.state) | {"numerics": stored})
    with pytest.raises(StoreError, match="numerics is unusable"):
        open_model(tmp_path / "store")


def test_training_without_an_optimizer_is_explained(tmp_path: Path) -> None:
    model = open_model(tmp_path / "store")
    loss = model(**batches(1)[0]).loss
    assert loss.item() > 0
    with pytest.raises(fuyou.ModelError, match=r"fuyou\.AdamW"):
        loss.backward()
    model.fuyou.close()


EXIT = """
import sys, torch
torch.set_num_threads(1)
from pathlib import Path
from tests.fuyou import test_opening as t
import fuyou
model = t.open_model(Path(sys.argv[1]))
optimizer = fuyou.AdamW(model, max_grad_norm=None if sys.argv[2] == "none" else 1.0)
for batch in t.batches(3):
    model(**batch).loss.backward()
    optimizer.step()
    optimizer.zero_grad()
if sys.argv[3] == "raise":
    raise SystemExit(7)
"""


@pytest.mark.parametrize(("clipping", "how"), [pytest.param("none", "end", marks=pytest.mark.slow), ("1.0", "raise")])
def test_a_program_that_never_closes_ends_and_resumes(clipping: str, how: str, tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", EXIT, str(tmp_path / "store"), clipping, how],
        cwd=Path(__file__).parents[2],
        env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == (7 if how == "raise" else 0), done.stderr[-2000:]
    assert Store.peek(tmp_path / "store").step in (1, 2, 3)
    assert fuyou.verify_store(tmp_path / "store") == []
    open_model(tmp_path / "store", resume="must").fuyou.close()


# --- evaluation ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("host_memory", ["3MiB", "256MiB"])
@pytest.mark.parametrize("max_grad_norm", [None, 1.0])
def test_evaluation_at_any_moment_sees_the_last_step(
    max_grad_norm: float | None, host_memory: str, tmp_path: Path
) -> None:
    """Before backward, between backward and step, and after: the same weights as plain transformers has."""
    model = open_model(tmp_path / "store", host_memory=host_memory)
    with model.fuyou:
        optimizer = fuyou.AdamW(model, lr=1e-2, max_grad_norm=max_grad_norm)
        todo = batches(3)
        evaluated = todo[2]
        for number, batch in enumerate(todo[:2]):
            reference = plain(model, tmp_path / f"before{number}")
            with torch.no_grad():
                expected = reference(**evaluated)

            def check(expected: Any = expected) -> None:
                model.eval()
                with torch.no_grad():
                    found = model(**evaluated)
                model.train()
                assert torch.equal(found.logits, expected.logits)
                assert torch.equal(found.loss, expected.loss)

            check()
            model(**batch).loss.backward()
            check()
            between = plain(model, tmp_path / f"between{number}")
            for name, weight in reference.state_dict().items():
                assert torch.equal(between.state_dict()[name], weight)
            check()
            optimizer.step()
            optimizer.zero_grad()
            model.eval()
            with torch.no_grad():
                after = model(**evaluated)
            model.train()
            assert not torch.equal(after.logits, expected.logits)
        assert model.fuyou.committed_step == 2


def test_evaluation_does_not_change_training(tmp_path: Path) -> None:
    losses: list[list[float]] = []
    for evaluate in (False, True):
        model = open_model(tmp_path / str(evaluate), host_memory="256MiB")
        losses.append([])
        with model.fuyou:
            optimizer = fuyou.AdamW(model, lr=1e-2)
            for batch in batches(4):
                model(**batch).loss.backward()
                if evaluate:
                    with torch.no_grad():
                        model(**batch)
                optimizer.step()
                optimizer.zero_grad()
                losses[-1].append(model.fuyou.step_metrics()["loss"])
    assert losses[0] == losses[1]


def test_a_second_forward_pass_before_step_is_refused_in_the_backward_window(tmp_path: Path) -> None:
    model = open_model(tmp_path / "store", host_memory="256MiB")
    with model.fuyou:
        optimizer = fuyou.AdamW(model)
        first, second = batches(2)
        model(**first).loss.backward()
        with pytest.raises(RuntimeError, match="before optimizer.step"):
            model(**second)
        optimizer.zero_grad()  # gives the first one up
        model(**second).loss.backward()
        optimizer.step()
        assert optimizer.step_count == 1


def test_gradients_of_two_backward_passes_at_the_least_budget(tmp_path: Path) -> None:
    """In the forward window they add up; spilled ones too, where there is room for a single gradient."""
    norms = []
    for host_memory in ("64MiB", "3MiB"):
        model = open_model(tmp_path / host_memory, host_memory=host_memory)
        with model.fuyou:
            optimizer = fuyou.AdamW(model, max_grad_norm=1.0)
            for batch in batches(3):
                model(**batch).loss.backward()
            optimizer.step()
            norms.append(optimizer.last_step.grad_norm)
    assert norms[0] == norms[1]


def test_generate_equals_plain_transformers(tmp_path: Path) -> None:
    """With a KV cache, greedily and with sampling, in the middle of training."""
    model = open_model(tmp_path / "store")
    with model.fuyou:
        optimizer = fuyou.AdamW(model, lr=1e-2, max_grad_norm=1.0)
        for batch in batches(2):
            model(**batch).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        reference = plain(model, tmp_path / "plain")
        model.eval()
        prompt = batches(1)[0]["input_ids"][:1, :5]
        for options in ({"do_sample": False}, {"do_sample": True, "temperature": 0.8}):
            torch.manual_seed(4)
            expected = reference.generate(prompt, max_new_tokens=8, **options)
            torch.manual_seed(4)
            found = model.generate(prompt, max_new_tokens=8, **options)
            assert torch.equal(found, expected)
        model.train()
        model(**batches(3)[2]).loss.backward()
        optimizer.step()
    assert model.fuyou.committed_step == 3


def test_export_needs_memory_for_one_block_only(tmp_path: Path) -> None:
    """And what is opened from a store alone is frozen."""
    open_model(tmp_path / "store").fuyou.close()
    with pytest.raises(fuyou.PlanError):
        open_model(tmp_path / "store", host_memory="1MiB")
    model = fuyou.open_store_model(tmp_path / "store", host_memory="1MiB")
    with model.fuyou:
        assert not any(p.requires_grad for p in model.parameters())
        plain(model, tmp_path / "out")
        with pytest.raises(fuyou.ConfigError, match="nothing to train"):
            fuyou.AdamW(model)


def test_frozen_parameters_stay_and_take_no_states(tmp_path: Path) -> None:
    """Only what matches `trainable` is trained, in either window and with little memory."""
    for number, max_grad_norm in enumerate((None, 1.0)):
        store = tmp_path / f"store{number}"
        model = fuyou.from_config(
            tiny_model_config("llama"),
            offload=fuyou.OffloadConfig(store=store, device="cpu", host_memory="3MiB"),
            seed=3,
            trainable=[r"model\.layers\.1\..*"],
        )
        with model.fuyou:
            before = plain(model, tmp_path / f"a{number}").state_dict()
            optimizer = fuyou.AdamW(model, lr=1e-2, max_grad_norm=max_grad_norm)
            for batch in batches(3):
                model(**batch).loss.backward()
                optimizer.step()
                optimizer.zero_grad()
            after = plain(model, tmp_path / f"b{number}").state_dict()
        changed = {name for name in before if not torch.equal(before[name], after[name])}
        assert changed
        assert all(".layers.1." in name for name in changed)
        shards = {s["name"]: s["state_bytes"] for s in fuyou.inspect_store(store)["shards"]}
        assert [name for name, size in shards.items() if size] == ["model.layers.1"]
