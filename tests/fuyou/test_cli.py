"""The command line around the commands: usage, exit codes, messages, output, doctor, metrics, progress."""

from __future__ import annotations

import io
import json
import math
import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

import fuyou
from fuyou import cli, doctor
from fuyou.cli import main
from fuyou.errors import ConfigError, DataError, ModelError, PlanError
from fuyou.live_view import RunView, sparkline
from fuyou.metrics import MetricsFile, to_json_line
from fuyou.progress import (
    JsonReporter,
    LineReporter,
    QuietReporter,
    Reporter,
    RunStart,
    RunStatistics,
    RunSummary,
    StepReport,
    TerminalReporter,
    duration_text,
    make_reporter,
)
from io_engine import StoreError
from optim import NonFiniteUpdateError

# ------------------------------------------------------------------------------------------- usage and errors


@pytest.mark.parametrize(
    ("arguments", "part"),
    [
        ([], "required: COMMAND"),
        (["trane", "x"], "invalid choice: 'trane'"),
        (["train"], "required: RECIPE"),
        (["train", "missing.yaml"], "recipe 'missing.yaml' cannot be read: No such file or directory"),
        (["train", "r.yaml", "--steps", "0"], "argument --steps: '0': expected a whole number above 0"),
        (["train", "r.yaml", "--resume", "perhaps"], "choose auto, never, must or the number of a step"),
        (["train", "r.yaml", "--sted", "1"], "--sted"),
        (["plan", "missing.yaml", "--json"], "recipe 'missing.yaml' cannot be read"),
        (["generate", "store"], "one of the arguments --prompt --prompts is required"),
    ],
)
def test_wrong_usage_is_one_message_and_exit_code_2(
    arguments: list[str], part: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(arguments) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("fuyou: error: ")
    assert part in captured.err
    assert captured.err.count("\n") == 1


def test_wrong_recipes_are_exit_code_2(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("model: {name_or_path: x}\nofflod: {}\n")
    assert main(["train", str(recipe)]) == 2
    assert "unknown key 'offlod' in recipe: did you mean 'offload'?" in capsys.readouterr().err


def test_help_lists_the_commands_that_exist(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--help"]) == 0
    text = capsys.readouterr().out
    for command in ("doctor", "plan", "train", "inspect", "verify", "export"):
        assert command in text
        assert main([command, "--help"]) == 0


def raising(error: BaseException) -> Callable[..., Any]:
    def command(*_: Any, **__: Any) -> Any:
        raise error

    return command


@pytest.mark.parametrize(
    ("error", "code", "message"),
    [
        (ConfigError("a=1: no"), 2, "error: a=1: no"),
        (PlanError("2 GiB short"), 3, "error: 2 GiB short"),
        (ModelError("no weights"), 1, "error: no weights"),
        (DataError("no rows"), 1, "error: no rows"),
        (StoreError("locked"), 1, "error: locked"),
        (NonFiniteUpdateError("NaN"), 1, "error: NaN"),
        (FileNotFoundError(2, "No such file", "/x"), 1, "error: [Errno 2] No such file: '/x'"),
        (KeyboardInterrupt(), 130, "interrupted: nothing was changed"),
        (KeyboardInterrupt("the store stands at step 3"), 130, "interrupted: the store stands at step 3"),
        (MemoryError("2 GiB"), 1, "error: the host's memory is used up (2 GiB): lower offload.host_memory"),
        (TypeError("odd"), 1, "error: unexpected TypeError: odd (this is a defect of fuyou; "
         "FUYOU_TRACEBACK=1 shows where it happened)"),
    ],
)  # fmt: skip
def test_every_error_has_its_exit_code_and_message(
    error: BaseException,
    code: int,
    message: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(fuyou, "inspect_store", raising(error))
    assert main(["inspect", "store"]) == code
    captured = capsys.readouterr()
    assert (captured.out, captured.err) == ("", f"fuyou: {message}\n")


def test_a_traceback_is_shown_only_where_asked(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(fuyou, "inspect_store", raising(DataError("no rows")))
    monkeypatch.setenv("FUYOU_TRACEBACK", "1")
    assert main(["inspect", "store"]) == 1
    assert "Traceback" in capsys.readouterr().err


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_signals_interrupt_even_if_something_else_is_raised(
    number: signal.Signals, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupted(_store: Any) -> None:
        try:
            os.kill(os.getpid(), number)
        except KeyboardInterrupt:
            raise RuntimeError("a thread pool was closed") from None

    before = signal.getsignal(number)
    monkeypatch.setattr(fuyou, "inspect_store", interrupted)
    assert main(["inspect", "store"]) == 130
    assert capsys.readouterr().err == "fuyou: interrupted: nothing was changed\n"
    assert signal.getsignal(number) is before


def test_a_reader_that_goes_away_is_no_error() -> None:
    program = "import sys, fuyou; from fuyou.cli import main; fuyou.inspect_store = lambda store: {'step': 3}; "
    process = subprocess.Popen(
        [sys.executable, "-c", f"{program} sys.exit(main(['inspect', 'store']))"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
    )
    assert process.stdout is not None
    assert process.stderr is not None
    process.stdout.close()
    assert process.stderr.read() == b""
    process.stderr.close()
    assert process.wait(timeout=120) == 1


def test_several_directories_of_one_store(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    seen: list[Any] = []

    def inspect(store: Any) -> dict[str, Any]:
        seen.append(store)
        return {"step": 3, "parts": [{"name": "prologue", "bytes": 4}], "none": None, "list": [1, 2]}

    monkeypatch.setattr(fuyou, "inspect_store", inspect)
    assert main(["inspect", "a", "--also", "b", "--also", "c"]) == 0
    assert main(["inspect", "a"]) == 0
    assert seen == [["a", "b", "c"], "a"]
    text = capsys.readouterr().out.splitlines()
    assert text[:5] == ["step: 3", "parts:", "  prologue:", "    bytes: 4", "none: none"]


def test_export_refuses_a_folder_with_files(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    assert main(["export", "store", str(tmp_path)]) == 2
    assert "name a new one" in capsys.readouterr().err


# ----------------------------------------------------------------------------------------------------- doctor


@pytest.fixture
def quick_probe(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "PROBE_BYTES", 2**20)


@pytest.mark.usefixtures("quick_probe")
def test_doctor_reports_every_part(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor", str(tmp_path), "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["ok"]
    names = {finding["name"] for finding in report["findings"]}
    assert names >= {
        "Python", "torch", "transformers", "numba", "kvikio", "host memory", "huge pages", "open files",
        "I/O path", "package io_engine", "package optim", f"drive of {tmp_path}",
    }  # fmt: skip
    assert any(name.startswith("GPU") for name in names)
    assert list(tmp_path.iterdir()) == []
    assert main(["doctor", str(tmp_path)]) == 0
    assert "I/O path" in capsys.readouterr().out


@pytest.mark.usefixtures("quick_probe")
def test_doctor_says_what_to_do_about_a_directory(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor", str(tmp_path / "missing")]) == 1
    text = capsys.readouterr().out
    assert "BAD" in text
    assert "name a directory on the drive that the store will be on" in text.split("what to do:")[1]


@pytest.mark.usefixtures("quick_probe")
def test_doctor_finds_versions_out_of_range(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "_required_ranges", lambda: {"torch": ">=99", "numba": ">=0.1"})
    monkeypatch.setattr(doctor, "_requires_python", lambda: ">=4")
    found = {finding.name: finding for finding in [*doctor._python(), *doctor._packages()]}
    assert found["torch"].status == found["Python"].status == "problem"
    assert found["torch"].advice == "pip install 'torch>=99'"
    assert found["numba"].status == "ok"
    todo = doctor.advice(list(found.values()))
    assert any(line.startswith("torch: ") for line in todo)


def test_doctor_finds_a_module_that_hides_ours(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from importlib.machinery import ModuleSpec

    found = ModuleSpec("optim", None, origin=str(tmp_path / "optim.py"))
    monkeypatch.setattr(doctor.importlib.util, "find_spec", lambda name: found)
    assert [finding.status for finding in doctor._own_packages()] == ["problem", "problem"]


# ---------------------------------------------------------------------------------------------------- metrics


def test_metrics_keep_one_line_a_step_across_a_resume(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n{"step": 2}\n{"step": 3}\n{"step": 4}\n{"step"')
    with MetricsFile(path, resumed_step=2) as file:
        assert path.read_text() == '{"step": 1}\n{"step": 2}\n'
        file.write({"step": 3, "loss": float("nan")})
        # Readable by others at once.
        assert path.read_text().splitlines()[-1] == '{"step": 3, "loss": null}'
    assert [entry.name for entry in tmp_path.iterdir()] == ["metrics.jsonl"]


def test_metrics_of_another_run_are_put_aside(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    for content in ("first\n", "second\n"):
        path.write_text(content)
        with MetricsFile(path, resumed_step=0) as file:
            assert file.set_aside is not None
    assert (tmp_path / "metrics.1.jsonl").read_text() == "first\n"
    assert (tmp_path / "metrics.2.jsonl").read_text() == "second\n"
    assert path.read_text() == ""


def test_a_failure_while_lines_are_removed_loses_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n{"step": 2}\n')
    monkeypatch.setattr(os, "replace", raising(OSError(28, "No space left on device")))
    with pytest.raises(OSError, match="No space left"):
        MetricsFile(path, resumed_step=1)
    assert path.read_text() == '{"step": 1}\n{"step": 2}\n'


def test_json_lines_are_strict_json() -> None:
    line = to_json_line({"a": float("inf"), "b": [float("nan"), 1.5], "c": {"d": (1, 2)}, "e": Path("x")})
    assert json.loads(line) == {"a": None, "b": [None, 1.5], "c": {"d": [1, 2]}, "e": "x"}


# --------------------------------------------------------------------------------------------------- progress

METRICS = {
    "step": 2, "loss": 1.5, "grad_norm": 2.0, "num_tokens": 1000, "seconds": 0.5, "bytes_read": 2 * 10**9,
    "bytes_written": 10**9, "limiting_lane": "ssd_read", "skipped": None, "peak_gpu_bytes": 0,
    "peak_host_bytes": 2**20, "committed_step": 1,
}  # fmt: skip
LANE_SECONDS = {"gpu": 0.25, "ssd_read": 0.5, "ssd_write": 0.1, "h2d": 0.0}
START = RunStart(model="m", resumed="new store", plan="the plan", step=0, stop_step=3, max_steps=3, save_steps=None)


def play(reporter: Reporter) -> RunSummary:
    """One short run."""
    statistics = RunStatistics()
    reporter.note("38 rows")
    reporter.start(START)
    for step in (1, 2, 3):
        metrics = {
            **METRICS,
            "step": step,
            "loss": 2.0 - step / 4,
            "skipped": "norm is inf" if step == 3 else None,
        }
        statistics.add(metrics)
        reporter.step(StepReport(step, 3, metrics, statistics.remaining_seconds(3 - step)))
    reporter.evaluation(3, 1.25)
    summary = statistics.summary(
        step=3, max_steps=3, eval_loss_before=3.0, eval_loss_after=1.25, bytes_moved=(6 * 10**9, 10**9),
        exported_to=Path("out/model"), metrics_file=Path("out/metrics.jsonl"), store="store",
    )  # fmt: skip
    reporter.end(summary)
    reporter.close()
    return summary


def test_statistics_of_a_run() -> None:
    summary = play(QuietReporter())
    assert (summary.num_steps, summary.num_tokens, summary.bytes_read) == (3, 3000, 6 * 10**9)
    assert summary.bytes_written == 10**9
    assert (summary.first_loss, summary.last_loss, summary.limiting_lane) == (1.75, 1.25, "ssd_read")
    assert summary.finished
    assert RunStatistics().remaining_seconds(5) is None


def test_plain_lines_at_logging_steps_and_at_the_end() -> None:
    file = io.StringIO()
    play(LineReporter(file, logging_steps=2))
    text = file.getvalue()
    assert "\x1b" not in text
    assert (
        "step 2/3  loss 1.5000  norm 2  2,000 tokens/s  "
        "read 4.00 GB/s  written 2.00 GB/s  ETA 0 s  limit ssd_read\n" in text
    )
    assert "step 1/3" not in text
    assert "step 3/3" in text
    assert "skipped" in text
    assert "step 3: held-out loss 1.2500\n" in text
    assert "held-out loss   3.0000 -> 1.2500\n" in text
    assert "out/model (loads with plain transformers)" in text


def test_json_lines_and_nothing_else() -> None:
    file = io.StringIO()
    play(JsonReporter(file))
    events = [json.loads(line) for line in file.getvalue().splitlines()]
    assert [e["event"] for e in events] == ["note", "start", "step", "step", "step", "evaluation", "end"]
    assert events[3]["loss"] == 1.5
    assert events[-1]["finished"] is True


@pytest.mark.parametrize("width", [80, 200])
def test_a_live_view_on_a_terminal(width: int) -> None:
    file = io.StringIO()
    console = Console(file=file, force_terminal=True, width=width, color_system=None)
    play(TerminalReporter(console))
    text = file.getvalue()
    assert "step 3 changed nothing: norm is inf" in text
    assert "held-out loss" in text
    assert text.count("step 3/3") == 4  # drawn after step 3, below two notes, and when the run is over
    # What is committed by then is in the summary, or in the message of what ended the run.
    assert "is committed (Ctrl-C stops" not in text.split("step 3/3")[-1]
    assert text.count("is committed (Ctrl-C stops") >= 3


def test_a_terminal_that_cannot_write_over_a_line_gets_lines(monkeypatch: pytest.MonkeyPatch) -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    monkeypatch.setenv("TERM", "xterm")
    assert isinstance(make_reporter(Terminal()), TerminalReporter)
    monkeypatch.setenv("TERM", "dumb")
    file = Terminal()
    play(make_reporter(file))
    assert "\x1b" not in file.getvalue()
    assert "step 2/3  loss" in file.getvalue()


def test_notes_are_wrapped_between_words_right_of_their_label() -> None:
    console = Console(file=io.StringIO(), force_terminal=True, width=24, color_system=None)
    with console.capture() as capture:
        TerminalReporter(console).note("one thing after another\nand two\n  the label  of three short words")
    assert capture.get() == ("one thing after another\nand two\n  the label  of three\n             short words\n")


@pytest.mark.parametrize("width", [80, 200])
def test_what_the_live_view_says(width: int) -> None:
    console = Console(file=io.StringIO(), width=width, color_system=None)
    view = RunView(step=0, max_steps=30, save_steps=10)
    for step in range(1, 13):
        line = {**METRICS, "loss": 3.0 - step / 8, "lane_seconds": LANE_SECONDS, "committed_step": step - 1}
        view.add(step, line, "0:09")
    with console.capture() as capture:
        console.print(view)
    lines = [line.rstrip() for line in capture.get().splitlines()]
    assert all(len(line) <= width for line in lines)
    assert re.fullmatch(r"step 12/30  .{20}  0.5 s a step  0:09 left", lines[0])
    assert lines[1] == "loss 1.5000  █▇▇▆▅▅▄▄▃▂▂▁  norm 2"
    assert lines[2].startswith("2,000 tokens/s  read 4.00 GB/s  written 2.00 GB/s  11.18 GiB written so far")
    assert [line.split()[0] for line in lines[3:6]] == ["gpu", "ssd_read", "ssd_write"]
    assert " 50%" in lines[3]
    assert lines[4].endswith("100%  limits the step")
    assert lines[6] == "step 11 is committed (Ctrl-C stops, rerun to go on); next checkpoint: step 20"


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ([], ""),
        ([1.0], ""),
        ([2.0, 2.0], "▁▁"),
        ([0, 7], "▁█"),
        ([7, 0, math.nan, math.inf], "█▁"),
        ([0, 0, 4, 8], "▁▃█"),
    ],
)
def test_sparklines(values: list[float], expected: str) -> None:
    assert sparkline(values, 3) == expected


def test_the_reporter_fits_the_output() -> None:
    file = io.StringIO()
    assert isinstance(make_reporter(file), LineReporter)
    assert isinstance(make_reporter(file, quiet=True), QuietReporter)
    assert isinstance(make_reporter(file, quiet=True, as_json=True), JsonReporter)


@pytest.mark.parametrize(("seconds", "text"), [(0.4, "0 s"), (59.4, "59 s"), (59.6, "1:00"), (7384, "2:03:04")])
def test_durations(seconds: float, text: str) -> None:
    assert duration_text(seconds) == text


def test_exit_codes_are_those_of_the_documentation() -> None:
    codes = (cli.EXIT_DONE, cli.EXIT_FAILED, cli.EXIT_USAGE, cli.EXIT_DOES_NOT_FIT, cli.EXIT_INTERRUPTED)
    assert codes == (0, 1, 2, 3, 130)
