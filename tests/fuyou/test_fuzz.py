"""Mutated manifests, layouts, identities, recipes and safetensors headers: one clear message each, and nothing else.

No traceback, no hang, no memory, nothing written outside of the store, whatever is in the files.
"""

from __future__ import annotations

import contextlib
import copy
import io
import json
import os
import random
import resource
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

import fuyou
from fuyou.cli import main
from fuyou.errors import FuyouError
from fuyou.hardware import HardwareProfile
from io_engine import StoreError
from io_engine.durable import encode_checked
from tests.fuyou import tiny_run
from tests.fuyou.command_line import write_recipe
from tests.tiny_models import tiny_model

SLOWEST_SECONDS = 20.0
MOST_BYTES = 1 << 30

STRANGE: list[Any] = [
    *(None, True, False, -1, 0, 1, 2, 7, 4096, 2**31, 2**53 + 1, 2**63, 2**64, 2**80, -(2**63)),
    *(0.5, -0.0, 1e308, 1e-320, "", " ", "0", "\x00", "\ud800", "é" * 50, "x" * 5000, "null"),
    *("../outside/victim", "/outside/victim", "extents-1.bin", "extents-1.bin/../../outside/victim", "layout-1.json"),
    *("extents-٣.bin", "scratch-0.bin", "lock", ".", "..", "bfloat16", "xxh3:", "xxh3-list:" + "0" * 16),
    *([], {}, [[]], [None], [0, 0, 4096], {"name": {}}, [-1] * 3),
]


def mutated(value: Any, choose: random.Random) -> Any:
    """A copy of a JSON value with one to three places changed."""
    value = json.loads(json.dumps(value))
    for _ in range(choose.choice((1, 1, 2, 3))):
        places: list[tuple[Any, Any]] = []
        to_see = [value]
        while to_see:
            node = to_see.pop()
            keys = list(node) if isinstance(node, dict) else range(len(node)) if isinstance(node, list) else ()
            places += [(node, key) for key in keys]
            to_see += [node[key] for key in keys]
        if not places:
            return choose.choice(STRANGE)
        node, key = choose.choice(places)
        action = choose.randrange(6)
        if action == 0:
            del node[key]
        elif action == 1 and isinstance(node[key], int):
            node[key] = node[key] + choose.choice((-1, 1, 4096, -4096))
        elif action == 2:
            other, other_key = choose.choice(places)
            # Copies, since one of them may lie within the other.
            node[key], other[other_key] = copy.deepcopy(other[other_key]), copy.deepcopy(node[key])
        elif action == 3 and isinstance(node, list):
            node.append(node[key])
        elif action == 4 and isinstance(node, dict):
            node[choose.choice(("", "../x", "name", "é"))] = node[key]
        else:
            node[key] = choose.choice(STRANGE)
    return value


def mutated_bytes(data: bytes, choose: random.Random) -> bytes:
    """Bytes flipped, cut, doubled or put in."""
    result = bytearray(data)
    for _ in range(choose.randint(1, 4)):
        at = choose.randrange(len(result) + 1)
        action = choose.randrange(5)
        if action == 0 and at < len(result):
            result[at] ^= 1 << choose.randrange(8)
        elif action == 1:
            del result[at:]
        elif action == 2:
            result[at:at] = choose.randbytes(choose.randint(1, 9))
        elif action == 3:
            del result[at : at + choose.randint(1, 40)]
        else:
            result[at:at] = result[at : at + 200]
    return bytes(result)


def run(*arguments: str) -> tuple[int, str]:
    """Exit code and message of a command, which must be one of those that the command line promises."""
    out, errors = io.StringIO(), io.StringIO()
    started = time.perf_counter()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(errors):
        code = main(arguments)
    message = errors.getvalue()
    assert time.perf_counter() - started < SLOWEST_SECONDS
    assert code in (0, 1, 2, 3), message
    assert "a defect of fuyou" not in message, message
    assert "Traceback" not in message
    assert message == "" if code == 0 else message or out.getvalue()
    return code, message


