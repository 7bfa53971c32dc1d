"""What `fuyou plan` says beside the plan: checked by planning anew, by hand, and by following what it advises."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
from transformers import LlamaConfig

import fuyou
from fuyou.cli import main
from fuyou.opening import inputs_of_run
from fuyou.plan_report import PICTURE_WIDTH, SHADES, lanes_picture, nearest_settings, report_plan
from fuyou.planner import PlanInputs, least_memory
from fuyou.simulator import simulate_step
from tests.fuyou.test_planner import HARDWARE, MIB, UNTIED

GPU = dataclasses.replace(HARDWARE, device="cuda", compute_flops_per_second=8e12, link_bytes_per_second=1e10)


def inputs(host_mib: int = 200, gpu_mib: int = 512) -> PlanInputs:
    return PlanInputs(
        shards=tuple(UNTIED),
        device="cuda",
        compute_dtype="bfloat16",
        moment_dtype="float32",
        host_memory_bytes=host_mib * MIB,
        host_memory_reason="as given",
        gpu_memory_bytes=gpu_mib * MIB,
        micro_batch_size=None,
        clipping=True,
        num_cores=8,
        hardware=GPU,
        boundary_bytes=MIB,
        num_tokens=4096,
        sequence_length=512,
    )


def test_figures_of_a_run_by_hand() -> None:
    given = inputs()
    plan = given.plan()
    report = report_plan(given, plan, num_steps=1000, endurance_bytes=10**12)
    assert plan.prediction is not None
    assert report.plan == plan
    assert report.tokens_per_second == pytest.approx(4096 / plan.prediction.seconds)
    assert report.hours == pytest.approx(1000 * plan.prediction.seconds / 3600)
    assert report.bytes_written_per_step == plan.prediction.bytes_written
    assert report.bytes_written == 1000 * plan.prediction.bytes_written
    assert report.steps_of_drive_life == pytest.approx(1e12 / plan.prediction.bytes_written)
    two = report_plan(dataclasses.replace(given, hardware=GPU.with_drives(2)), plan, endurance_bytes=10**12)
    assert two.steps_of_drive_life == pytest.approx(2e12 / plan.prediction.bytes_written)
    assert two.hours is None


def test_worth_of_a_change_is_that_of_the_changed_plan() -> None:
    given = inputs()
    before = given.plan().prediction
    assert before is not None
    found = {w.change: w for w in report_plan(given, given.plan()).worths}
    changed = {
        "+128 MiB host memory": dataclasses.replace(given, host_memory_bytes=328 * MIB),
        "one more drive of this kind": dataclasses.replace(given, hardware=GPU.with_drives(2)),
        "twice the rows a step": dataclasses.replace(given, num_tokens=8192, boundary_bytes=2 * MIB),
    }
    for change, anew in changed.items():
        prediction = anew.plan().prediction
        assert prediction is not None
        assert found[change].seconds_per_step == prediction.seconds
        ratio = (anew.num_tokens or 0) / 4096
        assert found[change].speedup == pytest.approx(ratio * before.seconds / prediction.seconds)
    # The drive is the limit: another one and smaller moments help, a faster GPU does not.
    assert before.limiting_lane in ("ssd_read", "ssd_write")
    assert found["one more drive of this kind"].speedup > 1.2
    assert found['moment_dtype="int8"'].speedup > 1.2
    assert found["twice the compute rate"].speedup < 1.1


def test_nearest_settings_fit_and_nothing_less_does() -> None:
    assert nearest_settings(inputs()) == []
    least = least_memory(UNTIED)
    host = least.host_memory_bytes // MIB
    assert nearest_settings(inputs(host_mib=host - 1))[0] == f'host_memory="{host}MiB"'
    gpu = -(-least.device * 5 // 4 // MIB)
    assert nearest_settings(inputs(gpu_mib=60))[0] == f'gpu_memory="{gpu}MiB"'
    assert nearest_settings(inputs(host_mib=50, gpu_mib=60))[0] == f'host_memory="{host}MiB", gpu_memory="{gpu}MiB"'
    inputs(host_mib=host, gpu_mib=gpu).plan()
    # Smaller records may be all that is needed.
    assert 'moment_dtype="int8"' in nearest_settings(inputs(host_mib=host - 1))


def test_picture_of_the_lanes() -> None:
    given = inputs()
    step = simulate_step(given.plan().blocks, GPU, num_tokens=4096)
    lines = {line.split()[0]: line for line in lanes_picture(step).splitlines()}
    assert set(lines) == {lane for lane, seconds in step.lane_seconds.items() if seconds}
    for lane, line in lines.items():
        assert len(line) < 80
        cells = line[13 : 13 + PICTURE_WIDTH]
        shaded = sum(SHADES.index(cell) for cell in cells) / 4 / PICTURE_WIDTH
        assert shaded == pytest.approx(step.lane_seconds[lane] / step.seconds, abs=0.13)


def test_notebooks_show_tables() -> None:
    given = inputs()
    plan = dataclasses.replace(given.plan(), reasons={"x": "<script>"})
    assert "<table>" in plan._repr_html_()
    assert "&lt;script&gt;" in plan._repr_html_()
    assert ">why x<" in plan._repr_html_()
    text = dataclasses.replace(GPU, sources={"num_cores": "a & b"})._repr_html_()
    assert "10 GB/s" in text
    measured = dataclasses.replace(GPU, compute_flops_per_second=3.604e10, commit_seconds=0.0083, num_cores=2)
    measured = dataclasses.replace(measured, update_parameters_per_second={"float32": 5.66e8, "int8": 3.73e8})
    assert [
        unit in measured._repr_html_()
        for unit in (">36 GFLOP/s<", ">8.3 ms<", ">float32 566 million/s, int8 373 million/s<")
    ] == [True] * 3
    assert "a &amp; b" in text


def test_a_profile_brings_its_own_memory(tmp_path: Path) -> None:
    config = LlamaConfig(
        vocab_size=512, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4
    )
    machine = dataclasses.replace(GPU, host_memory_bytes=2**40, gpu_memory_bytes=2**36, num_cores=40)
    found = inputs_of_run(
        config, offload=fuyou.OffloadConfig(store=tmp_path), batch_size=2, sequence_length=32, hardware=machine
    )
    assert found.host_memory_bytes == int(0.7 * 2**40)
    assert found.gpu_memory_bytes == int(0.95 * 2**36)
    assert found.num_cores == 40


def test_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "data.jsonl").write_text('{"text": "a b c"}\n')
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        f"""
model:
  config:
    {{model_type: llama, hidden_size: 256, intermediate_size: 512, num_hidden_layers: 2, num_attention_heads: 4, vocab_size: 512}}
