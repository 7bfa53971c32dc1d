"""The training loop of `fuyou train`: a recipe's steps, their metrics, evaluation, stop, resume and export.

What step N does follows from the recipe and N alone (rows, learning rate, random numbers), so a run that was
killed and resumed takes the same steps as one that was not.
"""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import json
import math
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from fuyou.checkpointing import prune_checkpoints, step_name
from fuyou.config import check_place, counted, format_bytes
from fuyou.data import (
    BatchOrder,
    DataSet,
    TokenRows,
    collate,
    load_data,
    num_label_tokens,
    sample_lengths,
    shuffled,
)
from fuyou.errors import ConfigError, DataError
from fuyou.generation import Prompt, Sampling, answer_all, choose_chat
from fuyou.inference import keep_tokenizer
from fuyou.lora import add_adapters
from fuyou.metrics import MetricsFile
from fuyou.packing import Packs, check_texts_apart, collate_packs, pack_rows
from fuyou.plan import StepShape
from fuyou.progress import Reporter, RunStart, RunStatistics, RunSummary, StepReport
from fuyou.recipe import Recipe, dump_recipe
from fuyou.tokenizing import HuggingFaceTokenizer, load_tokenizer
from io_engine import Store

EXPORT_MARK = "fuyou-export.json"
"""File by which an exported folder is known as ours: it may be replaced by a newer export."""


class Interrupted(KeyboardInterrupt):
    """Ctrl-C or SIGTERM; says where the run stands."""


def model_config(recipe: Recipe) -> Any:
    """The transformers config of a recipe's model; a hub model is downloaded. ConfigError, ModelError."""
    import transformers

    from fuyou.building import read_config, resolve_checkpoint

    if recipe.model.config is not None:
        values = dict(recipe.model.config)
        model_type = values.pop("model_type")
        try:
            _check_sizes(values)
            return transformers.AutoConfig.for_model(model_type, **values)
        except ValueError as error:
            raise ConfigError(f"model.config={recipe.model.config!r}: {_first_sentence(error)}") from None
        except Exception as error:  # configs of many authors check their fields in many ways
            raise ConfigError(f"model.config: {type(error).__name__}: {_first_sentence(error)}") from None
    assert recipe.model.name_or_path is not None
    folder = resolve_checkpoint(recipe.model.name_or_path, recipe.model.revision)
    return read_config(folder)


_LARGEST_SIZE = 1 << 24
"""Of anything in a config that a recipe spells out; transformers makes tables of some of them in memory."""


def _check_sizes(values: Mapping[str, Any]) -> None:
    from fuyou.store_contents import MOST_LAYERS, check_layers

    check_layers(values, MOST_LAYERS)
    for name, value in values.items():
        if isinstance(value, Mapping):
            _check_sizes(value)
        elif isinstance(value, int) and abs(value) > _LARGEST_SIZE:
            raise ValueError(f"{name}={value} is larger than {_LARGEST_SIZE}, more than any model has")


def open_model(recipe: Recipe, *, resume: str | int | None = None) -> Any:
    """The recipe's model on its store, as `fuyou.from_pretrained` or `fuyou.from_config` give it; blocks.

    With its adapters around it where it has a `lora` section.
    """
    import fuyou

    offload = recipe.offload_config(resume=resume)
    options: dict[str, Any] = {
        "offload": offload,
        "seed": recipe.training.seed,
        "attn_implementation": recipe.model.attn_implementation,
        # No memory is asked for gradients and states of a base that adapters leave as it is.
        "trainable": recipe.trainable if recipe.lora is None else (),
    }
    if recipe.model.config is not None:
        model = fuyou.from_config(model_config(recipe), **options)
    else:
        assert recipe.model.name_or_path is not None
        model = fuyou.from_pretrained(recipe.model.name_or_path, revision=recipe.model.revision, **options)
    if recipe.lora is None:
        return model
    try:
        fields = recipe.lora.model_dump()
        return add_adapters(model, fields, seed=recipe.training.seed, base_name=recipe.model.name_or_path)
    except BaseException:
        model.fuyou.abandon()
        raise


