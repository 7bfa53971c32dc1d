"""`fuyou generate`: prompts in, answers out, in batches over the streamed weights, with the rate said before and after."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from fuyou.config import OffloadConfig, parse_bytes
from fuyou.decode_rates import DecodeRates
from fuyou.errors import ConfigError, DataError
from fuyou.generation_plan import Demand, GenerationPlan, Machine, cache_shape, make_generation_plan
from fuyou.inference import Source
from fuyou.tokenizing import Tokenizer, first_line

Say = Callable[[str], None]
"""Takes one line about what is going on."""


@dataclasses.dataclass(frozen=True)
class Prompt:
    """One text to be continued, or a conversation to be answered."""

    row: Mapping[str, Any]
    """As it was given: `prompt` or `messages`, and whatever else is there."""

    def tokenise(self, tokenizer: Tokenizer, *, chat: bool) -> list[int]:
        """Token ids, with the head of the answer's turn where there are turns; DataError if there are none."""
        messages = self.row.get("messages")
        if messages is None and chat:
            messages = [{"role": "user", "content": self.row["prompt"]}]
        if messages is None:
            ids = tokenizer.encode(self.row["prompt"], start_of_text=True)
        else:
            # The template writes the beginning of the text itself.
            ids = tokenizer.encode(tokenizer.chat(messages, answer_follows=True), start_of_text=False)
        if not ids:
            raise DataError(
                f"the prompt {self.row.get('prompt', messages)!r} has no tokens: there is nothing to continue"
            )
        return ids


@dataclasses.dataclass(frozen=True)
class Sampling:
    """How tokens are chosen; greedily unless one of the middle three is given."""

    max_new_tokens: int = 128
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        if self.max_new_tokens < 1:
            raise ConfigError(f"max_new_tokens={self.max_new_tokens}: expected at least 1")
        if self.temperature is not None and not 0 <= self.temperature < float("inf"):
            raise ConfigError(f"temperature={self.temperature}: expected 0 (greedy) or a number above it")
        if self.top_p is not None and not 0 < self.top_p <= 1:
            raise ConfigError(f"top_p={self.top_p}: expected a number above 0, up to 1")
        if self.top_k is not None and self.top_k < 1:
            raise ConfigError(f"top_k={self.top_k}: expected a whole number above 0")
        if self.temperature == 0 and (self.top_p is not None or self.top_k is not None):
            raise ConfigError("temperature=0 always takes the likeliest token: leave top_p and top_k out")

    @property
    def greedy(self) -> bool:
        """Whether the likeliest token is taken each time."""
        return not self.temperature and self.top_p is None and self.top_k is None

    def config(self, model: Any, tokenizer: Tokenizer) -> Any:
        """transformers' GenerationConfig: an answer ends at what ends one for the model or for the tokenizer."""
        from transformers import GenerationConfig

        ends = model.generation_config.eos_token_id
        ends = ends if isinstance(ends, list) else [ends]
        ends = [end for end in dict.fromkeys([*ends, tokenizer.eos_id]) if end is not None]
        chosen: dict[str, Any] = {"do_sample": False}
        if not self.greedy:
            # What is not given is off, whatever the model's own settings say: 0 candidates means all of them.
            chosen = {"do_sample": True, "temperature": self.temperature or 1.0}
            chosen |= {"top_p": 1.0 if self.top_p is None else self.top_p, "top_k": self.top_k or 0}
        return GenerationConfig(
            max_new_tokens=self.max_new_tokens, eos_token_id=ends or None, pad_token_id=tokenizer.pad_id, **chosen
        )


@dataclasses.dataclass(frozen=True)
class Answer:
    """What a model made of one prompt."""

    prompt: Prompt
    completion: str
    num_prompt_tokens: int
    num_tokens: int
    """New ones, without what ended it."""
    finish: str
    """"stop": the model ended it; "length": max_new_tokens did."""

    def to_json(self) -> dict[str, Any]:
        """The prompt's own row with what was added to it."""
        added = {name: value for name, value in dataclasses.asdict(self).items() if name != "prompt"}
        return {**self.prompt.row, **added}


# ------------------------------------------------------------------------------------------------------- prompts


def read_prompts(path: str) -> list[Prompt]:
    """Of a .txt file, a prompt each line that is not empty; of a .jsonl file, a row with `prompt` or `messages` each.

    ConfigError for other endings, DataError with the line for what is no prompt.
    """
    file = Path(path).expanduser()
    if file.suffix not in (".txt", ".jsonl"):
        raise ConfigError(f"--prompts {path}: name a .txt file (a prompt each line) or a .jsonl file (a row each line)")
    try:
        lines = file.read_text(encoding="utf-8").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else f"not UTF-8 text ({error})"
        raise DataError(f"--prompts {path} cannot be read: {reason}") from None
    found = [
        Prompt({"prompt": line.rstrip("\r")}) if file.suffix == ".txt" else _row(line, f"{path}, line {number}")
        for number, line in enumerate(lines, start=1)
        if line.strip()
    ]
    if not found:
        raise DataError(f"--prompts {path}: has no prompts")
    return found


