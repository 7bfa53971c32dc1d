"""Every recipe that we ship is accepted, has its row in recipes/README.md, and the smoke recipe learns."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from fuyou.cli import main
from fuyou.recipe import dump_recipe, load_recipe

FOLDER = Path(__file__).resolve().parent.parent / "recipes"
RECIPES = sorted(FOLDER.glob("*.yaml"))


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
