"""What notebooks show: well-formed, escaped, every lane with its share."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from xml.etree import ElementTree

import pytest

import fuyou
from fuyou.html import COLOURS, lanes_picture, table
from fuyou.simulator import SimulatedSpan, SimulatedStep
from fuyou.trace import LANES, Trace
from tests.tiny_models import tiny_model_config

SVG = "{http://www.w3.org/2000/svg}"


def parsed(text: str) -> ElementTree.Element:
    """Fails where a tag is not closed, or a name breaks one open."""
    return ElementTree.fromstring(f"<div>{text}</div>")


def lane_texts(root: ElementTree.Element) -> list[str | None]:
    """Names and shares of the lanes, without what belongs to the axis."""
    return [text.text for text in root.findall(f"{SVG}svg/{SVG}text")]


def axis_texts(root: ElementTree.Element) -> list[str | None]:
    return [text.text for text in root.findall(f"{SVG}svg/{SVG}g[@class='axis']/{SVG}text")]


def test_cells_are_text() -> None:
    cells = [cell.text for cell in parsed(table(["a", "<b>"], [[1, "x < y & z"]])).iter() if cell.text]
    assert cells == ["a", "<b>", "1", "x < y & z"]


def test_the_contents_of_a_store(tmp_path: Path) -> None:
    offload = fuyou.OffloadConfig(store=tmp_path / "store", device="cpu", compute_dtype="float32", host_memory="64MiB")
    with fuyou.from_config(tiny_model_config("llama"), offload=offload, seed=0).fuyou:
        pass
    found = fuyou.inspect_store(tmp_path / "store")
    assert json.loads(json.dumps(found)) == found
    cells = [cell.text for cell in parsed(found._repr_html_()).iter("td")]
    assert cells[:2] == ["directories", str(tmp_path / "store")]
    assert {shard["name"] for shard in found["shards"]} <= set(cells)
    assert format(found["num_parameters"], ",") in cells


def test_every_lane_has_a_colour() -> None:
    assert set(LANES) <= set(COLOURS)


def test_lanes_lie_where_their_spans_are() -> None:
    spans = {"cpu": [(3.0, 4.0, "late")], "gpu": [(0.0, 1.0, "a <b>"), (2.0, 4.0, "c")]}
    root = parsed(lanes_picture("step 3", 4.0, spans, {"gpu": 3.0, "cpu": 1.0}))
    assert "".join(root.itertext()).startswith("step 3: 4.000 s")
    assert lane_texts(root) == ["gpu", "75%", "cpu", "25%"]
    assert axis_texts(root) == ["busy", "0 s", "0.5 s", "1 s", "1.5 s", "2 s", "2.5 s", "3 s", "3.5 s"]
    gpu_first, gpu_second, cpu = [
        (float(bar.get("x", "")), float(bar.get("width", "")), float(bar.get("y", "")))
        for bar in root.iter(f"{SVG}rect")
    ]
    assert gpu_first[1] * 2 == gpu_second[1] == 2 * cpu[1]
    assert gpu_first[0] + gpu_first[1] * 2 == gpu_second[0]
    assert cpu[0] + cpu[1] == gpu_second[0] + gpu_second[1]
    assert cpu[2] > gpu_first[2]


def test_thousands_of_spans_are_drawn_as_what_the_eye_can_tell_apart() -> None:
    spans = {"ssd_read": [(i / 1e4, (i + 1) / 1e4, f"read {i}") for i in range(10_000) if i % 1000]}
    root = parsed(lanes_picture("x", 1.0, spans, {}))
    assert len(list(root.iter(f"{SVG}rect"))) <= 10
    assert next(t.text for t in root.iter(f"{SVG}title")) == "read 1, ...: 0.000 s to 1.000 s"


def test_a_trace_shows_its_last_step() -> None:
    trace = Trace()
    assert trace._repr_html_() == "no step was taken yet"
    trace.record("gpu", "forward", 9.0, 11.0)
    trace.end_step(1, 10.0, 12.0)
    trace.record("ssd_read", "weights", 12.0, 13.0)
    trace.end_step(2, 12.0, 14.0)
    assert trace._repr_html_() == trace.steps[-1]._repr_html_()
    assert lane_texts(parsed(trace._repr_html_())) == ["ssd_read", "50%"]
    began_before = parsed(trace.steps[0]._repr_html_())
    assert [t.text for t in began_before.iter(f"{SVG}title")] == ["forward: 0.000 s to 1.000 s"]


def test_a_simulated_step_looks_the_same() -> None:
    step = SimulatedStep(2.0, {"gpu": 1.0}, (SimulatedSpan("gpu", "forward", 0.0, 1.0),))
    assert lane_texts(parsed(step._repr_html_())) == ["gpu", "50%"]


def test_waiting_has_its_share() -> None:
    trace = Trace()
    trace.record("gpu", "forward", 0.0, 1.0)
    trace.record("wait", "weights", 1.0, 2.0)
    assert lane_texts(parsed(trace.end_step(1, 0.0, 4.0)._repr_html_())) == ["gpu", "25%", "wait", "25%"]


@pytest.mark.parametrize("seconds", [0.0, 3e-4, 0.0123, 0.911, 1.0, 2.195, 9.99, 33.0, 7200.0])
def test_an_axis_for_any_length_is_readable(seconds: float) -> None:
    """A few round numbers from 0 on, apart from each other and from the column of shares."""
    root = parsed(lanes_picture("step 1", seconds, {"gpu": [(0.0, seconds, "a")] if seconds else []}, {"gpu": seconds}))
    axis = root.findall(f"{SVG}svg/{SVG}g/{SVG}text")
    places = [(float(text.get("x", "")), len(text.text or "")) for text in axis]
    busy, *ticks = places
    assert len(ticks) in (range(3, 11) if seconds else range(1))
    width = 8  # pixels of a letter, rounded up
    for (left, length), (right, other) in itertools.pairwise(ticks):
        assert right - left > (length + other) / 2 * width
    if ticks:
        assert busy[0] - ticks[-1][0] > ticks[-1][1] / 2 * width
        assert (axis[1].text, float(ticks[0][0])) == ("0 s", 90.0)


def test_headers_stand_above_their_cells() -> None:
    """Notebooks align both to the right where nothing is said."""
    root = parsed(table(["a", "b"], [[1, "long"]]))
    assert {cell.get("style") for tag in ("th", "td") for cell in root.iter(tag)} == {"text-align:left"}