@contextlib.contextmanager
def bounded(folder: Path) -> Iterator[None]:
    """Fails if memory grew by more than a gigabyte, or if anything beside `folder` was touched."""
    outside = folder.parent / "outside"
    outside.mkdir(exist_ok=True)
    (outside / "victim").write_text("untouched")
    before = sorted(os.listdir(folder.parent))
    peak_bytes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    yield
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 - peak_bytes < MOST_BYTES
    assert sorted(os.listdir(folder.parent)) == before
    assert os.listdir(outside) == ["victim"]
    assert (outside / "victim").read_text() == "untouched"


@pytest.fixture(scope="module", autouse=True)
def _one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


counts = pytest.mark.parametrize(
    "share", [0.02, pytest.param(1.0, marks=[pytest.mark.slow, pytest.mark.timeout(3600)])], ids=["sample", "all"]
)


# --- the small files of a store ----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store at step 2 with a checkpoint."""
    store = tmp_path_factory.mktemp("whole") / "store"
    tiny_run.train(store, None, until=1, on_step=lambda *_: None)
    assert run("checkpoint", str(store))[0] == 0
    tiny_run.train(store, None, until=2, on_step=lambda *_: None)
    return store


def body_of(path: Path) -> Any:
    return json.loads(path.read_bytes())["body"]


def spoil(store: Path, choose: random.Random) -> None:
    """Mutate one small file; mostly with a checksum that is right again, so that its content is what matters."""
    manifest = body_of(store / "manifest.json")
    (kept,) = store.glob("checkpoint-*.json")
    layout = store / manifest["layout"]["file"]
    path = choose.choice((store / "manifest.json", layout, layout, store / "store-id.json", kept))
    if choose.random() < 0.2:
        path.write_bytes(mutated_bytes(path.read_bytes(), choose))
    elif choose.random() < 0.03:
        depth = choose.choice((500, 50_000))
        text = json.dumps(body_of(path))[:-1] + ', "deep": ' + "[" * depth + "]" * depth + "}"
        path.write_bytes(encode_checked(None).replace(b"null", text.encode()))
    else:
        with contextlib.suppress(UnicodeEncodeError):
            path.write_bytes(encode_checked(mutated(body_of(path), choose)))
    if path == layout and path.read_bytes()[:18] == (store / "store-id.json").read_bytes()[:18]:
        manifest["layout"]["checksum"] = path.read_bytes()[13:34].decode("ascii", "replace")
        (store / "manifest.json").write_bytes(encode_checked(manifest))
    if choose.random() < 0.7:  # else the previous manifest may save it
        shutil.copy(store / "manifest.json", store / "manifest.previous.json")


@counts
def test_small_files_of_a_store(share: float, whole: Path, tmp_path: Path) -> None:
    """Looked at, checked, and opened for training."""
    choose, store = random.Random(41), tmp_path / "inside" / "store"
    codes: set[int] = set()
    (tmp_path / "inside").mkdir()
    with bounded(tmp_path / "inside"):
        for number in range(int(16_500 * share)):
            shutil.rmtree(store, ignore_errors=True)
            shutil.copytree(whole, store)
            spoil(store, choose)
            codes.add(run("inspect", str(store))[0])
            if number % 4 == 0:
                codes.add(run("verify", str(store))[0])
            if number % 20 == 0:
                with contextlib.suppress(FuyouError, StoreError, OSError):
                    fuyou.open_store_model(store, host_memory="64MiB").fuyou.close()
            if number % 20 == 10:
                run("checkpoint", str(store), "--restore", "step-1")
    assert codes == {0, 1}


def test_links_do_not_lead_out_of_a_store(whole: Path, tmp_path: Path) -> None:
    """Whatever file of it is one, what it leads to stays as it is."""
    for name in [*sorted(path.name for path in whole.iterdir()), "manifest.json.tmp", "scratch-0.bin"]:
        store, victim = tmp_path / name / "store", tmp_path / name / "victim"
        shutil.copytree(whole, store)
        content = (store / name).read_bytes() if (store / name).exists() else b"precious"
        victim.write_bytes(content)
        (store / name).unlink(missing_ok=True)
        (store / name).symlink_to(victim)
        losses: dict[int, float] = {}
        with contextlib.suppress(FuyouError, StoreError, OSError):
            tiny_run.train(store, None, until=3, on_step=losses.__setitem__)
        assert victim.read_bytes() == content, name


