"""An unmodified `transformers.Trainer` over a streamed model, next to the same Trainer over the plain model."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate.state import AcceleratorState, GradientState
from transformers import AutoModelForCausalLM, EarlyStoppingCallback, Trainer, TrainerCallback, TrainingArguments

import fuyou
from tests.fuyou.master_adamw import MasterAdamW, assert_equal_weights
from tests.tiny_models import tiny_batches, tiny_model_config

# Renamed between releases of transformers.
CHECKPOINTING = next(
    f.name
    for f in dataclasses.fields(TrainingArguments)
    if f.name in ("activation_checkpointing", "gradient_checkpointing")
)
BATCH_SIZE, ACCUMULATION, NUM_STEPS = 2, 4, 4


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
    # accelerate keeps these for the whole process.
    GradientState._reset_state()
    AcceleratorState._reset_state(reset_partial_state=True)


class Rows(torch.utils.data.Dataset[dict[str, torch.Tensor]]):
    """Rows of padded tiny batches."""

    def __init__(self, config: Any, num_rows: int, seed: int) -> None:
        self._rows = tiny_batches(config, 1, num_rows, batch_size=1, seed=seed)[0]

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return {key: value[0] for key, value in self._rows[index].items()}


def arguments(folder: Path, **changes: Any) -> TrainingArguments:
    options: dict[str, Any] = {
        "output_dir": str(folder),
        "per_device_train_batch_size": BATCH_SIZE,
        "per_device_eval_batch_size": BATCH_SIZE,
        "gradient_accumulation_steps": ACCUMULATION,
        "max_steps": NUM_STEPS,
        "max_grad_norm": 0.5,
        "warmup_steps": 2,
        "learning_rate": 2e-3,
        "lr_scheduler_type": "cosine",
        "weight_decay": 0.1,
        "logging_steps": 1,
        "eval_strategy": "steps",
        "eval_steps": 2,
        "save_strategy": "no",
        "report_to": "none",
        "use_cpu": True,
        "disable_tqdm": True,
        "dataloader_pin_memory": False,
    }
    return TrainingArguments(**options | changes)


def streamed(config: Any, folder: Path, **options: Any) -> Any:
    # Dropout off: Trainer draws other masks than the vertical schedule, which seeds each micro-batch.
    config.attention_dropout = 0.0
    options = {"compute_dtype": "float32", "host_memory": "128MiB"} | options
    offload = fuyou.OffloadConfig(store=folder / "store", device="cpu", **options)
    return fuyou.from_config(config, offload=offload, seed=1)


def trainer(model: Any, folder: Path, optimizer: Any = None, callbacks: Any = None, **changes: Any) -> Trainer:
    config = model.config
    return Trainer(
        model=model,
        args=arguments(folder, **changes),
        train_dataset=Rows(config, 40, seed=5),
        eval_dataset=Rows(config, 6, seed=6),
        optimizers=(optimizer, None),
        callbacks=callbacks,
    )


def history(made: Trainer, key: str) -> list[float]:
    return [entry[key] for entry in made.state.log_history if key in entry]


@pytest.mark.parametrize("name", ["llama_tied", "qwen3_moe"])
def test_equals_plain_trainer(name: str, tmp_path: Path) -> None:
    """Losses, norms before clipping, learning rates and evaluation losses, and the weights that are saved."""
    model = streamed(tiny_model_config(name), tmp_path)
    model.save_pretrained(tmp_path / "start")
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "start", dtype=torch.float32)
    expected = trainer(plain, tmp_path / "plain")
    expected.train()
    optimizer = fuyou.AdamW(model, lr=2e-3, weight_decay=0.1, max_grad_norm=0.5, param_groups=_groups(model))
    with model.fuyou:
        made = trainer(model, tmp_path / "out", optimizer, [fuyou.FuyouCallback()])
        made.train()
        assert model.fuyou.committed_step == NUM_STEPS
        assert made.args.max_grad_norm == 0.5
        for key in ("loss", "eval_loss", "grad_norm", "learning_rate"):
            assert history(made, key) == pytest.approx(history(expected, key), rel=2e-5), key
        assert len(history(made, "grad_norm")) == NUM_STEPS
        assert min(history(expected, "grad_norm")) > 0.5  # clipping was at work
        model.save_pretrained(tmp_path / "end")
    exported = AutoModelForCausalLM.from_pretrained(tmp_path / "end", dtype="auto")
    for (parameter_name, parameter), wanted in zip(exported.named_parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(parameter, wanted, rtol=1e-3, atol=2e-6, msg=parameter_name)


@pytest.mark.parametrize("bf16", [False, True], ids=["float32", "autocast"])
@pytest.mark.parametrize("name", ["llama", pytest.param("qwen3_moe", marks=pytest.mark.slow)])
def test_without_clipping_equals_plain_trainer_bit_for_bit(name: str, bf16: bool, tmp_path: Path) -> None:
    """The arithmetic is the same, under autocast too; a tied weight's gradients alone are added in another order."""
    changes: dict[str, Any] = {"max_grad_norm": 0.0, "bf16": bf16}
    model = streamed(tiny_model_config(name), tmp_path)
    model.save_pretrained(tmp_path / "start")
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "start", dtype=torch.float32)
    expected = trainer(plain, tmp_path / "plain", **changes)
    expected.train()
    optimizer = fuyou.AdamW(model, lr=2e-3, weight_decay=0.1, param_groups=_groups(model))
    with model.fuyou:
        made = trainer(model, tmp_path / "out", optimizer, [fuyou.FuyouCallback()], **changes)
        made.train()
        for key in ("loss", "eval_loss", "learning_rate"):
            assert history(made, key) == history(expected, key), key
        assert len(history(made, "loss")) == NUM_STEPS
        assert_equal_weights(model, plain, tmp_path)