NUM_SAMPLED_ROWS, NUM_SAMPLED_STEPS = 256, 64


def expected_shape(recipe: Recipe) -> tuple[StepShape, str]:
    """How much a step of the recipe computes, by some of its rows, and how that is known; reads the data's files.

    Data of the hub is not fetched for this: its rows then count with their longest.
    """
    length, source = float(recipe.data.max_length), f"data.max_length={recipe.data.max_length}"
    if recipe.data.packing:
        source += ", which packing fills"
    elif recipe.data.file is None:
        source += " (the data of the hub is not looked at)"
    else:
        lengths = sample_lengths(recipe.data, _tokenizer_of(recipe), NUM_SAMPLED_ROWS)
        chosen = shuffled(NUM_SAMPLED_STEPS * recipe.rows_per_step, recipe.shuffle_seed) % len(lengths)
        length = float(lengths[chosen].reshape(NUM_SAMPLED_STEPS, recipe.rows_per_step).max(axis=1).mean())
        source = f"{counted(len(lengths), 'row')} of the data"
    return _shape(recipe, length), source


def _shape(recipe: Recipe, length: float) -> StepShape:
    """Of steps whose longest row has so many tokens on the average, to which all are padded."""
    size = recipe.offload_config().micro_batch_size or recipe.rows_per_step
    num_micro_batches = -(-recipe.rows_per_step // size)
    return StepShape(round(recipe.rows_per_step * length), num_micro_batches, round(length))


def run_training(
    recipe: Recipe, reporter: Reporter, *, num_steps: int | None = None, resume: str | int | None = None
) -> RunSummary:
    """Train to the recipe's last step, or `num_steps` further, and leave a committed store; blocks.

    `resume` overrides the recipe's. Raises Interrupted where a KeyboardInterrupt arrived; FuyouError,
    StoreError, OSError. After any error the store stands at its last committed step.
    """
    offload = recipe.offload_config(resume=resume)
    output = Path(recipe.output.dir).expanduser()
    check_place("output.dir", recipe.output.dir, "rows", *([_export_name(recipe)] if recipe.output.export else ()))
    for directory in offload.store_directories:
        check_place("offload.store", directory)
    for directory in offload.base_directories:
        check_place("offload.base", directory)
    if recipe.output.export:
        _check_export_folder(output / _export_name(recipe))
    try:
        reporter.note("reading the rows")
        tokenizer, data = _load_data(recipe, reporter)
        _measure_once(offload, reporter)
        if not Store.exists(offload.store_directories):
            reporter.note(f"writing the model's weights to {offload.store_directories[0]}, once")
        model = open_model(recipe, resume=resume)
    except KeyboardInterrupt:
        raise Interrupted("no step was begun; run the same command again") from None
    try:
        with model.fuyou:
            keep_tokenizer(tokenizer, model.generation_config, offload.store_directories[0])
            return _Run(recipe, model, tokenizer, data, reporter).go(num_steps)
    except KeyboardInterrupt:
        step = model.fuyou.committed_step
        raise Interrupted(f"the store stands at step {step}: run the same command to resume there") from None


def _load_data(recipe: Recipe, reporter: Reporter) -> tuple[Any, DataSet]:
    config = model_config(recipe)
    tokenizer = _tokenizer_of(recipe)
    vocab_size = getattr(config.get_text_config(), "vocab_size", None)
    keep = Path(recipe.output.dir).expanduser() / "rows"
    data = load_data(recipe.data, tokenizer, seed=recipe.shuffle_seed, vocab_size=vocab_size, keep=keep)
    for note in data.notes:
        reporter.note(note)
    return tokenizer, data


def _tokenizer_of(recipe: Recipe) -> Any:
    name = recipe.data.tokenizer or recipe.model.name_or_path
    assert name is not None
    own = recipe.data.tokenizer is None
    return load_tokenizer(name, revision=recipe.model.revision if own else None)


def _measure_once(offload: Any, reporter: Reporter) -> None:
    """Measure this machine if that was not done, so that plans predict seconds; never a reason to fail."""
    from fuyou.hardware import cached_hardware
    from fuyou.measuring import measure_hardware
    from fuyou.planning import choose_device

    device, drives = choose_device(offload), offload.store_directories
    # What is wrong with the directory is said by what needs it: the store.
    with contextlib.suppress(OSError):
        if cached_hardware(drives, device, offload.compute_dtype) is None:
            reporter.note("measuring this machine and its drive once")
            measure_hardware(drives, device, offload.compute_dtype)


@dataclasses.dataclass(frozen=True)
class _Target:
    """Where an invocation begins and ends, in steps taken."""

    first_step: int
    stop_step: int
    max_steps: int


class _Run:
    """One invocation, from an open model to its end."""

    def __init__(self, recipe: Recipe, model: Any, tokenizer: Any, data: DataSet, reporter: Reporter) -> None:
        self._recipe, self._model, self._tokenizer, self._data = recipe, model, tokenizer, data
        self._reporter = reporter
        self._output = Path(recipe.output.dir).expanduser()
        self._samples = self._prompts()
        self._statistics = RunStatistics()
        self._packs = self._pack() if recipe.data.packing else None
        num_rows = len(data.train) if self._packs is None else len(self._packs)
        self._order = BatchOrder(num_rows, recipe.rows_per_step, recipe.shuffle_seed, recipe.data.shuffle)
        training = recipe.training
        # The recipe of a stream has max_steps.
        self._max_steps = training.max_steps or self._order.steps_for_epochs(training.num_train_epochs or 1.0)
        self._eval_before: float | None = None
        self._eval_after: float | None = None
        self._evaluated_step: int | None = None

    def _pack(self) -> Packs:
        rows, length = self._data.train, self._recipe.data.max_length
        packs = pack_rows(rows, length)
        share = len(rows.tokens) / (len(packs) * length)
        self._reporter.note(
            f"packing: {counted(len(rows), 'row')} in {len(packs)} of {length} tokens, {share:.0%} full"
        )
        return packs

    def _batch(self, step: int) -> dict[str, Any]:
        if self._data.stream is not None:
            rows, notes = self._data.stream.take(self._recipe.rows_per_step)
            for note in notes:
                self._reporter.note(note)
            return collate(rows, range(len(rows)), self._data.pad_id)
        indices = self._order.batch_for_step(step)
        if self._packs is None:
            return collate(self._data.train, indices, self._data.pad_id)
        return collate_packs(self._data.train, self._packs, indices, self._data.pad_id)

    def _expected_shape(self) -> StepShape:
        """What steps compute on the average, by those of the first epoch at most."""
        if self._data.stream is not None:
            return expected_shape(self._recipe)[0]
        rows = self._data.train
        lengths = np.diff(rows.starts)
        if self._packs is not None:
            lengths = np.add.reduceat(lengths[self._packs.members], self._packs.starts[:-1])
        num_steps = min(NUM_SAMPLED_STEPS, max(1, len(lengths) // self._recipe.rows_per_step))
        longest = [lengths[self._order.batch_for_step(step)].max() for step in range(num_steps)]
        return _shape(self._recipe, float(np.mean(longest)))

    def go(self, num_steps: int | None) -> RunSummary:
        """Train, evaluate, export."""
        import fuyou

        self._model.fuyou.expect(self._expected_shape())
        optimizer_section = self._recipe.optimizer
        self._optimizer = fuyou.AdamW(
            self._model,
            lr=optimizer_section.learning_rate,
            betas=(optimizer_section.adam_beta1, optimizer_section.adam_beta2),
            eps=optimizer_section.adam_epsilon,
            weight_decay=optimizer_section.weight_decay,
            max_grad_norm=self._recipe.max_grad_norm,
        )
        first = self._optimizer.step_count
        stop = self._max_steps if num_steps is None else min(self._max_steps, first + num_steps)
        target = _Target(first, max(first, stop), self._max_steps)
        self._check_continuity(target)
        self._check_space_of_checkpoints(target)
        self._write_recipe()
        self._reporter.start(
            RunStart(
                model=self._recipe.model.name_or_path or f"random {self._model.config.model_type}",
                resumed=self._model.fuyou.resumed,
                plan=self._model.fuyou.plan.describe(),
                step=target.first_step,
                stop_step=target.stop_step,
                max_steps=target.max_steps,
                save_steps=self._recipe.training.save_steps,
            )
        )
        exported_to: Path | None = None
        with MetricsFile(self._output / "metrics.jsonl", resumed_step=first) as metrics_file:
            if metrics_file.set_aside is not None:
                self._reporter.note(f"an earlier run's metrics are now {metrics_file.set_aside}")
            self._train(target, metrics_file)
            self._model.fuyou.flush()
            if target.stop_step >= target.max_steps:
                # After a resume at the very end this is what the killed run did not come to.
                if self._data.evaluation is not None and self._evaluated_step != target.stop_step:
                    self._eval_after = self._evaluate(target.stop_step)
                if self._recipe.output.export:
                    exported_to = self._export(target.stop_step)
        summary = self._statistics.summary(
            step=target.stop_step,
            max_steps=target.max_steps,
            eval_loss_before=self._eval_before,
            eval_loss_after=self._eval_after,
            bytes_moved=self._model.fuyou.bytes_moved,
            exported_to=exported_to,
            metrics_file=metrics_file.path,
            store=os.pathsep.join(str(d) for d in self._recipe.offload_config().store_directories),
        )
        self._reporter.end(summary)
        return summary

    def _check_continuity(self, target: _Target) -> None:
        """Say so where a resumed run goes on with other rows than it began with."""
        self._identity = {
            "data": (self._data.stream or self._data.train).fingerprint(),
            "rows_per_step": self._recipe.rows_per_step,
            "shuffle": [self._recipe.data.shuffle, self._recipe.shuffle_seed],
            "packing": self._recipe.data.packing,
        }
        extra = self._optimizer.extra
        self._eval_before = extra.get("eval_loss_before")
        changed = [name for name, value in self._identity.items() if extra.get(name, value) != value]
        if self._data.stream is not None and "stream" in extra and "data" not in changed:
            self._data.stream.seek(extra["stream"])
        if target.first_step and changed:
            self._reporter.note(
                f"note: {', '.join(changed)} differ from the steps before {target.first_step}; this run is "
                "no repeat "
                "of one that was never stopped"
            )
        if target.first_step > target.max_steps:
            raise ConfigError(
                f"the store stands at step {target.first_step}, beyond this recipe's last step "
                f"{target.max_steps}: raise "
                "training.max_steps or name another store"
            )

    def _check_space_of_checkpoints(self, target: _Target) -> None:
        """Say what the checkpoints to come will take; OSError if that is more than there is."""
        every, limit = self._recipe.training.save_steps, self._recipe.training.save_total_limit
        if every is None:
            return
        store = self._model.fuyou.store
        num_to_come = target.stop_step // every - target.first_step // every
        # A new one is whole before the oldest goes.
        num_at_once = num_to_come if limit is None else min(num_to_come, limit + 1)
        needed_bytes, free_bytes = num_at_once * store.checkpoint_bytes, store.free_bytes()
        cost = (
            f"{counted(num_to_come, 'checkpoint')} to come, {format_bytes(store.checkpoint_bytes)} each, need "
            f"{format_bytes(needed_bytes)} at once; {format_bytes(free_bytes)} are free"
        )
        if needed_bytes > free_bytes:
            text = f"{os.strerror(errno.ENOSPC)} ({cost}: raise training.save_steps or set training.save_total_limit)"
            raise OSError(errno.ENOSPC, text, store.directories[0])
        if num_to_come:
            self._reporter.note(cost)

    def _keep_checkpoint(self, step: int) -> None:
        training = self._recipe.training
        if training.save_steps is None or step % training.save_steps:
            return
        self._model.fuyou.flush()
        store = self._model.fuyou.store
        store.checkpoint(step_name(step))
        if training.save_total_limit is not None:
            prune_checkpoints(store, training.save_total_limit)

    def _write_recipe(self) -> None:
        self._output.mkdir(parents=True, exist_ok=True)
        (self._output / "recipe.yaml").write_text(dump_recipe(self._recipe), encoding="utf-8")

    def _train(self, target: _Target, metrics_file: MetricsFile) -> None:
        training = self._recipe.training
        scheduler = make_scheduler(self._recipe, self._optimizer, target.max_steps, target.first_step)
        if training.eval_on_start and target.first_step == 0 and target.stop_step:
            if self._data.evaluation is not None:
                self._eval_before = self._evaluate(0)
            self._sample(0)
        if self._packs is not None and target.first_step < target.stop_step:
            check_texts_apart(self._model, self._data.train, self._packs, self._data.pad_id)
        self._model.train()
        for step in range(target.first_step, target.stop_step):
            self._model(**self._batch(step)).loss.backward()
            position = {} if self._data.stream is None else {"stream": self._data.stream.position}
            self._optimizer.commit_extra({**self._identity, **position, "eval_loss_before": self._eval_before})
            self._optimizer.step()
            scheduler.step()
            self._optimizer.zero_grad()
            metrics = self._model.fuyou.step_metrics()
            self._statistics.add(metrics)
            for warning in metrics.get("warnings", ()):
                self._reporter.note(f"step {step + 1}: {warning}")
            try:
                if self._is_evaluated(step + 1, target):
                    if self._data.evaluation is not None:
                        metrics["eval_loss"] = self._eval_after = self._evaluate(step + 1)
                    if self._samples:
                        metrics["samples"] = self._sample(step + 1)
                    self._model.train()
            finally:  # the step was taken, even if its evaluation is interrupted
                metrics_file.write(metrics)
            self._keep_checkpoint(step + 1)
            remaining = self._statistics.remaining_seconds(target.max_steps - step - 1)
            self._reporter.step(StepReport(step + 1, target.max_steps, metrics, remaining))

    def _is_evaluated(self, step: int, target: _Target) -> bool:
        if self._data.evaluation is None and not self._samples:
            return False
        every = self._recipe.training.eval_steps
        return step == target.max_steps or (every is not None and step % every == 0)

    def _prompts(self) -> list[tuple[Prompt, list[int]]]:
        """What is sampled, with its tokens; ConfigError for what is longer than the model's positions."""
        training, prompts = (
            self._recipe.training,
            [Prompt({"prompt": text}) for text in self._recipe.training.sample_prompts],
        )
        chat = choose_chat(self._recipe.data.chat_template, prompts, self._tokenizer)
        found = [(prompt, prompt.tokenise(self._tokenizer, chat=chat)) for prompt in prompts]
        most = getattr(self._model.config.get_text_config(), "max_position_embeddings", None)
        longest = max((len(ids) for _, ids in found), default=0) + training.sample_max_new_tokens
        if found and most is not None and longest > most:
            raise ConfigError(
                f"training.sample_max_new_tokens={training.sample_max_new_tokens}: with the longest of sample_prompts that makes "
                f"{longest} tokens, and this model has positions for {most}: lower it"
            )
        return found

    def _sample(self, step: int) -> list[dict[str, str]]:
        """Answer the recipe's prompts, all at once; leaves the model in evaluation mode and draws no random number."""
        if not self._samples:
            return []
        self._model.eval()
        answers = answer_all(
            self._model,
            self._tokenizer,
            [prompt for prompt, _ in self._samples],
            [ids for _, ids in self._samples],
            Sampling(self._recipe.training.sample_max_new_tokens),
            batch_size=len(self._samples),
        )
        samples = [{"prompt": str(answer.prompt.row["prompt"]), "completion": answer.completion} for answer in answers]
        self._reporter.samples(step, samples)
        return samples

    def _evaluate(self, step: int) -> float:
        assert self._data.evaluation is not None
        training = self._recipe.training
        rows = training.per_device_eval_batch_size or training.per_device_train_batch_size
        loss = evaluate(self._model, self._data.evaluation, self._data.pad_id, rows)
        self._evaluated_step = step
        self._reporter.evaluation(step, loss)
        return loss

    def _export(self, step: int) -> Path:
        folder = self._output / _export_name(self._recipe)
        mark = folder / EXPORT_MARK
        identity = {"run": str(self._model.fuyou.store.uuid), "step": step}
        with contextlib.suppress(OSError, ValueError):
            if json.loads(mark.read_text(encoding="utf-8")) == identity:
                return folder
        self._reporter.note(f"writing the {folder.name} to {folder}")
        # Embeddings that are trained are in the adapter; without this peft would ask the hub about their size.
        options = {} if self._recipe.lora is None else {"save_embedding_layers": False}
        self._model.save_pretrained(str(folder), **options)
        if isinstance(self._tokenizer, HuggingFaceTokenizer):
            self._tokenizer.tokenizer.save_pretrained(str(folder))
        # Last: a folder with this mark is complete.
        mark.write_text(json.dumps(identity) + "\n", encoding="utf-8")
        return folder


def make_scheduler(recipe: Recipe, optimizer: Any, max_steps: int, step: int) -> Any:
    """The learning-rate schedule as it stands after `step` steps; the optimizer has the next step's rate."""
    import transformers

    for group in optimizer.param_groups:
        group["initial_lr"] = group["lr"] = recipe.optimizer.learning_rate
    training = recipe.training
    warmup_steps = training.warmup_steps or math.ceil(training.warmup_ratio * max_steps)
    scheduler = transformers.get_scheduler(
        training.lr_scheduler_type, optimizer, num_warmup_steps=warmup_steps, num_training_steps=max_steps
    )
    if step:
        # All of these schedules are functions of the step alone: there is nothing to replay.
        scheduler.last_epoch = step
        scheduler._step_count = step + 1
        for group, function in zip(optimizer.param_groups, scheduler.lr_lambdas, strict=True):
            group["lr"] = group["initial_lr"] * function(step)
        scheduler._last_lr = [group["lr"] for group in optimizer.param_groups]
    return scheduler


def evaluate(model: Any, rows: TokenRows, pad_id: int, rows_per_batch: int) -> float:
    """Mean loss over all label tokens of `rows`, without gradients; leaves the model in evaluation mode."""
    import torch

    model.eval()
    total, num_tokens = 0.0, 0
    with torch.no_grad():
        for batch in _batches(rows, pad_id, rows_per_batch):
            weight = num_label_tokens(batch["labels"])
            total += float(model(**batch).loss) * weight
            num_tokens += weight
    if not num_tokens:
        raise DataError("the held-out rows have no label tokens")
    return total / num_tokens


def _batches(rows: TokenRows, pad_id: int, rows_per_batch: int) -> Iterator[dict[str, Any]]:
    for begin in range(0, len(rows), rows_per_batch):
        yield collate(rows, range(begin, min(begin + rows_per_batch, len(rows))), pad_id)


def _export_name(recipe: Recipe) -> str:
    return "model" if recipe.lora is None else "adapter"


def _check_export_folder(folder: Path) -> None:
    """ConfigError, before anything is computed, if the export would overwrite what is not ours."""
    if folder.is_dir() and any(folder.iterdir()) and not (folder / EXPORT_MARK).is_file():
        raise ConfigError(
            f"output.dir: {folder} holds files that no run of fuyou exported; move them, name another "
            "output.dir or set "
            "output.export: false"
        )


def _first_sentence(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    text = lines[0] if lines else type(error).__name__
    return text if len(text) <= 300 else f"{text[:297]}..."
