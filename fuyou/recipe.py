"""Recipes: what `fuyou train` and `fuyou plan` are asked to do, as YAML checked by frozen typed models.

Relative paths in a recipe are relative to the current directory. `--set section.key=value` overrides one
value.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import pydantic
import yaml

from fuyou.config import OffloadConfig
from fuyou.errors import ConfigError
from fuyou.recipe_text import apply_override, explain, parse_yaml, read_json

Positive = Annotated[int, pydantic.Field(gt=0)]
NotNegative = Annotated[int, pydantic.Field(ge=0)]
Text = Annotated[str, pydantic.Field(min_length=1)]


class _Section(pydantic.BaseModel):
    # strict: 1.0 is no whole number and "yes" is no truth value; a recipe means what it says.
    model_config = pydantic.ConfigDict(
        frozen=True, extra="forbid", strict=True, allow_inf_nan=False, use_attribute_docstrings=True
    )


class ModelSection(_Section):
    """Which model: pretrained (`name_or_path`), or random weights (`config`)."""

    name_or_path: Text | None = None
    """A folder with config.json and safetensors, or a name on the Hugging Face hub."""
    config: dict[str, Any] | None = None
    """Random weights from a config of transformers: `model_type` and any of its fields."""
    revision: Text | None = None
    """Branch, tag or commit on the hub."""
    attn_implementation: Text | None = None
    """"sdpa", "eager" or another that transformers knows. Left out: the model's own choice."""

    @pydantic.model_validator(mode="after")
    def _one_source(self) -> ModelSection:
        if (self.name_or_path is None) == (self.config is None):
            raise ValueError("give either name_or_path (pretrained weights) or config (random weights)")
        if self.config is not None and not isinstance(self.config.get("model_type"), str):
            raise ValueError("config.model_type is missing: name an architecture, such as model_type: llama")
        if self.config is not None and self.revision is not None:
            raise ValueError("revision belongs to name_or_path; config has none")
        return self


class DataSection(_Section):
    """Which rows, and what in them is learned."""

    file: Text | list[Text] | None = None
    """One or several local files."""
    hub: Text | None = None
    """A data set on the Hugging Face hub, or a local folder that `datasets.load_dataset` understands."""
    hub_config: Text | None = None
    """The configuration of a hub data set that has several."""
    format: Literal["jsonl", "json", "csv", "parquet", "text"] | None = None
    """Of `file`. Left out: told by the ending of the name."""
    split: Text = "train"
    """Split of a hub data set; slices such as "train[:1000]" are allowed."""
    messages_field: Text | None = None
    """Column with chat rows: a list of {role, content}. Left out: `messages`, if there is such a column."""
    prompt_field: Text | None = None
    """Column with the prompt. Left out: `prompt`."""
    completion_field: Text | None = None
    """Column with the completion. Left out: `completion`."""
    text_field: Text | None = None
    """Column with plain text. Left out: `text`."""
    chat_template: bool | None = None
    """Wrap prompt and completion in the tokenizer's chat template. Left out: if it has one."""
    completion_only_loss: bool | None = None
    """Learn only the answers. Left out: true for prompt and completion, false for chat rows and text."""
    tokenizer: Text | None = None
    """Folder or hub name of the tokenizer, or "bytes" for random weights. Left out: the model's own."""
    max_length: Annotated[int, pydantic.Field(ge=2)] = 1024
    """Rows are cut to this many tokens."""
    packing: bool = False
    """Lay several whole texts into a row of max_length tokens; none sees another. Models that cannot are refused."""
    streaming: bool = False
    """Read and tokenise rows as they are needed, for sets larger than memory (or, of the hub, than the drive)."""
    shuffle_window: Positive = 1024
    """With streaming: rows that follow each other and are drawn in a new order among themselves."""
    eval_file: Text | list[Text] | None = None
    """Rows to be evaluated, same columns as `file`."""
    eval_split: Text | None = None
    """Split of the hub data set to be evaluated."""
    eval_fraction: Annotated[float, pydantic.Field(gt=0, lt=1)] | None = None
    """Share of the rows that is held out and evaluated instead of learned."""
    shuffle: bool = True
    """Draw the rows in a new order every epoch; false: as they come."""
    shuffle_seed: NotNegative | None = None
    """Seed of that order and of what is held out. Left out: training.seed."""

    @pydantic.model_validator(mode="after")
    def _consistent(self) -> DataSection:
        if (self.file is None) == (self.hub is None):
            raise ValueError("give either file (local files) or hub (a data set on the hub)")
        if self.file == [] or self.eval_file == []:
            raise ValueError("an empty list of files: name at least one")
        if self.hub is None and (self.hub_config is not None or self.eval_split is not None):
            raise ValueError("hub_config and eval_split belong to hub; use eval_file with file")
        if sum(option is not None for option in (self.eval_file, self.eval_split, self.eval_fraction)) > 1:
            raise ValueError("give one of eval_file, eval_split and eval_fraction")
        pair = self.prompt_field is not None or self.completion_field is not None
        if (self.messages_field is not None) + pair + (self.text_field is not None) > 1:
            raise ValueError("give one of messages_field, prompt_field with completion_field, and text_field")
        if self.streaming and (self.packing or self.eval_fraction is not None):
            taken, instead = (
                ("packing", "leave it off") if self.packing else ("eval_fraction", "use eval_file or eval_split")
            )
            raise ValueError(
                f"{taken} needs all rows at once, and streaming: true reads them one after the other; {instead}"
            )
        if self.text_field is not None and self.completion_only_loss:
            raise ValueError("completion_only_loss: true needs answers; rows of plain text have none")
        return self