def test_weights_in_bfloat16_equal_plain_trainer_bit_for_bit(tmp_path: Path) -> None:
    """In memory with float32 masters too; clipping is the optimizer's on both sides."""
    model = streamed(tiny_model_config("llama"), tmp_path, compute_dtype="bfloat16")
    model.save_pretrained(tmp_path / "start")
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "start", dtype=torch.bfloat16)
    masters = MasterAdamW(plain, lr=2e-3, max_grad_norm=0.5)
    expected = trainer(plain, tmp_path / "plain", masters, max_grad_norm=0.0)
    expected.train()
    optimizer = fuyou.AdamW(model, lr=2e-3, weight_decay=0.0, max_grad_norm=0.5)
    with model.fuyou:
        made = trainer(model, tmp_path / "out", optimizer, [fuyou.FuyouCallback()])
        made.train()
        for key in ("loss", "eval_loss", "learning_rate"):
            assert history(made, key) == history(expected, key), key
        assert history(made, "grad_norm") == pytest.approx(masters.norms, rel=1e-12)
        assert min(masters.norms) > 0.5  # clipping was at work
        assert_equal_weights(model, plain, tmp_path)


def _groups(model: Any) -> list[dict[str, Any]]:
    """Trainer's own groups: no decay for norms and biases."""
    decayed = [p for n, p in model.named_parameters() if "norm" not in n and "bias" not in n]
    others = [p for n, p in model.named_parameters() if "norm" in n or "bias" in n]
    return [{"params": decayed, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}]


@pytest.fixture(name="model")
def _model(tmp_path: Path) -> Iterator[Any]:
    model = streamed(tiny_model_config("llama"), tmp_path)
    yield model
    model.fuyou.abandon()


def test_without_the_callback_clipping_is_not_lost_silently(model: Any, tmp_path: Path) -> None:
    """max_grad_norm is 1.0 by default in Trainer, and would clip nothing."""
    optimizer = fuyou.AdamW(model, max_grad_norm=0.5)
    with pytest.raises(fuyou.ModelError, match="FuyouCallback"):
        trainer(model, tmp_path / "out", optimizer).train()
    assert model.fuyou.committed_step == 0


