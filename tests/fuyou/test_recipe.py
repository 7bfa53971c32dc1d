"""Recipes: what is accepted, and the message for everything that is not."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pydantic
import pytest

from fuyou.errors import ConfigError
from fuyou.recipe import Recipe, dump_recipe, load_recipe, parse_recipe
from fuyou.recipe_text import read_json

MINIMAL: dict[str, Any] = {
    "model": {"name_or_path": "some/model"},
    "data": {"file": "rows.jsonl"},
    "offload": {"store": "store"},
    "training": {"max_steps": 3},
    "output": {"dir": "out"},
}
RANDOM = {"model.name_or_path": None, "model.config": {"model_type": "llama"}, "data.tokenizer": "bytes"}


def recipe(**changes: Any) -> Recipe:
    """The minimal recipe with changes; keys are dotted paths with __ for the dot."""
    return with_changes({key.replace("__", "."): value for key, value in changes.items()})


def with_changes(changes: dict[str, Any]) -> Recipe:
    values = copy.deepcopy(MINIMAL)
    for path, value in changes.items():
        *sections, key = path.split(".")
        target = values
        for section in sections:
            target = target.setdefault(section, {})
        target[key] = value
    return parse_recipe(values)


def refusal(changes: dict[str, Any]) -> str:
    with pytest.raises(ConfigError) as caught:
        with_changes(changes)
    return str(caught.value)


def write(path: Path, text: str) -> Path:
    path.write_text(text, encoding="utf-8")
    return path


MINIMAL_TEXT = """
model: {name_or_path: some/model}
data: {file: rows.jsonl}
offload: {store: store}
training: {max_steps: 3}
output: {dir: out}
"""


def test_minimal_recipe_and_its_defaults() -> None:
    made = recipe()
    assert made.rows_per_step == 1
    assert made.max_grad_norm == 1.0
    assert made.shuffle_seed == made.training.seed == 0
    assert not made.has_evaluation
    assert made.data.completion_only_loss is None
    assert made.optimizer.learning_rate == 1e-5


def test_recipes_are_frozen() -> None:
    with pytest.raises(pydantic.ValidationError):
        recipe().training.max_steps = 5  # type: ignore[misc]


def test_derived_values() -> None:
    made = recipe(
        training__per_device_train_batch_size=3,
        training__gradient_accumulation_steps=4,
        training__max_grad_norm=0,
        training__seed=7,
        data__shuffle_seed=9,
        data__eval_fraction=0.5,
    )
    assert made.rows_per_step == 12
    assert made.max_grad_norm is None
    assert made.shuffle_seed == 9
    assert made.has_evaluation


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"offlod": {}}, "unknown key 'offlod' in recipe: did you mean 'offload'?"),
        ({"offload.strore": "x"}, "unknown key 'offload.strore' in recipe: did you mean 'store'?"),
        (
            {"training.learning_rate": 1.0},
            "unknown key 'training.learning_rate' in recipe: did you mean 'optimizer.learning_rate'?",
        ),
        ({"output.zzzz": 1}, "unknown key 'output.zzzz' in recipe: known here: dir, export"),
        (
            {"lora": {"lora_alfa": 8}},
            "unknown key 'lora.lora_alfa' in recipe: did you mean 'lora_alpha'?",
        ),
    ],
)
def test_unknown_keys_name_the_nearest_known_one(changes: dict[str, Any], expected: str) -> None:
    assert refusal(changes) == expected


@pytest.mark.parametrize(
    ("path", "value", "expected"),
    [
        ("training.max_steps", "3", "training.max_steps='3': expected a whole number"),
        ("training.max_steps", 3.0, "training.max_steps=3.0: expected a whole number"),
        ("training.max_steps", True, "training.max_steps=True: expected a whole number"),
        ("training.max_steps", 0, "training.max_steps=0: expected a number above 0"),
        ("training.max_grad_norm", -1.0, "training.max_grad_norm=-1.0: expected a number at least 0"),
        ("training.seed", -1, "training.seed=-1: expected a number at least 0"),
        ("optimizer.learning_rate", "high", "optimizer.learning_rate='high': expected a number"),
        ("optimizer.learning_rate", float("nan"), "optimizer.learning_rate=nan: expected a finite number"),
        ("optimizer.adam_beta1", 1.0, "optimizer.adam_beta1=1.0: expected a number below 1"),
        ("data.file", 3, "data.file=3: expected text or a list of texts"),
        ("data.file", ["a", 2], "data.file[1]=2: expected text"),
        ("data.shuffle", "yes", "data.shuffle='yes': expected true or false"),
        (
            "data.format",
            "xls",
            "data.format='xls': expected one of 'jsonl', 'json', 'csv', 'parquet' or 'text'",
        ),
        ("data.max_length", 1, "data.max_length=1: expected a number at least 2"),
        ("data", None, "data=None: expected a section of key: value lines"),
        ("model.name_or_path", "", "model.name_or_path='': expected text that is not empty"),
        ("offload.gpu_memory", 1.5, "offload.gpu_memory=1.5: expected text or a whole number"),
    ],
)
def test_wrong_types_name_path_value_and_what_is_expected(path: str, value: Any, expected: str) -> None:
    assert refusal({path: value}).removesuffix(".0") == expected


@pytest.mark.parametrize(
    ("changes", "part"),
    [
        ({"model.name_or_path": None}, "model: give either name_or_path"),
        ({"model.config": {"model_type": "llama"}}, "model: give either name_or_path"),
        ({**RANDOM, "model.config": {}}, "config.model_type is missing"),
        ({**RANDOM, "model.revision": "main"}, "revision belongs to name_or_path"),
        ({**RANDOM, "data.tokenizer": None}, "data.tokenizer is missing"),
        ({"data.hub": "x"}, "give either file (local files) or hub"),
        ({"data.file": None}, "give either file (local files) or hub"),
        ({"data.file": []}, "an empty list of files"),
        ({"data.eval_split": "test"}, "belong to hub"),
        ({"data.eval_file": "a", "data.eval_fraction": 0.1}, "give one of eval_file"),
        ({"data.text_field": "a", "data.messages_field": "b"}, "give one of messages_field"),
        ({"data.text_field": "a", "data.completion_only_loss": True}, "rows of plain text have none"),
        ({"training.num_train_epochs": 1.0}, "give either max_steps or num_train_epochs"),
        ({"training.max_steps": None}, "give either max_steps or num_train_epochs"),
        ({"training.warmup_steps": 1, "training.warmup_ratio": 0.1}, "not both"),
        ({"training.eval_steps": 1}, "nothing is held out or sampled"),
    ],
)
def test_combinations_that_contradict(changes: dict[str, Any], part: str) -> None:
    assert part in refusal(changes)


def test_a_missing_section_and_field_say_what_they_are_for() -> None:
    values = {key: value for key, value in MINIMAL.items() if key != "output"}
    with pytest.raises(ConfigError, match=r"^output is missing: What the run leaves behind"):
        parse_recipe(values)
    with pytest.raises(ConfigError, match=r"^offload.store is missing: Directory of the store"):
        parse_recipe({**MINIMAL, "offload": {}})


def test_several_errors_are_told_together() -> None:
    message = refusal({"training.seed": -1, "offload.strore": 1})
    assert "unknown key 'offload.strore'" in message
    assert "training.seed=-1" in message


def test_offload_becomes_an_offload_config() -> None:
    made = recipe(offload__gpu_memory="22GiB", training__per_device_train_batch_size=4)
    config = made.offload_config()
    assert (config.store, config.gpu_memory, config.micro_batch_size, config.resume) == (
        "store",
        "22GiB",
        4,
        "auto",
    )
    assert recipe(offload__micro_batch_size=2).offload_config(resume=5).resume == 5
    assert recipe(offload__micro_batch_size=2).offload_config().micro_batch_size == 2


@pytest.mark.parametrize(
    ("path", "value", "part"),
    [
        ("offload.gpu_memory", "lots", "offload.gpu_memory='lots'"),
        ("offload.compute_dtype", "float16", "offload.compute_dtype='float16'"),
        ("offload.moment_dtype", "int4", "offload.moment_dtype='int4': choose one of"),
        ("offload.resume", "perhaps", "offload.resume='perhaps'"),
        ("offload.micro_batch_size", 0, "offload.micro_batch_size=0"),
        ("offload.plan", "nowhere.json", "offload.plan='nowhere.json': cannot be read"),
    ],
)
def test_values_that_offload_config_refuses_have_their_path(path: str, value: Any, part: str) -> None:
    with pytest.raises(ConfigError) as caught:
        with_changes({path: value}).offload_config()
    assert str(caught.value).startswith(part)


def test_a_plan_is_read_from_its_file(tmp_path: Path) -> None:
    file = write(tmp_path / "plan.json", '{"device": "cpu"}')
    assert recipe(offload__plan=str(file)).offload_config().plan == {"device": "cpu"}
    with pytest.raises(ConfigError, match="expected a JSON object, found list"):
        read_json(write(tmp_path / "list.json", "[]"), "offload.plan")


def test_files_overrides_and_round_trip(tmp_path: Path) -> None:
    file = write(tmp_path / "recipe.yaml", MINIMAL_TEXT)
    made = load_recipe(
        file,
        [
            "optimizer.learning_rate=3e-5",
            "training.max_steps=7",
            "offload.store=[/a, /b]",
            "data.packing=off",
        ],
    )
    assert made.optimizer.learning_rate == 3e-5
    assert made.training.max_steps == 7
    assert made.offload.store == ["/a", "/b"]
    assert load_recipe(write(tmp_path / "again.yaml", dump_recipe(made))) == made


def test_numbers_as_people_write_them(tmp_path: Path) -> None:
    text = MINIMAL_TEXT + "optimizer: {learning_rate: 1e-5, adam_epsilon: 1.0E-08, weight_decay: 0}\n"
    made = load_recipe(write(tmp_path / "recipe.yaml", text))
    assert (made.optimizer.learning_rate, made.optimizer.adam_epsilon) == (1e-5, 1e-8)


@pytest.mark.parametrize(
    ("text", "part"),
    [
        ("model: {a: 1", "is not valid YAML at line"),
        (
            "model:\n\tname_or_path: x\n",
            "at line 2, column 1: found character '\\t' that cannot start any token; indent with spaces",
        ),
        ("model: 1\nmodel: 2\n", "the key 'model' is given twice"),
        ("- a\n- b\n", "expected sections (model:, data:, ...), found list"),
        ("", "expected sections (model:, data:, ...), found nothing"),
        ("a: !!python/object:os.system x\n", "is not valid YAML"),
        ("? [a]\n: b\n", "a key must be plain text"),
    ],
)
def test_files_that_are_no_recipes(tmp_path: Path, text: str, part: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load_recipe(write(tmp_path / "recipe.yaml", text))
    assert part in str(caught.value)


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot be read: No such file"):
        load_recipe(tmp_path / "missing.yaml")
    (tmp_path / "binary.yaml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ConfigError, match="not UTF-8"):
        load_recipe(tmp_path / "binary.yaml")


@pytest.mark.parametrize("override", ["training.max_steps", "=3", "training.=3", ".max_steps=3"])
def test_overrides_without_a_path_or_value(tmp_path: Path, override: str) -> None:
    with pytest.raises(ConfigError, match=r"expected section\.key=value"):
        load_recipe(write(tmp_path / "recipe.yaml", MINIMAL_TEXT), [override])


def test_overrides_below_a_value_and_with_bad_yaml(tmp_path: Path) -> None:
    file = write(tmp_path / "recipe.yaml", MINIMAL_TEXT)
    with pytest.raises(ConfigError, match=r"training\.max_steps is no section but 3"):
        load_recipe(file, ["training.max_steps.x=3"])
    with pytest.raises(ConfigError, match=r"--set data\.file=\[ is not valid YAML"):
        load_recipe(file, ["data.file=["])
    with pytest.raises(ConfigError, match="did you mean 'max_steps'"):
        load_recipe(file, ["training.max_step=3"])
