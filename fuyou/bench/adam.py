from __future__ import annotations

import argparse
from typing import Any

SUMMARY = "not written yet"


def add_arguments(parser: argparse.ArgumentParser) -> None: ...
def run(options: argparse.Namespace) -> dict[str, Any]:
    return {}


def describe(result: dict[str, Any]) -> str:
    return ""