def _row(line: str, where: str) -> Prompt:
    try:
        row = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise DataError(f"{where}: not JSON ({first_line(error)})") from None
    if not isinstance(row, dict):
        raise DataError(f"{where}: expected an object with prompt or messages, found {type(row).__name__}")
    if isinstance(row.get("messages"), list) and row["messages"]:
        if all(isinstance(m, dict) and isinstance(m.get("role"), str) and "content" in m for m in row["messages"]):
            return Prompt(row)
        raise DataError(f"{where}: messages must be objects with role and content")
    if not isinstance(row.get("prompt"), str):
        raise DataError(f"{where}: expected prompt (text) or messages (a list); found {', '.join(row) or 'nothing'}")
    return Prompt(row)


def choose_chat(wanted: bool | None, prompts: Sequence[Prompt], tokenizer: Tokenizer) -> bool:
    """Whether prompts become a user's turn: by default if the tokenizer has a chat template. ConfigError."""
    if not tokenizer.has_chat_template:
        if wanted:
            raise ConfigError(
                "--chat: this tokenizer has no chat template: leave it out, or name a --tokenizer with one"
            )
        if any("messages" in prompt.row for prompt in prompts):
            raise ConfigError(
                "prompts with messages need a chat template, and this tokenizer has none: use prompt instead"
            )
    return tokenizer.has_chat_template if wanted is None else wanted


# ------------------------------------------------------------------------------------------------------ planning


def plan_generation(
    source: Source, demand: Demand, offload: OffloadConfig, *, batch_size: int | None, say: Say
) -> GenerationPlan:
    """Decide before anything is loaded, by this machine's rates, which are measured once; blocks for seconds then.

    `offload` has the budgets, the device and where the weights are or will be. PlanError, ConfigError.
    """
    from fuyou.blocks import find_blocks, shape_model
    from fuyou.hardware import available_host_bytes, cached_hardware
    from fuyou.measuring import measure_hardware
    from fuyou.opening import model_of
    from fuyou.planning import HOST_MEMORY_SHARE, choose_device, gpu_memory_bytes, shard_layouts, shard_sizes
    from fuyou.store_contents import DTYPES

    device = choose_device(offload)
    text_config = source.config.get_text_config()
    limit = getattr(text_config, "max_position_embeddings", None)
    if limit is not None and demand.context > limit:
        raise ConfigError(
            f"a text of {demand.context} tokens (prompt {demand.prompt_tokens}, new {demand.new_tokens}) is longer than the "
            f"{limit} that this model has positions for: "
            + (
                f"set --max-new-tokens to {limit - demand.prompt_tokens} or less"
                if demand.prompt_tokens < limit
                else "shorten the prompt"
            )
        )
    dtype = DTYPES[source.compute_dtype]
    with model_of(source.config, dtype, make=shape_model) as model:
        blocks = find_blocks(model, source.blocks_path)
        layouts = shard_layouts(blocks, model, source.compute_dtype, "float32")
        vocabulary_size = model.get_input_embeddings().num_embeddings  # type: ignore[operator]
        matrices = _layer_matrices(model, blocks)
    cache = cache_shape(source.config, dtype.itemsize)
    hardware = cached_hardware(offload.store_directories, device, source.compute_dtype)
    if hardware is None:
        say("measuring this machine and its drive once")
        hardware = measure_hardware(offload.store_directories, device, source.compute_dtype)
    host_bytes = (
        int(available_host_bytes() * HOST_MEMORY_SHARE)
        if offload.host_memory is None
        else parse_bytes(offload.host_memory, "host_memory")
    )
    gpu_bytes = gpu_memory_bytes(offload, device)
    rates = DecodeRates(matrices, cache.heads, dtype, device, host_bytes if gpu_bytes is None else gpu_bytes)
    machine = Machine(
        hardware=hardware,
        host_memory_bytes=host_bytes,
        gpu_memory_bytes=gpu_bytes,
        weight_bytes_per_second=rates.weight_bytes_per_second,
        cache_seconds=rates.cache_seconds,
    )
    return make_generation_plan(
        shard_sizes(blocks, layouts, lambda _name: False),
        cache,
        demand,
        machine,
        vocabulary_size=vocabulary_size,
        compute_dtype=source.compute_dtype,
        batch_size=batch_size,
    )


def _layer_matrices(model: Any, blocks: Any) -> list[tuple[int, int]]:
    """Shapes (outputs, inputs) of what the first decoder layer multiplies with; of experts' one each."""
    shapes = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
    return [shapes[name][-2:] for name in blocks.layers[0].parameters if len(shapes[name]) >= 2]


# ---------------------------------------------------------------------------------------------------- generating


