"""Frozen decoder layers stored in 8 or 4 bits a weight: bitsandbytes' formats, its kernels in both directions.

Matrices of a frozen layer are quantised when a store is filled, and dequantised to the compute type where they are computed
with, when they are bound: modules and adapters see plain weights. Vectors (norms, biases) stay as they are.

* "nf4": codes of 4 bits in blocks of 64 with a scale each; the scales in 8 bits in blocks of 256 with a float32 scale each,
  and their float32 mean (the double quantisation of QLoRA). 0.516 bytes a weight.
* "int8": codes of 8 bits with a float32 scale for each row (LLM.int8). 1 byte a weight, and 4 a row.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterator, Mapping
from typing import Any

import torch

from fuyou.errors import ConfigError
from io_engine import ALIGNMENT_BYTES, round_up
from optim import ParameterSlot, ShardLayout

_BLOCK, _SCALE_BLOCK = 64, 256
_PART_ALIGNMENT_BYTES = 64
_PIECE_BYTES = 4 * 2**20


@functools.cache
def _kernels() -> Any:
    try:
        import bitsandbytes.functional
    except ImportError as error:
        raise ConfigError(
            'frozen_dtype "int8" and "nf4" need bitsandbytes: pip install "fuyou[quantised]", or leave frozen_dtype out '
            f"({error})"
        ) from None
    return bitsandbytes.functional


def check_available() -> None:
    """ConfigError without the library."""
    _kernels()


def _is_quantised(slot: ParameterSlot) -> bool:
    return len(slot.shape) > 1 and slot.num_elements % 2 == 0


@dataclasses.dataclass(frozen=True)
class _Part:
    """Bytes `start` to `stop` of the extent: one tensor of one parameter."""

    kind: str
    dtype: torch.dtype
    start: int
    stop: int


@dataclasses.dataclass(frozen=True)
class QuantisedLayout(ShardLayout):
    """The layout of a frozen shard whose matrices are quantised; `parameters` say where they lie when dequantised."""

    frozen_dtype: str = "nf4"
    """"int8" or "nf4"."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.frozen_dtype not in ("int8", "nf4"):
            raise ValueError(f"frozen_dtype={self.frozen_dtype!r} of shard {self.name!r} must be int8 or nf4")

    @classmethod
    def from_plain(cls, layout: ShardLayout, frozen_dtype: str) -> QuantisedLayout:
        """The same parameters, quantised."""
        plain = {field.name: getattr(layout, field.name) for field in dataclasses.fields(ShardLayout)}
        return cls(**plain, frozen_dtype=frozen_dtype)

    @functools.cached_property
    def _parts(self) -> dict[str, tuple[_Part, ...]]:
        found: dict[str, tuple[_Part, ...]] = {}
        end = 0
        for slot in self.parameters:
            parts: list[_Part] = []
            for kind, dtype, count in self._tensors_of(slot):
                start = round_up(end, _PART_ALIGNMENT_BYTES)
                end = start + count * dtype.itemsize
                parts.append(_Part(kind, dtype, start, end))
            found[slot.name] = tuple(parts)
        return found

    def _tensors_of(self, slot: ParameterSlot) -> Iterator[tuple[str, torch.dtype, int]]:
        if not _is_quantised(slot):
            yield "plain", getattr(torch, self.compute_dtype), slot.num_elements
        elif self.frozen_dtype == "int8":
            yield "codes", torch.int8, slot.num_elements
            yield "scales", torch.float32, slot.num_elements // slot.shape[-1]
        else:
            blocks = -(-slot.num_elements // _BLOCK)
            yield "codes", torch.uint8, slot.num_elements // 2
            yield "scales", torch.uint8, blocks
            yield "scales_of_scales", torch.float32, -(-blocks // _SCALE_BLOCK)
            yield "mean_scale", torch.float32, 1

    @property
    def weight_bytes(self) -> int:
        """Bytes of the weight extent, a multiple of 4,096."""
        return round_up(max(part.stop for parts in self._parts.values() for part in parts), ALIGNMENT_BYTES)

    @property
    def weight_piece_bytes(self) -> int:
        """Bytes of weight that one checksum digest covers."""
        return min(self.weight_bytes, _PIECE_BYTES)

    def quantise(self, values: Mapping[str, torch.Tensor], stored: torch.Tensor) -> None:
        """Write parameters' values into `stored`, uint8 of `weight_bytes` in host memory."""
        for slot in self.parameters:
            for part, tensor in zip(self._parts[slot.name], self._quantised(slot, values[slot.name]), strict=True):
                stored[part.start : part.stop].view(part.dtype).copy_(tensor.reshape(-1))

    def _quantised(self, slot: ParameterSlot, value: torch.Tensor) -> tuple[torch.Tensor, ...]:
        value = value.detach().contiguous()
        if not _is_quantised(slot):
            return (value,)
        kernels = _kernels()
        if self.frozen_dtype == "int8":
            codes, scales, _ = kernels.int8_vectorwise_quant(value.reshape(-1, slot.shape[-1]).to(torch.float16))
            return codes, scales
        codes, state = kernels.quantize_4bit(value, blocksize=_BLOCK, compress_statistics=True, quant_type="nf4")
        return codes, state.absmax, state.state2.absmax, state.offset

    def dequantise(self, stored: torch.Tensor) -> torch.Tensor:
        """The weights as a new flat tensor of the compute type, on the device of `stored`."""
        dtype = getattr(torch, self.compute_dtype)
        flat = torch.zeros(self.num_elements, dtype=dtype, device=stored.device)
        for slot in self.parameters:
            tensors = [stored[part.start : part.stop].view(part.dtype) for part in self._parts[slot.name]]
            flat[slot.start : slot.stop] = self._dequantised(slot, tensors, dtype).reshape(-1)
        return flat

    def _dequantised(self, slot: ParameterSlot, tensors: list[torch.Tensor], dtype: torch.dtype) -> torch.Tensor:
        if not _is_quantised(slot):
            return tensors[0]
        kernels = _kernels()
        if self.frozen_dtype == "int8":
            result: torch.Tensor = kernels.int8_vectorwise_dequant(tensors[0].view(-1, slot.shape[-1]), tensors[1])
            return result.to(dtype)
        codes, scales, scales_of_scales, mean_scale = tensors
        nested = kernels.QuantState(
            absmax=scales_of_scales, code=_scale_code(codes.device), blocksize=_SCALE_BLOCK, dtype=torch.float32
        )
        state = kernels.QuantState(
            absmax=scales,
            shape=torch.Size(slot.shape),
            code=_nf4_code(codes.device),
            blocksize=_BLOCK,
            quant_type="nf4",
            dtype=dtype,
            offset=mean_scale[0],
            state2=nested,
        )
        weights: torch.Tensor = kernels.dequantize_4bit(codes.view(-1, 1), state)
        return weights


@functools.cache
def _scale_code(device: torch.device) -> torch.Tensor:
    code: torch.Tensor = _kernels().create_dynamic_map()
    return code.to(device)


@functools.cache
def _nf4_code(device: torch.device) -> torch.Tensor:
    code: torch.Tensor = _kernels().get_4bit_type("nf4", device=device)
    return code