def test_clip_grad_norm_is_refused(model: Any) -> None:
    """The plain loop's clipping would find no gradients."""
    fuyou.AdamW(model)
    with pytest.raises(fuyou.ModelError, match="max_grad_norm"):
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    model.requires_grad_(False)
    assert all(p.grad is None for p in model.parameters())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"fp16": True}, "fp16"),
        ({CHECKPOINTING: True}, "checkpointing"),
        pytest.param(
            {"torch_compile": True},
            "torch_compile",
            # accelerate imports torch's compiler, which is not ready for its own deprecations.
            marks=pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning"),
        ),
        ({"max_grad_norm": 1.0}, "without clipping"),
    ],
)
def test_refused_arguments(model: Any, tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    """What would silently compute something else ends in one sentence."""
    optimizer = fuyou.AdamW(model)
    changes = {"max_grad_norm": 0.0} | changes
    with pytest.raises(fuyou.FuyouError, match=message):
        trainer(model, tmp_path / "out", optimizer, [fuyou.FuyouCallback()], **changes).train()


@pytest.mark.parametrize(("field", "value"), [("deepspeed", {"zero": 3}), ("fsdp", "full_shard"), ("_n_gpu", 2)])
def test_other_ways_to_spread_a_model_are_refused(model: Any, tmp_path: Path, field: str, value: Any) -> None:
    """On this machine some of these cannot even be asked for: what is checked is what TrainingArguments says."""
    args = arguments(tmp_path / "out", max_grad_norm=0.0)
    object.__setattr__(args, field, value)
    with pytest.raises(fuyou.ConfigError, match="GPUs" if field == "_n_gpu" else field):
        fuyou.FuyouCallback().on_init_end(args, None, None, model=model)


def test_wrong_optimizer_and_model_are_refused(model: Any, tmp_path: Path) -> None:
    """Trainer's own optimizer has nothing to update."""
    with pytest.raises(fuyou.ConfigError, match="own optimizer"):
        trainer(model, tmp_path / "out", None, [fuyou.FuyouCallback()]).train()
    plain = AutoModelForCausalLM.from_config(tiny_model_config("llama"))
    with pytest.raises(fuyou.ConfigError, match=r"fuyou\.from_pretrained"):
        trainer(plain, tmp_path / "out", None, [fuyou.FuyouCallback()]).train()


def test_checkpoints_while_training_are_plain_models(model: Any, tmp_path: Path) -> None:
    """save_strategy="steps" exports the weights of its step; no clipping: updates run during backward."""
    optimizer = fuyou.AdamW(model)
    made = trainer(
        model,
        tmp_path / "out",
        optimizer,
        [fuyou.FuyouCallback()],
        max_grad_norm=0.0,
        save_strategy="steps",
        save_steps=2,
        max_steps=2,
        eval_strategy="no",
    )
    made.train()
    assert model.fuyou.step_metrics()["update_window"] == "backward"
    model.save_pretrained(tmp_path / "end")
    saved = AutoModelForCausalLM.from_pretrained(tmp_path / "out" / "checkpoint-2", dtype="auto")
    final = AutoModelForCausalLM.from_pretrained(tmp_path / "end", dtype="auto")
    assert all(torch.equal(a, b) for a, b in zip(saved.parameters(), final.parameters(), strict=True))


def test_label_smoothing(tmp_path: Path) -> None:
    """Trainer computes this loss itself, from outputs that carry gradients; accumulated over two passes."""
    changes: dict[str, Any] = {"label_smoothing_factor": 0.1, "gradient_accumulation_steps": 2, "max_steps": 3}
    model = streamed(tiny_model_config("llama"), tmp_path)
    model.save_pretrained(tmp_path / "start")
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "start", dtype=torch.float32)
    expected = trainer(plain, tmp_path / "plain", **changes)
    expected.train()
    optimizer = fuyou.AdamW(model, lr=2e-3, weight_decay=0.1, max_grad_norm=0.5, param_groups=_groups(model))
    with model.fuyou:
        made = trainer(model, tmp_path / "out", optimizer, [fuyou.FuyouCallback()], **changes)
        made.train()
    for key in ("loss", "grad_norm", "eval_loss"):
        assert history(made, key) == pytest.approx(history(expected, key), rel=1e-4), key