@dataclasses.dataclass
class GenerationStatistics:
    """What generating took, filled while it goes on."""

    num_texts: int = 0
    num_new_tokens: int = 0
    num_token_steps: int = 0
    """Passes over the weights."""
    seconds: float = 0.0
    prefill_seconds: float = 0.0
    """Of it, until each batch's first token."""
    bytes_read: int = 0

    def to_json(self) -> dict[str, Any]:
        """All fields and what follows from them."""
        steps = self.num_token_steps
        decoding = steps - (1 if steps else 0)
        return {
            **dataclasses.asdict(self),
            "tokens_per_second": self.num_new_tokens / self.seconds if self.seconds else None,
            "seconds_per_token_step": (self.seconds - self.prefill_seconds) / decoding if decoding else None,
            "bytes_read_per_token_step": self.bytes_read / steps if steps else None,
        }


def answer_all(
    model: Any,
    tokenizer: Tokenizer,
    prompts: Sequence[Prompt],
    ids: Sequence[Sequence[int]],
    sampling: Sampling,
    *,
    batch_size: int,
    statistics: GenerationStatistics | None = None,
    on_token: Callable[[int], None] = lambda _done: None,
    cache_in_host_memory: bool = False,
) -> Iterator[Answer]:
    """Answers in the order of the prompts, whose tokens are `ids`; each batch is generated when its first is asked for.

    `model` is in evaluation mode, any with a `generate` of transformers; torch's generators are seeded here, and what
    they were is restored after each batch. `on_token` hears how many new tokens each text of the batch has at most.
    `cache_in_host_memory` is for a device of its own. Blocks.
    """
    from transformers import StoppingCriteriaList

    config = sampling.config(model, tokenizer)
    if cache_in_host_memory:
        config.cache_implementation = "offloaded"
    random_state: Any = None
    for begin in range(0, len(prompts), batch_size):
        rows = ids[begin : begin + batch_size]
        length = max(map(len, rows))
        input_ids = torch.tensor([[tokenizer.pad_id] * (length - len(row)) + list(row) for row in rows])
        mask = torch.tensor([[0] * (length - len(row)) + [1] * len(row) for row in rows])
        started = time.perf_counter()
        seen: list[float] = []

        def hear(tokens: torch.Tensor, _scores: Any, *, seen: list[float] = seen, **_kwargs: Any) -> torch.Tensor:
            seen.append(time.perf_counter())
            on_token(len(seen))
            return torch.zeros(tokens.shape[0], dtype=torch.bool, device=tokens.device)

        with _generators(random_state, sampling.seed) as after, torch.no_grad():
            output = model.generate(
                input_ids=input_ids.to(model.device),
                attention_mask=mask.to(model.device),
                generation_config=config,
                stopping_criteria=StoppingCriteriaList([hear]),
            )
        random_state = after()
        answers = [
            _answer(prompt, row, generated[length:].tolist(), config.eos_token_id or [], tokenizer)
            for prompt, row, generated in zip(prompts[begin:], rows, output, strict=False)
        ]
        if statistics is not None:
            statistics.num_texts += len(rows)
            statistics.num_new_tokens += sum(answer.num_tokens for answer in answers)
            statistics.num_token_steps += len(seen)
            statistics.seconds += time.perf_counter() - started
            statistics.prefill_seconds += seen[0] - started
        yield from answers


@contextlib.contextmanager
def _generators(state: Any, seed: int) -> Iterator[Callable[[], Any]]:
    """torch's generators as an earlier batch left them, or seeded; the caller's come back at the end."""
    devices = list(range(torch.cuda.device_count())) if torch.cuda.is_available() else []

    def now() -> Any:
        return torch.get_rng_state(), [torch.cuda.get_rng_state(device) for device in devices]

    kept: list[Any] = []
    with torch.random.fork_rng(devices=devices):
        if state is None:
            torch.manual_seed(seed)
        else:
            torch.set_rng_state(state[0])
            for device, of_device in zip(devices, state[1], strict=True):
                torch.cuda.set_rng_state(of_device, device)
        yield lambda: kept[0]
        kept.append(now())


def _answer(
    prompt: Prompt, prompt_ids: Sequence[int], new_ids: list[int], ends: Sequence[int], tokenizer: Tokenizer
) -> Answer:
    end = next((place for place, token in enumerate(new_ids) if token in ends), None)
    kept = new_ids[:end]
    return Answer(prompt, tokenizer.decode(kept), len(prompt_ids), len(kept), "length" if end is None else "stop")


def default_offload(source: Source, **options: Any) -> OffloadConfig:
    """Budgets and device together with where the weights are, or, for a checkpoint, will be."""
    directories = source.directories or (source.folder.parent if source.folder is not None else Path(),)
    return OffloadConfig(store=directories, compute_dtype=source.compute_dtype, **options)  # type: ignore[arg-type]