class OffloadSection(_Section):
    """Where weights and optimizer states live and how much memory may be used; as fuyou.OffloadConfig."""

    store: Text | list[Text]
    """Directory of the store, or one per drive. Made if missing."""
    base: Text | list[Text] | None = None
    """Directory of a base that several runs with `lora` share, or one per drive. Filled if missing. Left out: the store
    holds the weights."""
    device: Text | None = None
    """"cuda", "cuda:0" or "cpu". Left out: cuda if there is one."""
    gpu_memory: Text | int | None = None
    """Such as "22GiB". Left out: what is free, less a margin."""
    host_memory: Text | int | None = None
    """Such as "48GiB". Left out: what is free, less a margin."""
    compute_dtype: Text = "bfloat16"
    """"bfloat16" or "float32"."""
    moment_dtype: Text = "float32"
    """"float32"."""
    frozen_dtype: Text = "bfloat16"
    """"bfloat16", or "int8" or "nf4" for decoder layers that are not trained, as under lora."""
    micro_batch_size: int | None = None
    """Rows computed at once. Left out: training.per_device_train_batch_size."""
    loss_chunk_tokens: int | None = None
    """Tokens whose logits exist at once in training: less memory for long sequences. Left out: all of a micro-batch's."""
    durability: Text | None = None
    """"step" or "checkpoint". Left out: planned."""
    commit_every_steps: Positive | None = None
    """With "checkpoint", steps from commit to commit. Left out: 20."""
    resume: Text | int = "auto"
    """"auto", "never", "must" or the number of a step."""
    io: Text = "auto"
    """"auto" or "posix"."""
    plan: Text | dict[str, Any] | None = None
    """A plan to be followed, or the name of its JSON file (`fuyou plan RECIPE --json`). Left out: planned."""
    blocks: Text | None = None
    """Module path of the list of decoder layers, where it is not found by itself."""


class LoraSection(_Section):
    """Adapters instead of all weights; names as in peft.LoraConfig."""

    r: Positive = 8
    """Rank of the adapters."""
    lora_alpha: Positive = 8
    """Adapters count lora_alpha / r times (use_rslora: lora_alpha / sqrt(r))."""
    lora_dropout: Annotated[float, pydantic.Field(ge=0, lt=1)] = 0.0
    """Share of an adapter's inputs that is left out in training."""
    target_modules: Text | list[Text] = "all-linear"
    """Names of modules that get an adapter, one regular expression of them, or "all-linear"."""
    exclude_modules: Text | list[Text] | None = None
    """Names of modules that get none, or one regular expression of them."""
    target_parameters: list[Text] | None = None
    """Names of parameters that get one where no module is theirs alone, as of mixtures of experts."""
    modules_to_save: list[Text] | None = None
    """Names of modules that are trained as a whole, and saved with the adapter."""
    bias: Literal["none", "all", "lora_only"] = "none"
    """Biases that are trained."""
    lora_bias: bool = False
    """Adapters have biases of their own."""
    use_rslora: bool = False
    """Rank-stabilised scaling."""
    use_dora: bool = False
    """Magnitude and direction of weights are adapted apart (DoRA)."""
    init_lora_weights: bool | Literal["gaussian", "orthogonal"] = True
    """How adapters begin; true: as if they were not there."""
    fan_in_fan_out: bool = False
    """Weights are stored as (inputs, outputs), as in GPT-2."""
    layers_to_transform: NotNegative | list[NotNegative] | None = None
    """Numbers of the layers that get adapters."""
    layers_pattern: Text | list[Text] | None = None
    """Name of the list of layers that these numbers are of, where peft does not find it."""
    rank_pattern: dict[str, Positive] = {}
    """Other ranks, by name or regular expression of modules."""
    alpha_pattern: dict[str, Positive] = {}
    """Other lora_alpha, likewise."""


