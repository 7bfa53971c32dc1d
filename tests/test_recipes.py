"""Every recipe that we ship is accepted, planned and has its row in recipes/README.md, and the smoke recipe learns."""

from __future__ import annotations

import dataclasses
import json
import re
from pathlib import Path

import pytest

from fuyou.cli import main
from fuyou.recipe import dump_recipe, load_recipe
from fuyou.shipped import hardware_names, load_hardware

FOLDER = Path(__file__).resolve().parent.parent / "recipes"
RECIPES = sorted(FOLDER.glob("*.yaml"))


FOR_CARDS = [recipe for recipe in RECIPES if re.search(r"-\d+gb$", recipe.stem)]
"""Recipes that say in their name how many GB of GPU memory they are made for."""
CONFIGS = json.loads((Path(__file__).parent / "hub_configs.json").read_text())
"""What the config.json of their models says of shapes, by name on the hub."""


def write_machine(folder: Path, num_gigabytes: int) -> str:
    """A profile of a machine with such a card."""
    card = dataclasses.replace(load_hardware("rtx4090"), gpu_memory_bytes=num_gigabytes * 10**9)
    (folder / "machine.json").write_text(json.dumps(card.to_json()))
    return str(folder / "machine.json")


@pytest.fixture(name="hub")
def _hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Configs of models without a hub."""

    def resolve(name: str, _revision: str | None = None) -> Path:
        folder = tmp_path / name.replace("/", "_")
        folder.mkdir(exist_ok=True)
        (folder / "config.json").write_text(json.dumps(CONFIGS[name]))
        return folder

    monkeypatch.setattr("fuyou.building.resolve_checkpoint", resolve)


SAMPLE = ("llama-8b-full-24gb", "mistral-7b-lora-16gb", "qwen3-30b-a3b-lora-24gb")
"""Planned in every run of the tests, the others in the slow tier."""


@pytest.mark.usefixtures("hub")
@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning")
@pytest.mark.parametrize(
    "path",
    [p if p.stem in SAMPLE else pytest.param(p, marks=pytest.mark.slow) for p in FOR_CARDS],
    ids=lambda path: path.stem,
)
def test_recipe_fits_the_card_in_its_name(path: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    size = int(path.stem.split("-")[-1].removesuffix("gb"))
    assert main(["plan", str(path), "--hardware", write_machine(tmp_path, size), "--json"]) == 0
    plan = json.loads(capsys.readouterr().out)
    assert plan["prediction"]["seconds"] > 0
    trained = sum(block["num_parameters"] for block in plan["blocks"] if block["trainable"])
    assert (trained == 0) == ("-lora-" in path.stem), "adapters train beside the blocks"


@pytest.mark.slow
@pytest.mark.usefixtures("hub")
@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning")
@pytest.mark.parametrize("machine", hardware_names())
@pytest.mark.parametrize("path", FOR_CARDS, ids=lambda path: path.stem)
def test_recipe_fits_or_not(path: Path, machine: str, capsys: pytest.CaptureFixture[str]) -> None:
    code = main(["plan", str(path), "--hardware", machine])
    written = capsys.readouterr()
    assert code in (0, 3)
    assert ("a step" in written.out) if code == 0 else ("short" in written.err)


def test_there_are_recipes() -> None:
    assert {recipe.stem for recipe in RECIPES} >= {"smoke_cpu", "smollm2-135m", "smollm2-135m-lora"}


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_recipe_is_valid_and_described(path: Path, tmp_path: Path) -> None:
    recipe = load_recipe(path)
    recipe.offload_config()
    again = tmp_path / "again.yaml"
    again.write_text(dump_recipe(recipe))
    assert load_recipe(again) == recipe
    assert f"[{path.name}]({path.name})" in (FOLDER / "README.md").read_text()
    for file in [recipe.data.file] if isinstance(recipe.data.file, str) else recipe.data.file or []:
        assert (FOLDER.parent / file).is_file(), "paths in recipes are relative to the top of the repository"


def test_the_smoke_recipe_learns(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import datasets
    import torch

    monkeypatch.chdir(FOLDER.parent)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "datasets"))
    num_threads = torch.get_num_threads()
    torch.set_num_threads(1)  # two only disturb each other at this size
    try:
        code = main([
            "train", str(FOLDER / "smoke_cpu.yaml"), "--json",
            "--set", f"offload.store={tmp_path / 'store'}", "--set", f"output.dir={tmp_path / 'out'}",
        ])  # fmt: skip
    finally:
        torch.set_num_threads(num_threads)
    assert code == 0
    end = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert end["finished"]
    assert end["eval_loss_after"] < 0.6 * end["eval_loss_before"]