def test_bfloat16_autocast(tmp_path: Path) -> None:
    """bf16=True over float32 weights gives the plain Trainer's losses."""
    model = streamed(tiny_model_config("llama"), tmp_path)
    model.save_pretrained(tmp_path / "start")
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "start", dtype=torch.float32)
    changes: dict[str, Any] = {
        "bf16": True,
        "max_steps": 2,
        "gradient_accumulation_steps": 2,
        "eval_strategy": "no",
        "weight_decay": 0.0,
    }
    expected = trainer(plain, tmp_path / "plain", **changes)
    expected.train()
    optimizer = fuyou.AdamW(model, lr=2e-3, weight_decay=0.0, max_grad_norm=0.5)
    with model.fuyou:
        made = trainer(model, tmp_path / "out", optimizer, [fuyou.FuyouCallback()], **changes)
        made.train()
    assert history(made, "loss") == pytest.approx(history(expected, "loss"), rel=1e-5)
    assert history(made, "grad_norm") == pytest.approx(history(expected, "grad_norm"), rel=1e-3)


class Stop(TrainerCallback):
    """Ends training like a crash, behind the given step's own callbacks."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Raise at the step."""
        if state.global_step == self.step:
            raise KeyboardInterrupt


def _train(folder: Path, stop: int | None, resume: bool | str | None = None, **changes: Any) -> Trainer:
    """A Trainer over the run in `folder`, made as a script would make it each time it is started."""
    model = streamed(tiny_model_config("llama"), folder)
    optimizer = fuyou.AdamW(model, lr=2e-3, weight_decay=0.1, max_grad_norm=0.5)
    callbacks = [fuyou.FuyouCallback(), *([Stop(stop)] if stop else [])]
    options: dict[str, Any] = {"max_steps": 7, "lr_scheduler_type": "cosine", "eval_strategy": "no"} | changes
    try:
        made = trainer(model, folder / "out", optimizer, callbacks, **options)
        try:
            made.train(resume_from_checkpoint=resume)
        except KeyboardInterrupt:
            model.fuyou.abandon()
            raise
        model.save_pretrained(folder / "end")
        return made
    finally:
        model.fuyou.abandon()


@pytest.mark.parametrize("save_steps", [pytest.param(100, marks=pytest.mark.slow), 2])
def test_resumes_at_the_last_commit(tmp_path: Path, save_steps: int) -> None:
    """Killed between two of Trainer's saves: losses, rates and weights of the rest are those of a run that was not."""
    saves = {"save_strategy": "steps", "save_steps": save_steps}
    expected = _train(tmp_path / "whole", None)
    for stop in (3, 6):
        with pytest.raises(KeyboardInterrupt):
            _train(tmp_path / "cut", stop, resume=stop > 3, **saves)
    made = _train(tmp_path / "cut", None, resume=True, **saves)
    assert made.state.global_step == 7
    for key in ("loss", "grad_norm", "learning_rate"):
        got, wanted = (
            {entry["step"]: entry[key] for entry in run.state.log_history if key in entry} for run in (made, expected)
        )
        assert set(got) >= {6, 7}
        assert got == {step: wanted[step] for step in got}, key
    ends = [
        AutoModelForCausalLM.from_pretrained(tmp_path / name / "end", dtype="auto").parameters()
        for name in ("whole", "cut")
    ]
    assert all(torch.equal(a, b) for a, b in zip(*ends, strict=True))


def test_resumes_from_trainers_own_checkpoint(tmp_path: Path) -> None:
    """A finished run goes on with more steps; an older checkpoint than the store's step is refused."""
    saves = {"save_strategy": "steps", "save_steps": 2, "lr_scheduler_type": "constant"}
    expected = _train(tmp_path / "whole", None, max_steps=6, lr_scheduler_type="constant")
    _train(tmp_path / "cut", None, max_steps=4, **saves)
    made = _train(tmp_path / "cut", None, resume=str(tmp_path / "cut" / "out" / "checkpoint-4"), max_steps=6, **saves)
    assert history(made, "loss") == history(expected, "loss")
    with pytest.raises(fuyou.ModelError, match="differs from the store's"):
        _train(tmp_path / "cut", None, resume=str(tmp_path / "cut" / "out" / "checkpoint-2"), max_steps=8, **saves)


