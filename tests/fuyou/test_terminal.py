"""The command line on a terminal: lines wrapped between words, nothing left of a live line, Ctrl-C at any moment."""

from __future__ import annotations

import io
import os
import pty
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

import fuyou
from fuyou.cli import main
from fuyou.inference_cli import _kept_answers, _print_answer, _Progress
from fuyou.terminal import fitted, shown, wrapped


class Terminal(io.StringIO):
    """A stream that says it is a terminal."""

    def isatty(self) -> bool:
        return True


@pytest.fixture
def terminal(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], Terminal]:
    """Puts a terminal of 40 columns in the place of stdout or stderr."""
    monkeypatch.setenv("COLUMNS", "40")
    monkeypatch.setenv("TERM", "xterm")

    def put(name: str) -> Terminal:
        made = Terminal()
        monkeypatch.setattr(sys, name, made)
        return made

    return put


def on_a_terminal(program: str) -> tuple[int, str]:
    """Runs Python code whose stdout and stderr are a terminal; its exit code and what the terminal got."""
    ours, theirs = pty.openpty()
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "TERM": "xterm"}
    # Tests that a shell began in the background ignore Ctrl-C, and hand that down.
    program = f"import signal; signal.signal(signal.SIGINT, signal.default_int_handler)\n{program}"
    process = subprocess.Popen([sys.executable, "-c", program], stdout=theirs, stderr=theirs, env=environment)
    os.close(theirs)
    seen = b""
    try:
        while chunk := os.read(ours, 4096):
            seen += chunk
    except OSError:  # how Linux says that nobody writes to it any more
        pass
    os.close(ours)
    return process.wait(timeout=120), seen.decode()


# ------------------------------------------------------------------------------------------------------- text


@pytest.mark.parametrize(
    ("line", "lines"),
    [
        ("short enough", ["short enough"]),
        ("one two three four five", ["one two three four", "five"]),
        ("  host  one two three", ["  host  one two", "        three"]),
        ("  key: one two three four", ["  key: one two three", "    four"]),
        ("at /a/path/that/is/longer/than/a/line it ends", ["at", "/a/path/that/is/longer/than/a/line", "it ends"]),
        ("", [""]),
    ],
)
def test_lines_are_wrapped_between_words(line: str, lines: list[str]) -> None:
    assert wrapped(line, 20) == lines


def test_a_file_gets_lines_as_they_are() -> None:
    text = "word " * 100
    assert fitted(text, io.StringIO()) == text


def test_control_characters_are_shown_and_do_nothing() -> None:
    assert shown("a\x1b[2Jb\x0bc\r\x9b\nd\te") == "a\\x1b[2Jb\\x0bc\\x0d\\x9b\nd\te"