class OptimizerSection(_Section):
    """AdamW; names as in transformers.TrainingArguments."""

    learning_rate: Annotated[float, pydantic.Field(ge=0)] = 1e-5
    """Highest learning rate of the schedule."""
    adam_beta1: Annotated[float, pydantic.Field(ge=0, lt=1)] = 0.9
    """Decay of the first moment."""
    adam_beta2: Annotated[float, pydantic.Field(ge=0, lt=1)] = 0.999
    """Decay of the second moment."""
    adam_epsilon: Annotated[float, pydantic.Field(gt=0)] = 1e-8
    """Added to the denominator."""
    weight_decay: Annotated[float, pydantic.Field(ge=0)] = 0.01
    """Decoupled weight decay, on all trainable weights."""


Scheduler = Literal[
    "linear",
    "cosine",
    "cosine_with_restarts",
    "polynomial",
    "constant",
    "constant_with_warmup",
    "inverse_sqrt",
]


class TrainingSection(_Section):
    """How long and in which steps; names as in transformers.TrainingArguments."""

    max_steps: Positive | None = None
    """Optimizer steps of the whole run."""
    num_train_epochs: Annotated[float, pydantic.Field(gt=0)] | None = None
    """Passes over the rows, instead of max_steps."""
    per_device_train_batch_size: Positive = 1
    """Rows of a micro-batch."""
    gradient_accumulation_steps: Positive = 1
    """Micro-batches of a step."""
    per_device_eval_batch_size: Positive | None = None
    """Rows evaluated at once. Left out: per_device_train_batch_size."""
    max_grad_norm: Annotated[float, pydantic.Field(ge=0)] | None = 1.0
    """The gradient's global norm is clipped to this; 0 or null: not at all."""
    lr_scheduler_type: Scheduler = "linear"
    """Course of the learning rate."""
    warmup_steps: NotNegative = 0
    """Steps until the learning rate is reached."""
    warmup_ratio: Annotated[float, pydantic.Field(ge=0, lt=1)] = 0.0
    """The same as a share of all steps, instead of warmup_steps."""
    logging_steps: Positive = 1
    """Where the output is no terminal, a line is printed every so many steps."""
    eval_steps: Positive | None = None
    """Evaluate every so many steps. Left out: only at the end."""
    save_steps: Positive | None = None
    """Keep a checkpoint in the store every so many steps; `--resume STEP` goes back to one. Every step survives a crash
    without."""
    save_total_limit: Positive | None = None
    """Remove the oldest of these checkpoints beyond this number. Left out: keep all."""
    eval_on_start: bool = False
    """Evaluate before the first step, too."""
    sample_prompts: list[Text] = []
    """Answered wherever the model is evaluated (every eval_steps steps and at the end), always with the likeliest tokens:
    printed, and kept in metrics.jsonl as `samples`. Changes nothing in training."""
    sample_max_new_tokens: Positive = 48
    """Of each answer."""
    seed: NotNegative = 0
    """Of dropout, of random weights and, unless data.shuffle_seed is given, of the order of rows."""

    @pydantic.model_validator(mode="after")
    def _consistent(self) -> TrainingSection:
        if (self.max_steps is None) == (self.num_train_epochs is None):
            raise ValueError("give either max_steps or num_train_epochs")
        if self.warmup_steps and self.warmup_ratio:
            raise ValueError("give warmup_steps or warmup_ratio, not both")
        if self.save_total_limit is not None and self.save_steps is None:
            raise ValueError("save_total_limit is given but not save_steps: nothing would be saved")
        return self


class OutputSection(_Section):
    """What the run leaves behind, besides the store."""

    dir: Text
    """Folder of metrics.jsonl, recipe.yaml and the exported model."""
    export: bool = True
    """Write the trained model to dir/model at the end, as plain safetensors with its tokenizer; with lora, the adapter
    alone to dir/adapter, in peft's format."""


