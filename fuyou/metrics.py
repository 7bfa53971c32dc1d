"""metrics.jsonl: one JSON line for each optimizer step of a run, however often it was killed and resumed."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any


def to_json_line(values: Mapping[str, Any]) -> str:
    """One line of strict JSON without the newline; NaN and infinity, which JSON cannot say, become null."""
    return json.dumps(_finite(values), allow_nan=False, default=str)


def _finite(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {str(key): _finite(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(inner) for inner in value]
    return value


class MetricsFile:
    """Appends a line a step to a file.

    Opening at `resumed_step` removes the lines of later steps, which the killed run took but did not commit,
    and a half-written last line; the file is replaced as a whole, so that no crash leaves less than the lines
    before. A run that begins at step 0 puts the file of an earlier run aside (metrics.1.jsonl, ...) instead.
    Raises OSError.
    """

    def __init__(self, path: str | os.PathLike[str], *, resumed_step: int) -> None:
        self.path = Path(path)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self.set_aside: Path | None = None
        if self.path.exists():
            if resumed_step == 0 and self.path.stat().st_size:
                self.set_aside = _free_name(self.path)
                os.replace(self.path, self.set_aside)
            else:
                self._keep(resumed_step)
        self._file = self.path.open("a", encoding="utf-8")

    def _keep(self, resumed_step: int) -> None:
        kept: dict[int, str] = {}
        for line in self.path.read_text(encoding="utf-8", errors="replace").splitlines():
            step = _step_of(line)
            if step is not None and step <= resumed_step:
                kept[step] = line
        partial = self.path.with_name(f"{self.path.name}.partial")
        with partial.open("w", encoding="utf-8") as file:
            file.writelines(f"{kept[step]}\n" for step in sorted(kept))
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, self.path)

    def write(self, values: Mapping[str, Any]) -> None:
        """Append one step's line; it reaches the operating system before this returns."""
        self._file.write(to_json_line(values) + "\n")
        self._file.flush()

    def close(self) -> None:
        """Close the file. Idempotent."""
        self._file.close()

    def __enter__(self) -> MetricsFile:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _step_of(line: str) -> int | None:
    try:
        values = json.loads(line)
    except json.JSONDecodeError:
        return None
    step = values.get("step") if isinstance(values, dict) else None
    return step if isinstance(step, int) else None


def _free_name(path: Path) -> Path:
    number = 1
    while (candidate := path.with_name(f"{path.stem}.{number}{path.suffix}")).exists():
        number += 1
    return candidate
