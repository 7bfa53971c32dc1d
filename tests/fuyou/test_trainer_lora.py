"""An unmodified `transformers.Trainer` over adapters on a streamed base, next to the same Trainer over the plain model."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from accelerate.state import AcceleratorState, GradientState
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

import fuyou
from tests.fuyou.test_trainer import Stop, history, streamed, trainer
from tests.tiny_models import tiny_model_config

# transformers warns of an attribute of its own that peft reads.
pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning")

LORA: dict[str, Any] = {
    "r": 4,
    "target_modules": "all-linear",
    "task_type": "CAUSAL_LM",
    "modules_to_save": ["lm_head"],
}


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
    # accelerate keeps these for the whole process.
    GradientState._reset_state()
    AcceleratorState._reset_state(reset_partial_state=True)


def adapted(model: Any) -> Any:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        return peft.get_peft_model(model, peft.LoraConfig(**LORA))


def saved(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "adapter_model.safetensors")


def test_equals_plain_trainer(tmp_path: Path) -> None:
    """Losses, norms, evaluation; checkpoints in peft's format, which hold adapters alone."""
    model = streamed(tiny_model_config("llama"), tmp_path)
    model.save_pretrained(tmp_path / "start")
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "start", dtype=torch.float32)
    changes: dict[str, Any] = {"weight_decay": 0.0, "save_strategy": "steps", "save_steps": 2}
    expected = trainer(adapted(plain), tmp_path / "plain", **changes)
    expected.train()
    wrapped = adapted(model)
    optimizer = fuyou.AdamW(wrapped, lr=2e-3, weight_decay=0.0, max_grad_norm=0.5)
    with wrapped.fuyou:
        made = trainer(wrapped, tmp_path / "out", optimizer, [fuyou.FuyouCallback()], **changes)
        made.train()
        assert wrapped.fuyou.committed_step == 4
        for key in ("loss", "eval_loss", "grad_norm", "learning_rate"):
            assert history(made, key) == pytest.approx(history(expected, key), rel=1e-4), key
    for step in (2, 4):
        ours, theirs = (saved(tmp_path / name / f"checkpoint-{step}") for name in ("out", "plain"))
        assert ours.keys() == theirs.keys()
        for name, value in ours.items():
            torch.testing.assert_close(value, theirs[name], rtol=1e-3, atol=2e-5, msg=name)
        assert not list((tmp_path / "out" / f"checkpoint-{step}").glob("model*.safetensors"))


def run(folder: Path, stop: int | None, resume: bool | str | None = None, **changes: Any) -> Any:
    """The run in `folder`, made as a script would make it each time it is started."""
    wrapped = adapted(streamed(tiny_model_config("llama"), folder))
    optimizer = fuyou.AdamW(wrapped, lr=2e-3, weight_decay=0.1, max_grad_norm=0.5)
    callbacks = [fuyou.FuyouCallback(), *([Stop(stop)] if stop else [])]
    options: dict[str, Any] = {"max_steps": 7, "eval_strategy": "no", "save_strategy": "steps", "save_steps": 2}
    try:
        made = trainer(wrapped, folder / "out", optimizer, callbacks, **options | changes)
        try:
            made.train(resume_from_checkpoint=resume)
        except KeyboardInterrupt:
            wrapped.fuyou.abandon()
            raise
        wrapped.save_pretrained(folder / "end")
        return made
    finally:
        wrapped.fuyou.abandon()


def test_resumes_at_the_last_commit(tmp_path: Path) -> None:
    """Killed between two of Trainer's saves: losses and adapters of the rest are those of a run that was not."""
    expected = run(tmp_path / "whole", None)
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "cut", 3)
    made = run(tmp_path / "cut", None, resume=True)
    wanted = {entry["step"]: entry["loss"] for entry in expected.state.log_history if "loss" in entry}
    got = {entry["step"]: entry["loss"] for entry in made.state.log_history if "loss" in entry}
    assert set(got) >= {4, 5, 6, 7}
    assert got == {step: wanted[step] for step in got}
    ends = [saved(tmp_path / name / "end") for name in ("whole", "cut")]
    assert all(torch.equal(ends[0][name], ends[1][name]) for name in ends[0])


def test_an_older_checkpoint_than_the_stores_step_is_refused(tmp_path: Path) -> None:
    run(tmp_path, None, max_steps=4)
    with pytest.raises(fuyou.ConfigError, match=r"other values than the store, which stands at step 4"):
        run(tmp_path, None, resume=str(tmp_path / "out" / "checkpoint-2"), max_steps=6)