class Recipe(_Section):
    """One run."""

    model: ModelSection
    data: DataSection
    offload: OffloadSection
    trainable: Annotated[list[Text], pydantic.Field(min_length=1)] | None = None
    """Patterns (regular expressions of whole names) of parameters to train, or of modules to train all of. Left out:
    everything. What is frozen has no optimizer states, and the backward pass ends at the lowest block that is trained."""
    lora: LoraSection | None = None
    """Adapters instead of all weights; names as in peft.LoraConfig."""
    optimizer: OptimizerSection = OptimizerSection()
    training: TrainingSection
    output: OutputSection

    @pydantic.model_validator(mode="after")
    def _consistent(self) -> Recipe:
        if self.model.config is not None and self.data.tokenizer is None:
            raise ValueError(
                'data.tokenizer is missing: a model with random weights has none of its own; name a folder, or "bytes"'
            )
        if self.offload.base is not None and self.lora is None:
            raise ValueError("offload.base: nothing of a base is trained; add a lora section, or leave it out")
        if self.data.streaming and self.training.max_steps is None:
            raise ValueError("data.streaming: how many rows there are is not known; give training.max_steps")
        if self.lora is not None and self.trainable is not None:
            raise ValueError("give either trainable or lora; lora.modules_to_save trains whole modules beside adapters")
        if self.training.eval_steps is not None and not self.has_evaluation and not self.training.sample_prompts:
            raise ValueError(
                "training.eval_steps is given but nothing is held out or sampled: add data.eval_fraction, "
                "data.eval_file or "
                "data.eval_split"
            )
        return self

    @property
    def has_evaluation(self) -> bool:
        """Whether rows are held out."""
        data = self.data
        return data.eval_file is not None or data.eval_split is not None or data.eval_fraction is not None

    @property
    def rows_per_step(self) -> int:
        """Rows of one optimizer step."""
        return self.training.per_device_train_batch_size * self.training.gradient_accumulation_steps

    @property
    def shuffle_seed(self) -> int:
        """Seed of the order of rows."""
        return self.training.seed if self.data.shuffle_seed is None else self.data.shuffle_seed

    @property
    def max_grad_norm(self) -> float | None:
        """The limit of the gradient's norm; None: no clipping."""
        return self.training.max_grad_norm or None

    def offload_config(self, *, resume: str | int | None = None) -> OffloadConfig:
        """The `offload` section checked; ConfigError names the field. `resume` overrides the recipe's."""
        values = self.offload.model_dump()
        values["micro_batch_size"] = (
            self.training.per_device_train_batch_size
            if self.offload.micro_batch_size is None
            else self.offload.micro_batch_size
        )
        if resume is not None:
            values["resume"] = resume
        if isinstance(values["plan"], str):
            values["plan"] = read_json(values["plan"], "offload.plan")
        try:
            return OffloadConfig(**values)
        except ConfigError as error:
            # OffloadConfig's messages begin with the name of the field, so this is the dotted path.
            raise ConfigError(f"offload.{error}") from None


def load_recipe(path: str | os.PathLike[str], overrides: Sequence[str] = ()) -> Recipe:
    """Reads a recipe file, applies overrides ("section.key=value", the value as YAML) and checks it all.

    ConfigError lists every wrong key and value by its dotted path.
    """
    what = f"recipe {os.fspath(path)!r}"
    try:
        with Path(path).expanduser().open(encoding="utf-8") as file:
            text = file.read(_MOST_CHARACTERS + 1)
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else f"not UTF-8 text ({error})"
        raise ConfigError(f"{what} cannot be read: {reason}") from None
    if len(text) > _MOST_CHARACTERS:
        raise ConfigError(f"{what} has more than {_MOST_CHARACTERS} characters: that is no recipe")
    try:
        values = parse_yaml(text, what)
    except RecursionError:
        raise ConfigError(f"{what} is nested too deeply: a recipe has sections, and values in them") from None
    _check_size(values, what)
    if not isinstance(values, dict):
        found = "nothing" if values is None else type(values).__name__
        raise ConfigError(f"recipe {os.fspath(path)!r}: expected sections (model:, data:, ...), found {found}")
    for override in overrides:
        apply_override(values, override)
    return parse_recipe(values)


_MOST_CHARACTERS = 1 << 20
_MOST_VALUES = 100_000
_MOST_PROBLEMS = 20


def _check_size(values: Any, what: str) -> None:
    """ConfigError for a few lines of YAML whose aliases stand for more than any recipe has."""
    to_see, num_seen = [values], 0
    while to_see:
        value = to_see.pop()
        num_seen += 1
        if isinstance(value, dict | list):
            to_see += value.values() if isinstance(value, dict) else value
        if num_seen + len(to_see) > _MOST_VALUES:
            raise ConfigError(f"{what} stands for more than {_MOST_VALUES} values, aliases counted: that is no recipe")


def parse_recipe(values: Mapping[str, Any]) -> Recipe:
    """A recipe from plain dictionaries; ConfigError lists every wrong key and value by its dotted path."""
    try:
        return Recipe.model_validate(dict(values))
    except pydantic.ValidationError as error:
        problems = explain(error, Recipe)
    if len(problems) > _MOST_PROBLEMS:
        problems[_MOST_PROBLEMS:] = [f"and {len(problems) - _MOST_PROBLEMS} more"]
    raise ConfigError(problems[0] if len(problems) == 1 else "\n  ".join(["the recipe has errors:", *problems]))


def dump_recipe(recipe: Recipe) -> str:
    """The recipe as YAML, every default written out; `load_recipe` of it gives an equal recipe."""
    text: str = yaml.safe_dump(recipe.model_dump(), sort_keys=False, allow_unicode=True)
    return text
