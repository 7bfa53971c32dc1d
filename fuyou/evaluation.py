"""`fuyou evaluate`: perplexity and completion loss of rows, all micro-batches of a pass block by block together."""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Callable, Mapping
from typing import Any

import pydantic
import torch

from fuyou.config import OffloadConfig, counted, parse_bytes
from fuyou.data import IGNORED_LABEL, TokenRows, collate, load_data
from fuyou.errors import ConfigError, DataError
from fuyou.hardware import available_host_bytes
from fuyou.inference import Source
from fuyou.recipe import DataSection, load_recipe
from fuyou.recipe_text import apply_override, explain
from fuyou.tokenizing import Tokenizer

MEMORY_SHARE = 4
"""A quarter of the budget is for rows under way, half of that for what waits between blocks."""


@dataclasses.dataclass(frozen=True)
class Evaluation:
    """What was found."""

    loss: float
    """Mean over all tokens but each row's first, which nothing comes before."""
    perplexity: float
    """exp(loss)."""
    completion_loss: float
    """Mean over the tokens that training would learn: the answers, where prompts are masked."""
    completion_perplexity: float
    num_rows: int
    num_tokens: int
    """That count in `loss`."""
    num_completion_tokens: int
    num_passes: int
    """Over the weights."""
    seconds: float
    bytes_read: int

    def to_json(self) -> dict[str, Any]:
        """All fields."""
        return dataclasses.asdict(self)

    def describe(self) -> str:
        """For people."""
        return (
            f"completion loss {self.completion_loss:.4f} (perplexity {self.completion_perplexity:.4g}) over "
            f"{counted(self.num_completion_tokens, 'token')}\n"
            f"loss of all tokens {self.loss:.4f} (perplexity {self.perplexity:.4g}) over {self.num_tokens} tokens of "
            f"{counted(self.num_rows, 'row')}"
        )


class _DataOnly(pydantic.BaseModel):
    """A recipe with nothing but its data."""

    data: DataSection


def data_section(name: str, overrides: list[str]) -> tuple[DataSection, int]:
    """What `--data` and `--set` mean, as a recipe's data section, and the seed by which rows are held out.

    `name` is a recipe (.yaml, .yml), a data file, or a data set on the hub. ConfigError.
    """
    if name.endswith((".yaml", ".yml")):
        recipe = load_recipe(name, [f"data.{override}" for override in overrides])
        return recipe.data, recipe.shuffle_seed
    is_file = name.rpartition(".")[2] in ("jsonl", "json", "csv", "parquet", "txt")
    values: dict[str, Any] = {"data": {"file" if is_file else "hub": name}}
    for override in overrides:
        apply_override(values, f"data.{override}")
    try:
        return _DataOnly.model_validate(values).data, 0
    except pydantic.ValidationError as error:
        raise ConfigError("; ".join(explain(error, _DataOnly))) from None


def rows_to_evaluate(
    section: DataSection, seed: int, source: Source, tokenizer: Tokenizer, say: Callable[[str], None]
) -> TokenRows:
    """The rows that the section holds out, or all of them where it holds out none; DataError, ConfigError."""
    vocabulary_size = getattr(source.config.get_text_config(), "vocab_size", None)
    section = section.model_copy(update={"streaming": False})  # what is evaluated is known as a whole
    data = load_data(section, tokenizer, seed=seed, vocab_size=vocabulary_size)
    for note in data.notes:
        say(note)
    return data.train if data.evaluation is None else data.evaluation


@dataclasses.dataclass(frozen=True)
class EvaluationPlan:
    """How many rows are under way at a time."""

    micro_batch_size: int
    """Rows that run through a block at once."""
    rows_per_pass: int
    """Rows for which each weight is read once."""
    weights_host_bytes: int
    """Of the host's budget, for weights."""