def _accuracy(prediction: Any) -> dict[str, float]:
    labels = prediction.label_ids[:, 1:]
    right = prediction.predictions.argmax(-1)[:, :-1] == labels
    return {"accuracy": float(right[labels != -100].mean()), "size": float(abs(prediction.predictions).mean())}


def test_compute_metrics_and_predict(tmp_path: Path) -> None:
    """Evaluation sees the logits of plain transformers, between steps too."""
    changes: dict[str, Any] = {"max_steps": 2, "eval_steps": 1}
    model = streamed(tiny_model_config("llama"), tmp_path)
    model.save_pretrained(tmp_path / "start")
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "start", dtype=torch.float32)
    expected = trainer(plain, tmp_path / "plain", **changes)
    optimizer = fuyou.AdamW(model, lr=2e-3, weight_decay=0.1, max_grad_norm=0.5, param_groups=_groups(model))
    with model.fuyou:
        made = trainer(model, tmp_path / "out", optimizer, [fuyou.FuyouCallback()], **changes)
        for run in (expected, made):
            run.compute_metrics = _accuracy
            run.train()
        for key in ("eval_loss", "eval_accuracy", "eval_size"):
            assert history(made, key) == pytest.approx(history(expected, key), rel=2e-5), key
            assert len(history(made, key)) == 2
        rows = made.eval_dataset
        torch.testing.assert_close(
            made.predict(rows).predictions, expected.predict(rows).predictions, rtol=1e-3, atol=1e-5
        )


def test_save_total_limit_and_loggers(tmp_path: Path) -> None:
    """The newest checkpoints stay; what other callbacks are given to log holds our figures."""
    seen: list[dict[str, Any]] = []

    class Logger(TrainerCallback):
        """A logger as users write them, behind ours."""

        def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
            """Keep it."""
            seen.append(dict(logs))

    model = streamed(tiny_model_config("llama"), tmp_path)
    optimizer = fuyou.AdamW(model, max_grad_norm=0.5)
    with model.fuyou:
        made = trainer(
            model,
            tmp_path / "out",
            optimizer,
            [fuyou.FuyouCallback(), Logger()],
            save_strategy="steps",
            save_steps=1,
            save_total_limit=2,
            max_steps=4,
            eval_strategy="no",
        )
        made.train()
    assert sorted(p.name for p in (tmp_path / "out").glob("checkpoint-*")) == ["checkpoint-3", "checkpoint-4"]
    steps = [entry for entry in seen if "loss" in entry]
    assert len(steps) == 4
    assert all(entry["fuyou/bytes_written"] > 0 and entry["grad_norm"] > 0 for entry in steps)


BEST: dict[str, Any] = {
    "load_best_model_at_end": True,
    "save_strategy": "steps",
    "save_steps": 1,
    "eval_steps": 1,
    "save_total_limit": 1,
    "max_steps": 5,
    "learning_rate": 0.1,  # so that the best step is not the last
    "warmup_steps": 0,
    "lr_scheduler_type": "constant",
}


