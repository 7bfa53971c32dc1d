"""Traces as files: what a run leaves, the events of Perfetto, the picture, and what is said when there is none."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import pytest
import torch

import fuyou
from fuyou.cli import main
from fuyou.trace import LANES, WAIT_LANE, Span, StepTrace
from fuyou.trace_files import load_traces, perfetto, save_traces
from tests.tiny_models import tiny_model_config


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("traced") / "store"
    model = fuyou.from_config(
        tiny_model_config("llama"), offload=fuyou.OffloadConfig(store=folder, device="cpu", host_memory="64MiB")
    )
    optimizer = fuyou.AdamW(model, max_grad_norm=1.0)
    for _ in range(6):
        ids = torch.randint(0, 128, (2, 8))
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.fuyou.close()
    return folder


def test_a_run_leaves_its_last_steps(store: Path) -> None:
    found = load_traces(store)
    assert sorted(found["steps"]) == [3, 4, 5, 6]
    lanes = {span["lane"] for span in found["steps"][6]["spans"]}
    assert {"gpu", "ssd_write", "cpu"} <= lanes <= {*LANES, WAIT_LANE}
    assert fuyou.verify_store(store) == []  # a file of no consequence


def test_perfetto_shows_each_lane_without_overlap(store: Path, tmp_path: Path, capsys: Any) -> None:
    out = tmp_path / "step.json"
    assert main(["trace", str(store), "--step", "5", "--out", str(out), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["step"] == 5
    events = json.loads(out.read_text())["traceEvents"]
    measured = [e for e in events if e["ph"] == "X" and e["pid"] == 1]
    assert len(measured) == len(load_traces(store)["steps"][5]["spans"])
    for thread in {e["tid"] for e in measured}:
        times = sorted((e["ts"], e["ts"] + e["dur"]) for e in measured if e["tid"] == thread)
        assert all(later[0] >= earlier[1] for earlier, later in itertools.pairwise(times))


def test_overlapping_spans_get_tracks_of_their_own(tmp_path: Path) -> None:
    spans = (
        Span("ssd_read", "a", 1.0, 3.0, 10),
        Span("ssd_read", "b", 2.0, 4.0, 20),
        Span("ssd_read", "c", 3.0, 5.0, 30),
    )
    save_traces(tmp_path, [StepTrace(7, 1.0, 6.0, spans)], None)
    found = load_traces(tmp_path)
    events = [e for e in perfetto(found["steps"][7], found["predicted"])["traceEvents"] if e["ph"] == "X"]
    assert {e["name"]: (e["tid"], e["ts"], e["dur"], e["args"]["bytes"]) for e in events} == {
        "a": (300, 0.0, 2e6, 10),
        "b": (301, 1e6, 2e6, 20),
        "c": (300, 2e6, 2e6, 30),
    }


@pytest.mark.parametrize("suffix", ["svg", "png"])
def test_a_picture(suffix: str, store: Path, tmp_path: Path) -> None:
    out = tmp_path / f"step.{suffix}"
    assert main(["trace", str(store), "--out", str(out)]) == 0
    data = out.read_bytes()
    assert data.startswith(b"\x89PNG" if suffix == "png" else b"<?xml")
    assert len(data) > 5000


def test_what_cannot_be_shown_is_explained(store: Path, tmp_path: Path, capsys: Any) -> None:
    for arguments, message in (
        ([str(tmp_path), "--out", "x.json"], "no trace"),
        ([str(store), "--step", "99", "--out", "x.json"], "holds the steps 3, 4, 5, 6"),
        ([str(store), "--out", "x.txt"], "ui.perfetto.dev"),
    ):
        assert main(["trace", *arguments]) == 2
        assert message in capsys.readouterr().err
    (tmp_path / "trace.json").write_text('{"steps": 3}')
    assert main(["trace", str(tmp_path), "--out", "x.json"]) == 2
    assert "not a trace of this version" in capsys.readouterr().err