def plan_evaluation(
    rows: TokenRows, source: Source, offload: OffloadConfig, *, micro_batch_size: int | None
) -> EvaluationPlan:
    """As many rows at a time as their share of memory holds; always one."""
    from fuyou.planning import HOST_MEMORY_SHARE, choose_device, gpu_memory_bytes

    device = choose_device(offload)
    text = source.config.get_text_config()
    itemsize = 2 if source.compute_dtype == "bfloat16" else 4
    longest = max(len(rows.row(index)[0]) for index in range(len(rows)))
    inner = getattr(text, "intermediate_size", None) or 4 * text.hidden_size
    # Of one row: its logits, and the outputs of a layer's products; what waits between blocks.
    computing = longest * itemsize * (text.vocab_size + 4 * text.hidden_size + 3 * inner)
    waiting = 2 * longest * itemsize * text.hidden_size
    one_rows_logits = 3 * longest * text.vocab_size * 4
    host_bytes = (
        int(available_host_bytes() * HOST_MEMORY_SHARE)
        if offload.host_memory is None
        else parse_bytes(offload.host_memory, "host_memory")
    )
    device_bytes = gpu_memory_bytes(offload, device) if device != "cpu" else host_bytes
    share = (device_bytes or host_bytes) // MEMORY_SHARE // 2
    at_once = micro_batch_size or max(1, (share - one_rows_logits) // computing)
    at_once = min(at_once, len(rows))
    per_pass = min(len(rows), max(at_once, share // waiting // at_once * at_once))
    reserve = at_once * computing + one_rows_logits + per_pass * waiting if device == "cpu" else 0
    return EvaluationPlan(at_once, per_pass, host_bytes - reserve)


def evaluate_rows(
    model: Any,
    rows: TokenRows,
    pad_id: int,
    plan: EvaluationPlan,
    on_pass: Callable[[int], None] = lambda _done: None,
) -> Evaluation:
    """Losses of a streamed model in evaluation mode, without gradients; blocks.

    Each is computed in float32 from the logits, as transformers' causal loss is, and summed in float64. `on_pass` hears
    how many rows are through. DataError if no token counts.
    """
    runtime = model.fuyou
    started, read_before = time.perf_counter(), runtime.bytes_moved[0]
    totals = torch.zeros(2, dtype=torch.float64)
    num_tokens = num_learned = num_passes = 0
    for begin in range(0, len(rows), plan.rows_per_pass):
        end = min(len(rows), begin + plan.rows_per_pass)
        batches = [
            collate(rows, range(start, min(end, start + plan.micro_batch_size)), pad_id)
            for start in range(begin, end, plan.micro_batch_size)
        ]

        def sums(number: int, output: Any, *, batches: list[dict[str, torch.Tensor]] = batches) -> torch.Tensor:
            return _loss_sums(output.logits, batches[number])

        calls = [
            {"input_ids": b["input_ids"], "attention_mask": b["attention_mask"], "use_cache": False} for b in batches
        ]
        for found in runtime.infer_each(calls, sums):
            totals += found
        num_tokens += sum(int(batch["attention_mask"][:, 1:].sum()) for batch in batches)
        num_learned += sum(int((batch["labels"][:, 1:] != IGNORED_LABEL).sum()) for batch in batches)
        num_passes += 1
        on_pass(end)
    if not num_learned:
        raise DataError("the rows have no label tokens: there is nothing to evaluate")
    loss, completion_loss = float(totals[0]) / num_tokens, float(totals[1]) / num_learned
    return Evaluation(
        loss=loss,
        perplexity=_exp(loss),
        completion_loss=completion_loss,
        completion_perplexity=_exp(completion_loss),
        num_rows=len(rows),
        num_tokens=num_tokens,
        num_completion_tokens=num_learned,
        num_passes=num_passes,
        seconds=time.perf_counter() - started,
        bytes_read=runtime.bytes_moved[0] - read_before,
    )


def _loss_sums(logits: torch.Tensor, batch: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """float64[2] in host memory: the sums over all tokens and over the learned ones."""
    sums = torch.zeros(2, dtype=torch.float64)
    for row, ids, labels, mask in zip(
        logits, batch["input_ids"], batch["labels"], batch["attention_mask"], strict=True
    ):
        # One row's logits in float32 at a time.
        losses = torch.nn.functional.cross_entropy(row[:-1].float(), ids[1:].to(row.device), reduction="none").cpu()
        sums[0] += losses[mask[1:] == 1].double().sum()
        sums[1] += losses[labels[1:] != IGNORED_LABEL].double().sum()
    return sums


def _exp(loss: float) -> float:
    return math.exp(loss) if loss < 700 else math.inf
