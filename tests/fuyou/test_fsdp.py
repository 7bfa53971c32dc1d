"""A run moves to FSDP2: its distributed checkpoint, loaded into a sharded model, takes the next step as we do."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import fuyou
from fuyou.master_export import export_distributed
from tests.tiny_models import tiny_batches, tiny_model_config

HYPERPARAMETERS = {"lr": 3e-3, "weight_decay": 0.1}
NUM_RANKS = 2

RANK = """
import json, os, sys
from pathlib import Path
import torch, torch.distributed as dist, torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from transformers import AutoConfig, AutoModelForCausalLM
from tests.fuyou.test_fsdp import HYPERPARAMETERS, third_batch

torch.set_num_threads(1)
folder, rank = Path(sys.argv[1]), int(sys.argv[2])
dist.init_process_group("gloo", init_method=f"file://{folder / 'meeting'}", rank=rank, world_size=int(sys.argv[3]))
mesh = init_device_mesh("cpu", (dist.get_world_size(),))
torch.manual_seed(9)
model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder / "out"), dtype=torch.float32).train()
for layer in model.model.layers:
    fully_shard(layer, mesh=mesh)
fully_shard(model, mesh=mesh)
optimizer = torch.optim.AdamW(model.parameters(), **HYPERPARAMETERS)
weights, states = get_state_dict(model, optimizer)
dcp.load({"model": weights, "optim": {"state": states["state"]}}, checkpoint_id=str(folder / "out"))
set_state_dict(model, optimizer, model_state_dict=weights, optim_state_dict=states)
losses = []
for _ in range(2):  # the second one sees what Adam made of the moments
    loss = model(**third_batch()).loss
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    losses.append(loss.item())
if rank == 0:
    sharded = all(type(p).__name__ == "DTensor" and p.to_local().numel() < p.numel() for p in model.parameters())
    (folder / "found.json").write_text(json.dumps({"losses": losses, "sharded": sharded}))
dist.destroy_process_group()
"""


def third_batch() -> dict[str, torch.Tensor]:
    return [step[0] for step in tiny_batches(tiny_model_config("llama"), 3, 1, batch_size=2, seed=4)][2]


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.skipif(not torch.distributed.is_gloo_available(), reason="needs torch's gloo backend")
def test_the_next_step_of_a_sharded_model_is_ours(tmp_path: Path) -> None:
    """Two processes; no dropout, since each rank would draw its own."""
    config = tiny_model_config("llama")
    config.attention_dropout = 0.0
    offload = fuyou.OffloadConfig(store=tmp_path / "store", device="cpu", host_memory="64MiB", compute_dtype="float32")
    todo = [step[0] for step in tiny_batches(config, 3, 1, batch_size=2, seed=4)]

    def steps(batches: list[dict[str, torch.Tensor]]) -> list[float]:
        model: Any = fuyou.from_config(config, offload=offload, seed=3)
        losses = []
        with model.fuyou:
            optimizer = fuyou.AdamW(model, **HYPERPARAMETERS)
            for batch in batches:
                loss = model(**batch).loss
                loss.backward()
                optimizer.step()
                optimizer.zero_grad()
                losses.append(loss.item())
        return losses

    steps(todo[:2])
    assert export_distributed(tmp_path / "store", tmp_path / "out") == 2
    ranks = [
        subprocess.Popen(
            [sys.executable, "-W", "ignore", "-c", RANK, str(tmp_path), str(rank), str(NUM_RANKS)],
            cwd=Path(__file__).parents[2],
            env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)},
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(NUM_RANKS)
    ]
    try:
        errors = [rank.communicate(timeout=240)[1] for rank in ranks]
    finally:
        for rank in ranks:
            rank.kill()
    assert [rank.returncode for rank in ranks] == [0] * NUM_RANKS, errors[0][-3000:]
    found = json.loads((tmp_path / "found.json").read_text())
    assert found["sharded"]
    assert found["losses"] == pytest.approx(steps([todo[2], todo[2]]), rel=1e-6)