def test_pipes_and_huge_files_are_no_small_files(whole: Path, tmp_path: Path) -> None:
    """Neither waited for nor read."""
    for name in ("manifest.json", "store-id.json"):
        store = tmp_path / name
        shutil.copytree(whole, store)
        (store / name).unlink()
        (store / "manifest.previous.json").unlink()
        os.mkfifo(store / name)
        assert run("inspect", str(store))[0] == 1
        (store / name).unlink()
        with open(store / name, "wb") as file:
            file.truncate(1 << 40)
        assert run("inspect", str(store))[0] == 1


# --- recipes -----------------------------------------------------------------------------------------------------------


def strange_recipes(recipe: Path, choose: random.Random) -> Iterator[str]:
    text = recipe.read_text()
    values = yaml.safe_load(text)
    while True:
        if choose.random() < 0.4:
            yield mutated_bytes(text.encode(), choose).decode("utf-8", "surrogateescape")
        else:
            with contextlib.suppress(yaml.YAMLError):
                yield yaml.safe_dump(mutated(values, choose))


@counts
def test_recipes(share: float, tmp_path: Path) -> None:
    """Planned for a machine that was measured elsewhere, so that nothing is measured here."""
    choose, folder = random.Random(42), tmp_path / "inside"
    folder.mkdir()
    recipe = write_recipe(folder)
    hardware = folder / "hardware.json"
    profile = HardwareProfile("cpu", 2, 1e11, 1e9, 3e9, 2e9, 4e9, 2**36)
    hardware.write_text(json.dumps(profile.to_json()))
    recipes, codes = strange_recipes(recipe, choose), set()
    with bounded(folder):
        for _ in range(int(2_500 * share)):
            recipe.write_bytes(next(recipes).encode("utf-8", "surrogateescape"))
            codes.add(run("plan", str(recipe), "--hardware", str(hardware))[0])
    assert codes >= {0, 2}
    assert not (folder / "store").exists()


BOMBS: dict[str, Callable[[], str]] = {
    "aliases": lambda: "a0: &a0 [x, x]\n" + "".join(f"a{i}: &a{i} [*a{i - 1}, *a{i - 1}]\n" for i in range(1, 60)),
    "depth": lambda: "model: " + "[" * 100_000,
    "cycle": lambda: "model: &m\n  config: *m\n",
    "digits": lambda: "model: " + "9" * 100_000,
    "length": lambda: "# " + "x" * (64 << 20),
}


@pytest.mark.parametrize("name", list(BOMBS))
def test_recipes_that_would_blow_up(name: str, tmp_path: Path) -> None:
    (tmp_path / "inside").mkdir()
    recipe = tmp_path / "inside" / "recipe.yaml"
    recipe.write_text(BOMBS[name]())
    with bounded(tmp_path / "inside"):
        code, message = run("plan", str(recipe))
    assert code == 2
    assert len(message) < 2000


# --- safetensors -------------------------------------------------------------------------------------------------------


@counts
def test_safetensors_headers(share: float, tmp_path: Path) -> None:
    """A checkpoint that is not what its header says makes no store, or a whole one."""
    choose, folder = random.Random(43), tmp_path / "inside"
    tiny_model("llama", seed=3).save_pretrained(folder / "checkpoint")
    path = folder / "checkpoint" / "model.safetensors"
    data = path.read_bytes()
    size = int.from_bytes(data[:8], "little")
    header, rest = json.loads(data[8 : 8 + size]), data[8 + size :]
    outcomes: set[bool] = set()
    with bounded(folder):
        for _ in range(int(1_000 * share)):
            if choose.random() < 0.3:
                path.write_bytes(mutated_bytes(data[: 8 + size], choose) + rest)
            else:
                text = json.dumps(mutated(header, choose)).encode()
                path.write_bytes(len(text).to_bytes(8, "little") + text + rest)
            store = folder / "store"
            shutil.rmtree(store, ignore_errors=True)
            offload = fuyou.OffloadConfig(store=store, device="cpu", host_memory="64MiB")
            try:
                fuyou.from_pretrained(folder / "checkpoint", offload=offload).fuyou.close()
                outcomes.add(True)
            except (FuyouError, StoreError, OSError):
                outcomes.add(False)
    assert False in outcomes