@pytest.mark.parametrize("on_terminal", [True, False])
def test_answers_cannot_move_the_cursor(on_terminal: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    file = Terminal() if on_terminal else io.StringIO()
    monkeypatch.setattr(sys, "stdout", file)
    answer: Any = SimpleNamespace(completion="red \x1b[31m", prompt=None)
    _print_answer(answer, several=False)
    assert file.getvalue() == ("red \\x1b[31m\n" if on_terminal else "red \x1b[31m\n")


def test_errors_and_reports_are_wrapped(
    terminal: Callable[[str], Terminal], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    errors, out = terminal("stderr"), terminal("stdout")
    assert main(["trane"]) == 2
    assert main(["inspect", str(tmp_path / "missing" / "store")]) == 1
    monkeypatch.setattr(fuyou, "inspect_store", lambda _store: {"notes": "one thing after another " * 5})
    assert main(["inspect", "store"]) == 0
    for lines in (errors.getvalue().splitlines(), out.getvalue().splitlines()):
        assert len(lines) > 3
        assert all(len(line) <= 40 or " " not in line for line in lines)


def test_a_terminal_that_cannot_write_over_a_line_gets_no_live_line(monkeypatch: pytest.MonkeyPatch) -> None:
    for kind, has_line in (("xterm", True), ("dumb", False)):
        monkeypatch.setenv("TERM", kind)
        file = Terminal()
        progress = _Progress(file, 2, 10)
        progress.token(1)
        progress.say("done")
        assert ("\x1b" in file.getvalue()) == has_line
        assert ("token 1 of 10" in file.getvalue()) == has_line


def test_a_plan_is_all_that_plan_prints(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    import datasets

    datasets.enable_progress_bars()
    (tmp_path / "data.jsonl").write_text('{"text": "a b c"}\n')
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        f"""
model: {{config: {{model_type: llama, hidden_size: 64, intermediate_size: 64, num_hidden_layers: 2, vocab_size: 256}}}}
data: {{file: {tmp_path / "data.jsonl"}, tokenizer: bytes, max_length: 16}}
offload: {{store: {tmp_path / "store"}, host_memory: 128MiB}}
training: {{max_steps: 3}}
output: {{dir: {tmp_path / "out"}}}
"""
    )
    assert main(["plan", str(recipe), "--hardware", "h100"]) == 0
    captured = capsys.readouterr()
    assert captured.err == ""
    assert "a step, by 1 row of the data" in captured.out


# ----------------------------------------------------------------------------------------------------- Ctrl-C


def test_an_interrupted_line_leaves_nothing_of_a_live_one(
    terminal: Callable[[str], Terminal], monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(_store: Any) -> None:
        sys.stderr.write("0 of 2 answered, token 1 of 50^C")
        raise KeyboardInterrupt

    errors = terminal("stderr")
    monkeypatch.setattr(fuyou, "inspect_store", interrupted)
    assert main(["inspect", "store"]) == 130
    assert errors.getvalue().endswith("^C\r\x1b[Kfuyou: interrupted: nothing was changed\n")


def test_an_interrupted_export_leaves_no_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    new, empty = tmp_path / "new", tmp_path / "empty"
    empty.mkdir()

    def interrupted(_store: Any, out: Path) -> None:
        out.mkdir(exist_ok=True)
        (out / "config.json").write_text("{}")
        raise KeyboardInterrupt

    monkeypatch.setattr("fuyou.master_export.export_masters", interrupted)
    for out in (new, empty):
        assert main(["export", "store", str(out), "--masters"]) == 130
        assert capsys.readouterr().err == "fuyou: interrupted: nothing was exported; run the same command again\n"
    assert list(tmp_path.iterdir()) == [empty]
    assert list(empty.iterdir()) == []


def test_interrupted_answers_are_kept_where_there_are_any(tmp_path: Path) -> None:
    out = tmp_path / "answers.jsonl"
    out.write_text("")
    with pytest.raises(KeyboardInterrupt, match="^$"), _kept_answers(out, [], 3):
        raise KeyboardInterrupt
    assert not out.exists()
    out.write_text("{}\n")
    answers: list[Any] = [object()]
    said = r"answers.jsonl has the answers to the first 1 of 3 prompts"
    with pytest.raises(KeyboardInterrupt, match=said), _kept_answers(out, answers, 3):
        raise KeyboardInterrupt
    assert out.exists()


def test_a_second_signal_ends_at_once_and_shows_the_cursor_again() -> None:
    code, seen = on_a_terminal(
        """
import os, signal
from fuyou.cli import _Interruption
with _Interruption():
    print("\\x1b[?25l", end="", flush=True)
    try:
        os.kill(os.getpid(), signal.SIGINT)
    except KeyboardInterrupt:
        os.kill(os.getpid(), signal.SIGINT)
"""
    )
    assert code == 130
    assert seen.rindex("\x1b[?25h") > seen.rindex("\x1b[?25l")
    assert "fuyou: ended at once; what is committed is safe: run the same command to go on" in seen
    assert "Traceback" not in seen


def test_an_interrupt_before_the_command_line_is_there_ends_without_a_traceback() -> None:
    code, seen = on_a_terminal(
        """
import os, signal, sys
class Interrupting:
    def find_spec(self, name, path, target=None):
        if name == "fuyou.cli":
            os.kill(os.getpid(), signal.SIGINT)
sys.meta_path.insert(0, Interrupting())
from fuyou.__main__ import run
run()
"""
    )
    assert (code, seen) == (-signal.SIGINT, "")


def test_an_interrupted_program_ends_with_its_code_and_waits_for_nothing() -> None:
    code, seen = on_a_terminal(
        """
import atexit, os, signal, sys, threading, time
from fuyou import cli
from fuyou.__main__ import run
def interrupted(*_):
    threading.Thread(target=time.sleep, args=(100,)).start()
    atexit.register(os.kill, os.getpid(), signal.SIGINT)  # who presses it again while the program ends
    exec("os.kill(os.getpid(), signal.SIGINT)")  # Python then ends by the signal, though it was caught
cli._run = interrupted
run()
"""
    )
    assert (code, seen) == (130, "\r\x1b[Kfuyou: interrupted: nothing was begun; run the same command again\r\n")