def test_the_best_model_is_there_at_the_end(tmp_path: Path) -> None:
    """Stopped early, as plain Trainer is; the store goes back to the best step, from which another optimizer goes on."""
    model = streamed(tiny_model_config("llama"), tmp_path)
    model.save_pretrained(tmp_path / "start")
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "start", dtype=torch.float32)
    expected = trainer(plain, tmp_path / "plain", callbacks=[EarlyStoppingCallback(2)], **BEST)
    optimizer = fuyou.AdamW(model, lr=0.1, weight_decay=0.1, max_grad_norm=0.5, param_groups=_groups(model))
    with model.fuyou:
        made = trainer(model, tmp_path / "out", optimizer, [fuyou.FuyouCallback(), EarlyStoppingCallback(2)], **BEST)
        for run in (expected, made):
            run.train()
        best = expected.state.best_global_step
        assert 0 < best < expected.state.global_step < 5
        assert (made.state.best_global_step, made.state.global_step) == (best, expected.state.global_step)
        assert [Path(run.state.best_model_checkpoint or "").name for run in (made, expected)] == [
            f"checkpoint-{best}"
        ] * 2
        folders = [sorted(path.name for path in (tmp_path / name).glob("checkpoint-*")) for name in ("plain", "out")]
        assert folders[0] == folders[1]
        assert model.fuyou.committed_step == best
        made.callback_handler.eval_dataloader = None
        assert made.evaluate()["eval_loss"] == pytest.approx(expected.evaluate()["eval_loss"], rel=2e-5)
        model.save_pretrained(tmp_path / "end")
        saved, kept = (
            AutoModelForCausalLM.from_pretrained(tmp_path / name, dtype="auto").state_dict()
            for name in ("end", f"out/checkpoint-{best}")
        )
        assert all(torch.equal(saved[name], kept[name]) for name in kept)
        with pytest.raises(RuntimeError):
            optimizer.step()
        again = fuyou.AdamW(model, lr=1e-3)
        assert again.step_count == best
        model.train()
        model(**tiny_batches(model.config, 1, 1, seed=5)[0][0]).loss.backward()
        again.step()
        model.fuyou.flush()
        assert model.fuyou.committed_step == best + 1


@pytest.mark.slow
def test_the_best_model_of_a_run_that_was_killed(tmp_path: Path) -> None:
    """The best step lies before the crash: the resumed run has it at its end, too. Nothing is kept where nobody asked."""
    changes = BEST | {"eval_strategy": "steps"}
    expected = _train(tmp_path / "whole", None, **changes)
    with pytest.raises(KeyboardInterrupt):
        _train(tmp_path / "cut", 4, **changes)
    assert [c["name"] for c in fuyou.inspect_store(tmp_path / "cut" / "store")["checkpoints"]] == ["trainer-best"]
    made = _train(tmp_path / "cut", None, resume=True, **changes)
    assert made.state.best_global_step == expected.state.best_global_step < 4
    ends = [
        AutoModelForCausalLM.from_pretrained(tmp_path / name / "end", dtype="auto").parameters()
        for name in ("whole", "cut")
    ]
    assert all(torch.equal(a, b) for a, b in zip(*ends, strict=True))
    saves = {"save_strategy": "steps", "save_steps": 1, "eval_strategy": "steps", "eval_steps": 1, "max_steps": 2}
    _train(tmp_path / "other", None, metric_for_best_model="loss", **saves)
    assert fuyou.inspect_store(tmp_path / "other" / "store")["checkpoints"] == []
    with pytest.raises(fuyou.ConfigError, match="has not kept that step"):
        _train(tmp_path / "other", None, resume=True, **saves | {"load_best_model_at_end": True, "max_steps": 3})


def test_push_to_hub_uploads_a_plain_model(model: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Trainer uploads its folder; the hub is a stand-in that loads what it is given."""
    uploaded: dict[str, Any] = {}

    class Hub:
        """What Trainer calls of the hub."""

        def create_repo(self, name: str, **_: Any) -> Any:
            """A repository of that name."""
            return dataclasses.make_dataclass("Repository", ["repo_id"])(name)

        def upload_folder(self, *, repo_id: str, folder_path: str, **_: Any) -> None:
            """Take the folder."""
            uploaded[repo_id] = AutoModelForCausalLM.from_pretrained(folder_path, dtype="auto").state_dict()

    monkeypatch.setattr("transformers.trainer.hf_api", Hub)
    optimizer = fuyou.AdamW(model, max_grad_norm=0.5)
    changes = {"push_to_hub": True, "hub_model_id": "me/tiny", "max_steps": 1, "eval_strategy": "no"}
    made = trainer(model, tmp_path / "out", optimizer, [fuyou.FuyouCallback()], **changes)
    made.train()
    made.push_to_hub()
    model.save_pretrained(tmp_path / "end")
    expected = AutoModelForCausalLM.from_pretrained(tmp_path / "end", dtype="auto").state_dict()
    assert all(torch.equal(uploaded["me/tiny"][name], expected[name]) for name in expected)
