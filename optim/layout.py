"""How one shard's numbers lie on the drive: which parameter where, cut into chunks that move as one.

A shard is the parameters of one block of a model, one behind the other, each starting at a multiple of 64
elements (of 256 with int8 moments, so that a block of them never holds parts of two parameters). It owns two
extents: `<shard>/weight` (bfloat16 high halves, or the float32 master) and, if it is trained, `<shard>/state`:
one record per chunk of `chunk_elements` elements, each record [low halves | m | v | scales of m | scales of v],
rounded up to 4,096 bytes. Only bfloat16 compute has low halves, only int8 moments have scales.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import numpy.typing as npt

from io_engine import ALIGNMENT_BYTES, round_up
from optim.kernels import MOMENT_BLOCK_ELEMENTS

ELEMENT_ALIGNMENT = 64
"""Parameters start at multiples of this many elements: whole vector registers, whole cache lines."""

_MOMENT_BYTES = {"float32": 4, "bfloat16": 2, "int8": 1}

_CHUNK_MULTIPLE = ALIGNMENT_BYTES // 2  # elements of 2 bytes in a page

DEFAULT_CHUNK_ELEMENTS = 2 * 2**20
"""Records of 20 MiB: large enough for full drive bandwidth, small enough for a ring of them in any budget."""


@dataclasses.dataclass(frozen=True)
class ParameterSlot:
    """Where one parameter lies in its shard."""

    name: str
    shape: tuple[int, ...]
    start: int
    """First element, a multiple of 64."""
    num_elements: int

    @property
    def stop(self) -> int:
        """First element behind the parameter (padding not counted)."""
        return self.start + self.num_elements


@dataclasses.dataclass(frozen=True)
class ChunkViews:
    """One record in host memory, as flat arrays of the chunk's elements that share the record's memory."""

    low: npt.NDArray[np.uint16] | None
    m: npt.NDArray[Any]
    """float32; bfloat16 as uint16 bits; int8 codes."""
    v: npt.NDArray[Any]
    """float32; bfloat16 as uint16 bits; uint8 codes."""
    m_scales: npt.NDArray[np.float32] | None
    """One for each 256 elements of int8 moments, else None; v_scales alike."""
    v_scales: npt.NDArray[np.float32] | None

    def part(self, start: int, stop: int) -> ChunkViews:
        """Elements `start` to `stop` of the chunk; with int8 moments `start` must be a multiple of 256."""
        blocks = slice(start // MOMENT_BLOCK_ELEMENTS, _num_blocks(stop))
        return ChunkViews(
            None if self.low is None else self.low[start:stop],
            self.m[start:stop],
            self.v[start:stop],
            None if self.m_scales is None else self.m_scales[blocks],
            None if self.v_scales is None else self.v_scales[blocks],
        )


@dataclasses.dataclass(frozen=True)
class ShardLayout:
    """The layout of one shard; everything in it follows from parameters, data type and chunk size.

    ValueError for a data type or chunk size that it cannot have, and for a shard without elements.
    """

    name: str
    parameters: tuple[ParameterSlot, ...]
    compute_dtype: str
    """"bfloat16" or "float32"."""
    chunk_elements: int = DEFAULT_CHUNK_ELEMENTS
    """Elements of a record, a multiple of 2,048, so that every chunk of every extent starts at a page."""
    moment_dtype: str = "float32"
    """"float32", "bfloat16" or "int8": see `optim.kernels`."""

    def __post_init__(self) -> None:
        if self.moment_dtype not in _MOMENT_BYTES:
            raise ValueError(
                f"moment_dtype={self.moment_dtype!r} of shard {self.name!r} must be one of {', '.join(_MOMENT_BYTES)}"
            )
        if self.compute_dtype not in ("bfloat16", "float32"):
            raise ValueError(
                f'compute_dtype={self.compute_dtype!r} of shard {self.name!r} must be "bfloat16" or "float32"'
            )
        if self.chunk_elements <= 0 or self.chunk_elements % _CHUNK_MULTIPLE:
            raise ValueError(
                f"chunk_elements={self.chunk_elements} of shard {self.name!r} must be a positive multiple of "
                f"{_CHUNK_MULTIPLE}: chunks start at pages of {ALIGNMENT_BYTES} bytes"
            )
        if self.num_parameters == 0:
            raise ValueError(f"shard {self.name!r} has no elements: leave it out")

    @classmethod
    def of(
        cls,
        name: str,
        shapes: dict[str, tuple[int, ...]],
        compute_dtype: str,
        chunk_elements: int = DEFAULT_CHUNK_ELEMENTS,
        moment_dtype: str = "float32",
    ) -> ShardLayout:
        """Lay the named parameters out one behind the other, in the order given."""
        slots, start = [], 0
        alignment = MOMENT_BLOCK_ELEMENTS if moment_dtype == "int8" else ELEMENT_ALIGNMENT
        for parameter, shape in shapes.items():
            num_elements = int(np.prod(shape, dtype=np.int64)) if shape else 1
            slots.append(ParameterSlot(parameter, tuple(int(n) for n in shape), start, num_elements))
            start = round_up(start + num_elements, alignment)
        return cls(name, tuple(slots), compute_dtype, chunk_elements, moment_dtype)

    @property
    def weight_name(self) -> str:
        """Name of the weight extent."""
        return f"{self.name}/weight"

    @property
    def state_name(self) -> str:
        """Name of the state extent."""
        return f"{self.name}/state"

    @property
    def num_elements(self) -> int:
        """Elements with padding, a multiple of 64."""
        last = self.parameters[-1]
        return round_up(last.stop, ELEMENT_ALIGNMENT)

    @property
    def num_parameters(self) -> int:
        """Elements without padding."""
        return sum(p.num_elements for p in self.parameters)

    @property
    def weight_itemsize(self) -> int:
        """Bytes of one stored weight."""
        return 2 if self.compute_dtype == "bfloat16" else 4

    @property
    def weight_bytes(self) -> int:
        """Bytes of the weight extent, a multiple of 4,096."""
        return round_up(self.num_elements * self.weight_itemsize, ALIGNMENT_BYTES)

    @property
    def gradient_bytes(self) -> int:
        """Bytes of the shard's float32 gradient, a multiple of 4,096."""
        return round_up(self.num_elements * 4, ALIGNMENT_BYTES)

    @property
    def num_chunks(self) -> int:
        """Records in the state extent."""
        return -(-self.num_elements // self.chunk_elements)

    def chunk_range(self, chunk: int) -> tuple[int, int]:
        """First element of a chunk and first element behind it."""
        start = chunk * self.chunk_elements
        return start, min(start + self.chunk_elements, self.num_elements)

    def _record_bytes(self, num_elements: int) -> int:
        low_bytes = 2 * num_elements if self.compute_dtype == "bfloat16" else 0
        moment_bytes = 2 * _MOMENT_BYTES[self.moment_dtype] * num_elements
        scale_bytes = 2 * 4 * _num_blocks(num_elements) if self.moment_dtype == "int8" else 0
        return round_up(low_bytes + moment_bytes + scale_bytes, ALIGNMENT_BYTES)

    @property
    def full_record_bytes(self) -> int:
        """Bytes of every record but the last, which may be shorter."""
        return self._record_bytes(min(self.chunk_elements, self.num_elements))

    @property
    def state_bytes(self) -> int:
        """Bytes of the state extent, a multiple of 4,096."""
        start, stop = self.chunk_range(self.num_chunks - 1)
        return (self.num_chunks - 1) * self.full_record_bytes + self._record_bytes(stop - start)

    def state_range(self, chunk: int) -> tuple[int, int]:
        """Byte offset and bytes of a record in the state extent."""
        start, stop = self.chunk_range(chunk)
        return chunk * self.full_record_bytes, self._record_bytes(stop - start)

    def weight_range(self, chunk: int) -> tuple[int, int]:
        """Byte offset and bytes of a chunk in the weight extent."""
        start, stop = self.chunk_range(chunk)
        return start * self.weight_itemsize, round_up((stop - start) * self.weight_itemsize, ALIGNMENT_BYTES)

    def gradient_range(self, chunk: int, dtype: type[np.generic] = np.float32) -> tuple[int, int]:
        """Byte offset and bytes of a chunk in the gradient."""
        start, stop = self.chunk_range(chunk)
        itemsize = np.dtype(dtype).itemsize
        return start * itemsize, round_up((stop - start) * itemsize, ALIGNMENT_BYTES)

    @property
    def weight_piece_bytes(self) -> int:
        """Bytes of weight that one checksum digest covers."""
        return self.weight_range(0)[1]

    def views(self, record: npt.NDArray[np.uint8], chunk: int) -> ChunkViews:
        """The arrays of a record that was read into `record` (uint8, at least the record's bytes)."""
        start, stop = self.chunk_range(chunk)
        n, end = stop - start, 0

        def take(count: int, dtype: type[np.generic]) -> npt.NDArray[Any]:
            nonlocal end
            begin, end = end, end + count * np.dtype(dtype).itemsize
            return record[begin:end].view(dtype)

        low = take(n, np.uint16) if self.compute_dtype == "bfloat16" else None
        if self.moment_dtype == "float32":
            return ChunkViews(low, take(n, np.float32), take(n, np.float32), None, None)
        if self.moment_dtype == "bfloat16":
            return ChunkViews(low, take(n, np.uint16), take(n, np.uint16), None, None)
        blocks = _num_blocks(n)
        return ChunkViews(low, take(n, np.int8), take(n, np.uint8), take(blocks, np.float32), take(blocks, np.float32))

    def to_json(self) -> dict[str, Any]:
        """The layout as JSON, the form in which a store keeps it."""
        return dataclasses.asdict(self)

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> ShardLayout:
        """The layout that `to_json` described."""
        slots = tuple(
            ParameterSlot(p["name"], tuple(p["shape"]), p["start"], p["num_elements"]) for p in data["parameters"]
        )
        # Stores made before there were other moments than float32 name none.
        moment_dtype = data.get("moment_dtype", "float32")
        return cls(data["name"], slots, data["compute_dtype"], data["chunk_elements"], moment_dtype)


def _num_blocks(num_elements: int) -> int:
    return -(-num_elements // MOMENT_BLOCK_ELEMENTS)
