"""What tells one model's architecture from another's."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from transformers import LlamaConfig

import fuyou
from fuyou.architecture import differences, fingerprint
from io_engine import StoreError
from tests.tiny_models import tiny_model_config


def described(**config: Any) -> dict[str, Any]:
    return {"model": "M", "config": {"model_type": "m", "hidden_size": 8, **config}}


@pytest.mark.parametrize(
    ("description", "said"),
    [
        (described(), ""),
        (described(dtype="float32", transformers_version="1", _private=3), ""),
        (described(hidden_size=9), "; hidden_size is 9 there and 8 here"),
        (described(scale=True), "; scale is true there and not set here"),
        (described(rope={"theta": 2.5}), "; rope.theta is 2.5 there and not set here"),
        (
            described(layers=["full"] * 30),
            f"; layers is {json.dumps(['full'] * 30)[:57]}... there and not set here",
        ),
        (described(a=1, b=1, c=1, d=1), "c is 1 there and not set here, and 1 more differs"),
        (described(a=1, b=1, c=1, d=1, e=1), ", and 2 more differ"),
        ({**described(hidden_size=9), "model": "N"}, ""),
        ({"model": "M"}, ""),
        ({"model": "M", "config": [3]}, ""),
        ([], ""),
    ],
)
def test_the_first_settings_that_differ_are_named(description: Any, said: str) -> None:
    """Those in which a fingerprint cannot differ are not."""
    found = differences(description, described()["config"], "M")
    assert found == "" if not said else said in found


def test_a_deep_description_is_no_error() -> None:
    deep: Any = 1
    for _ in range(500):
        deep = {"a": deep}
    assert "a.a.a.a" in differences(described(a=deep), described()["config"], "M")


def test_the_class_and_the_shape_make_the_fingerprint() -> None:
    config = LlamaConfig(hidden_size=64)
    assert fingerprint(config, "A") == fingerprint(LlamaConfig(hidden_size=64, dtype="float32"), "A")
    assert len({fingerprint(config, "A"), fingerprint(config, "B"), fingerprint(LlamaConfig(hidden_size=32), "A")}) == 3


def test_what_belongs_to_another_model_says_in_which_setting(tmp_path: Path) -> None:
    """Of a run's store and of a base; numbers that JSON lacks are no difference."""

    def open_model(config: Any, **stores: Path) -> None:
        offload = fuyou.OffloadConfig(**stores, device="cpu", host_memory="64MiB")  # type: ignore[arg-type]
        fuyou.from_config(config, offload=offload, trainable=() if "base" in stores else None).fuyou.close()

    ours, theirs = tiny_model_config("llama"), tiny_model_config("llama")
    theirs.rope_parameters = {"rope_type": "default", "rope_theta": 5e5}
    ours.odd = theirs.odd = float("inf")
    open_model(theirs, store=tmp_path / "run")
    open_model(theirs, store=tmp_path / "other", base=tmp_path / "base")
    said = r"; rope_parameters\.rope_theta is 500000\.0 there and 10000\.0 here: name"
    with pytest.raises(StoreError, match=rf"not to this LlamaForCausalLM{said} another directory"):
        open_model(ours, store=tmp_path / "run")
    with pytest.raises(StoreError, match=rf"not this LlamaForCausalLM{said} this model's base"):
        open_model(ours, store=tmp_path / "third", base=tmp_path / "base")