data: {{file: {tmp_path / "data.jsonl"}, text_field: text, tokenizer: bytes, max_length: 64}}
offload: {{store: {tmp_path / "store"}, host_memory: 128MiB}}
training: {{max_steps: 100, per_device_train_batch_size: 4}}
output: {{dir: {tmp_path / "out"}}}
"""
    )
    command = ["plan", str(recipe), "--hardware", "rtx4090", "--drives", "2"]
    assert main([*command, "--endurance", "600TB"]) == 0
    short = capsys.readouterr().out
    for part in ("tokens/s", "100 steps", "the drives' endurance is", "one more drive of this kind", "lanes of a step"):
        assert part in short
    assert "because" not in short
    assert main([*command, "--explain"]) == 0
    explained = capsys.readouterr().out
    assert "because        durability" in explained
    assert "blocks:" in explained
    assert main([*command, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["report"]["num_steps"] == 100
    assert "report" not in fuyou.Plan.from_json(found).to_json()
    assert main([*command, "--set", "offload.host_memory=4MiB"]) == 3
    assert "Nearest settings that fit: host_memory=" in capsys.readouterr().err
    assert main(["plan", str(recipe), "--drives", "2"]) == 2
    assert "--hardware" in capsys.readouterr().err
    assert main([*command, "--endurance", "much"]) == 2
    assert not (tmp_path / "store").exists()
