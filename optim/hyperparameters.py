"""What AdamW's parameter groups may hold."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

_RANGES = {
    "lr": "at least 0",
    "betas[0]": "at least 0 and below 1",
    "betas[1]": "at least 0 and below 1",
    "eps": "above 0",
    "weight_decay": "at least 0",
}


def check_group(group: Mapping[str, Any]) -> None:
    """ValueError, with the field and its value, for hyperparameters that AdamW cannot use."""
    betas = group["betas"]
    try:
        beta1, beta2 = betas
    except (TypeError, ValueError):
        raise ValueError(f"betas={betas!r} must be two numbers, such as (0.9, 0.999)") from None
    values = {
        "lr": group["lr"],
        "betas[0]": beta1,
        "betas[1]": beta2,
        "eps": group["eps"],
        "weight_decay": group["weight_decay"],
    }
    for field, value in values.items():
        try:
            number = math.nan if isinstance(value, str | bytes) else float(value)
        except (TypeError, ValueError):
            number = math.nan
        good = math.isfinite(number) and number >= 0
        if field.startswith("betas"):
            good = good and number < 1
        if field == "eps":
            good = good and number > 0
        if not good:
            raise ValueError(f"{field}={value!r} must be a number, {_RANGES[field]}")
    for field, reason in (
        ("amsgrad", "it keeps the largest second moment as a third state, 4 bytes a parameter more to read and write"),
        ("maximize", "the loss is minimised; negate it"),
    ):
        if group.get(field):
            raise ValueError(f"{field}={group[field]!r} is not supported ({reason}): leave it out")


def check_max_grad_norm(value: float | None, *, all_kept: bool) -> None:
    """ValueError for a limit of the norm that cannot be used, or not with gradients that are not all kept."""
    if value is None:
        return
    if not value > 0:
        raise ValueError(f"max_grad_norm={value!r} must be above 0, or None for no clipping")
    if not all_kept:
        raise ValueError(
            f"max_grad_norm={value!r} cannot be used here: gradients are given back before the norm is known, since "
            "the optimizer was made without a limit. Give it then: fuyou.AdamW(model, ..., "
            f"max_grad_norm={value!r})"
        )
