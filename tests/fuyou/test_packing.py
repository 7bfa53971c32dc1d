"""Packing: every text once, none too long, and a packed row learns what its texts would have taught one by one."""

from __future__ import annotations

import json
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM, BloomConfig, MambaConfig

from fuyou.cli import main
from fuyou.data import IGNORED_LABEL, TokenRows, collate, num_label_tokens
from fuyou.errors import ConfigError
from fuyou.packing import Packs, check_texts_apart, collate_packs, pack_rows
from tests.fuyou.command_line import metrics, same_numbers, train, write_recipe
from tests.tiny_models import PAD_ID, TINY_MODEL_NAMES, VOCAB_SIZE, tiny_model

LENGTH = 24


def rows_of(lengths: list[int]) -> TokenRows:
    draw = np.random.default_rng(0)
    return TokenRows.from_rows(
        (draw.integers(3, VOCAB_SIZE, n).tolist(), [i % 5 != 2 for i in range(n)]) for n in lengths
    )


@given(st.lists(st.integers(1, LENGTH), min_size=1, max_size=60))
def test_every_row_is_in_one_pack_and_none_is_too_long(lengths: list[int]) -> None:
    packs = pack_rows(rows_of(lengths), LENGTH)
    assert sorted(packs.members.tolist()) == list(range(len(lengths)))
    filled = [sum(lengths[row] for row in packs.rows_of(i)) for i in range(len(packs))]
    assert max(filled) <= LENGTH
    assert min(filled) > 0
    # Any two together would be too long for one, or else the emptier one's texts had found room in the fuller.
    assert all(a + b > LENGTH for a, b in pairwise(sorted(filled)))


def test_texts_that_fit_together_exactly_leave_nothing_free() -> None:
    assert len(pack_rows(rows_of([20, 5, 19, 4, 24, 12, 12]), LENGTH)) == 4


def test_positions_begin_anew_and_no_text_predicts_the_next() -> None:
    rows = TokenRows.from_rows([([5, 6, 7], [True] * 3), ([8, 9], [False, True]), ([4], [True])])
    packs = Packs(np.array([0, 1, 2]), np.array([0, 2, 3]))
    batch = {name: tensor.tolist() for name, tensor in collate_packs(rows, packs, [0, 1], pad_id=1).items()}
    assert batch == {
        "input_ids": [[5, 6, 7, 8, 9], [4, 1, 1, 1, 1]],
        "position_ids": [[0, 1, 2, 0, 1], [0, 0, 1, 2, 3]],
        "labels": [[-100, 6, 7, -100, 9], [-100] * 5],
    }


@pytest.mark.parametrize("name", TINY_MODEL_NAMES)
def test_packed_texts_give_the_gradients_of_texts_alone(name: str) -> None:
    model = tiny_model(name)
    model.config.output_router_logits = False  # the balance of experts is that of a batch, not of its texts
    rows = rows_of([9, 11, 4, 17, 6, 12, 20])
    packs = pack_rows(rows, LENGTH)
    packed = collate_packs(rows, packs, range(len(packs)), PAD_ID)
    one_by_one = [collate(rows, [row], PAD_ID) for row in range(len(rows))]
    num_labels = sum(num_label_tokens(batch["labels"]) for batch in one_by_one)
    assert num_labels == int((packed["labels"] != IGNORED_LABEL).sum())
    try:
        check_texts_apart(model, rows, packs, PAD_ID)
        apart = True
    except ConfigError:
        apart = False
    losses = []
    for batches in ([packed], one_by_one):
        model.zero_grad()
        loss = sum(
            model(**batch, use_cache=False).loss * num_label_tokens(batch["labels"]) / num_labels for batch in batches
        )
        loss.backward()
        gradient = torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])
        losses.append((loss.detach(), gradient))
    (packed_loss, packed_gradient), (loss, gradient) = losses
    agree = torch.allclose(packed_loss, loss, rtol=1e-5) and torch.allclose(packed_gradient, gradient, atol=2e-6)
    # OPT's masks do not know of positions.
    assert agree == apart == (name != "opt")


@pytest.mark.parametrize(
    "config",
    [
        BloomConfig(vocab_size=VOCAB_SIZE, hidden_size=16, n_layer=2, n_head=2),
        MambaConfig(vocab_size=VOCAB_SIZE, hidden_size=16, num_hidden_layers=2, state_size=4),
    ],
    ids=["bloom", "mamba"],
)
@pytest.mark.filterwarnings("ignore")
def test_a_model_that_lets_texts_see_each_other_is_refused(config: Any) -> None:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config)
    rows = rows_of([9, 11])
    with pytest.raises(ConfigError, match="leave data.packing off"):
        check_texts_apart(model, rows, pack_rows(rows, LENGTH), PAD_ID)


def test_a_packed_run_goes_on_with_the_same_bits(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    whole, parted = tmp_path / "whole", tmp_path / "parted"
    for folder in (whole, parted):
        folder.mkdir()
        recipe = write_recipe(folder, data__packing=True, data__max_length=40, training__per_device_train_batch_size=1)
        assert train(recipe, *(("--steps", "2") if folder is parted else ())) == 0
    assert len(metrics(parted)) == 2
    assert train(parted / "recipe.yaml") == 0
    assert same_numbers(metrics(whole)) == same_numbers(metrics(parted))
    unpacked = write_recipe(whole, data__packing=False, training__per_device_train_batch_size=1)
    assert main(["train", str(unpacked), "--json"]) == 0
    notes = [e["text"] for e in map(json.loads, capsys.readouterr().out.splitlines()) if e["event"] == "note"]
    assert any("packing" in note and "differ" in note for note in notes)
