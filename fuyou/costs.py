"""Arithmetic of a step's costs: bytes and floating-point operations. Imports no torch; every line checks by hand."""

from __future__ import annotations


def weight_bytes_per_parameter(compute_dtype: str) -> int:
    """Stored weight: the bfloat16 high half, or the float32 master."""
    return 2 if compute_dtype == "bfloat16" else 4


def state_bytes_per_parameter(compute_dtype: str, moment_dtype: str) -> float:
    """Stored state: low half (bfloat16 compute only), m and v; int8 moments have a 4-byte scale each per 256."""
    moment_bytes = {"float32": 4.0, "bfloat16": 2.0, "int8": 1.0 + 4 / 256}[moment_dtype]
    return (2 if compute_dtype == "bfloat16" else 0) + 2 * moment_bytes


FORWARD_FLOPS, BACKWARD_FLOPS, RECOMPUTE_FLOPS = 2.0, 4.0, 2.0
"""Operations per parameter and token: a multiplication and an addition; attention scores left out."""


def num_update_workers(device: str, num_cores: int) -> int:
    """Threads for Adam. Beside a GPU two cores are left for everything else. On a CPU all cores: torch shares each
    operation evenly among them, so that one that Adam has alone would keep the others waiting.
    """
    return max(1, num_cores if device == "cpu" else num_cores - 2)


SCHEMES = {
    "paper": "30 B a parameter and step, updates in the backward pass, activations swapped (Fuyou, arXiv 2403.06504)",
    "zero-infinity": "38 B, updates after the backward pass, everything computed again (ZeRO-Infinity)",
    "fuyou": "26 B or less by our own plan for this machine, with exact clipping",
}
"""What `fuyou simulate` plays, by name."""
TFLOPS_FORMULA = (
    "tflops = 3 x 2 x (parameters that are multiplied + layers x sequence x width) x tokens / seconds / 1e12: the "
    "input embedding multiplies nothing, a tied head counts, attention is masked by half, what is computed again is not "
    "counted. tokens = batch x sequence"
)
