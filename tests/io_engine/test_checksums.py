"""Checksums against digests published by others, and against the definition spelled out by hand."""

from __future__ import annotations

import struct
import threading

import numpy as np
import pytest
import xxhash

from io_engine import checksum, combine_checksums, piece_digest
from io_engine.checksums import listed_digests
from tests.io_engine.helpers import pattern


def test_the_digest_is_xxh3_64_with_seed_0() -> None:
    # The empty input's digest as in xxHash's own test vectors.
    assert piece_digest(np.zeros(0, np.uint8)) == 0x2D06800538D394C2
    assert checksum(np.zeros(0, np.uint8)) == "xxh3:2d06800538d394c2"


@pytest.mark.parametrize("num_bytes", [1, 1000, 4096, 100_001])
def test_the_checksum_is_over_all_bytes(num_bytes: int) -> None:
    data = pattern(num_bytes, seed=num_bytes)
    assert checksum(data) == "xxh3:" + xxhash.xxh3_64(data.tobytes()).hexdigest()
    changed = data.copy()
    changed[-1] ^= 1
    assert checksum(changed) != checksum(data)


def test_the_digests_of_pieces_are_listed() -> None:
    data = pattern(10_000, seed=3)
    digests = [piece_digest(data[begin : begin + 4096]) for begin in range(0, 10_000, 4096)]
    assert digests == [xxhash.xxh3_64_intdigest(data.tobytes()[begin : begin + 4096]) for begin in (0, 4096, 8192)]
    by_hand = struct.pack(">3Q", *digests).hex()
    assert combine_checksums(digests) == f"xxh3-list:{by_hand}"
    assert listed_digests(combine_checksums(digests)) == tuple(digests)
    assert combine_checksums(digests[::-1]) != combine_checksums(digests)


def test_the_largest_digest_fits() -> None:
    assert combine_checksums([2**64 - 1]) == "xxh3-list:ffffffffffffffff"
    assert listed_digests("xxh3:00000000000000ff") == (255,)


def test_the_earlier_form_lists_none() -> None:
    assert listed_digests("xxh3-pieces:0123456789abcdef") is None


@pytest.mark.parametrize(
    "text", ["", "crc:1", "xxh3:", "xxh3:0123", "xxh3:" + 32 * "0", "xxh3-list:" + 24 * "0", "xxh3-list:" + 16 * "G"]
)
def test_what_is_no_checksum(text: str) -> None:
    with pytest.raises(ValueError, match="checksum"):
        listed_digests(text)


def test_hashing_lets_other_threads_run() -> None:
    """The GIL is released: while one thread hashes, this one counts; held, it would count next to nothing."""
    data = np.ones(256 << 20, np.uint8)
    digests: list[int] = []
    thread = threading.Thread(target=lambda: digests.extend(piece_digest(data) for _ in range(4)))
    num_turns = 0
    thread.start()
    while thread.is_alive():
        num_turns += 1
    thread.join()
    assert len(set(digests)) == 1
    assert num_turns > 100


def test_strided_arrays_are_refused() -> None:
    with pytest.raises((BufferError, ValueError)):
        piece_digest(np.zeros(100, np.uint8)[::2])
