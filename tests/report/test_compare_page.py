"""The page that compares conversions: complete, alone, safe for any name, and at work in a real browser."""

from __future__ import annotations

import re
import struct
import zlib

import pytest

from lowbit.errors import WriteError
from lowbit.report.compare import (
    CompareCandidate,
    CompareLayer,
    ComparePage,
    ErrorCounts,
    compare_html,
    write_compare,
)
from lowbit.report.compare_charts import Point, frontier, histogram_bars
from lowbit.report.end_to_end import BlockError, EndToEnd
from tests.support.browser import Browser, find_browser
from tests.support.pages import assert_sound

INF = float("inf")


def layer(candidate, block, sqnr=21.5, kind="attn.q", **more):
    """One layer."""
    values = {
        "candidate": candidate,
        "name": f"blocks.{block}.{kind}",
        "kind": f"blocks.*.{kind}",
        "block": f"blocks.{block}",
        "format": "nvfp4",
        "status": "quantized",
        "shape": (64, 128),
        "bytes": 4608 + block,
        "sqnr": sqnr,
        "output_sqnr": None,
        "gain": 1.25,
        "cosine": 0.9964,
        "worst_row": 0.125,
        "flips": 0.4,
        "at_ends": 0.0625,
        "saturated": 0.001,
    }
    return CompareLayer(**{**values, **more})


def candidate(name, count, sqnr, error=None, **more):
    """One candidate; with an `error` the model was run."""
    run = None
    if error is not None:
        blocks = [BlockError(f"blocks.{i}", error * (i + 1), error) for i in range(3)]
        run = EndToEnd("embeddings", {"mean 1 - cosine": error, "max 1 - cosine": 4 * error}, 48, blocks)
    values = {"output_sqnr": None, "gain": 1.25, "flips": 0.4, "at_ends": 0.06, "saturated": 0.0, "run": run}
    return CompareCandidate(name, f"{name}.safetensors", count, sqnr, **{**values, **more})


def page(candidates, layers, **more):
    """A page."""
    values = {"reference": "m.safetensors", "reference_bytes": 40_000_000, "problems": [], "command": "lowbit compare"}
    return ComparePage(candidates=candidates, layers=layers, **{**values, **more})


def full_page():
    """Two candidates with blocks, an end-to-end run, errors of weights, and one layer of every status."""
    counts = ErrorCounts([0] * 15 + [3, 9, 20, 30, 40, 50, 40, 30, 20, 9, 3] + [0] * 15, 0.1, 2, 2.5, 0.27)
    layers = [layer("four", b, 20 + b, kind, errors=counts) for b in range(3) for kind in ("attn.q", "mlp.up")]
    layers += [
        layer("eight", 0, 38, format="int8", gain=0.0, flips=0.0),
        layer("eight", 1, 9.5, format="int8", gain=-0.5),
        layer("eight", 2, INF, format="bfloat16", status="kept", gain=None, flips=None, at_ends=None, saturated=None),
        layer("eight", 0, 40, "mlp.up", format="int8"),
        layer("eight", 1, 33, "mlp.up", format="bfloat16", status="changed", gain=None, at_ends=None, saturated=None),
        layer("eight", 2, float("nan"), "mlp.up", format="int8", gain=None, cosine=float("nan"), worst_row=INF),
    ]
    made = [candidate("four", 6_000_000, 21.5, 0.02), candidate("eight", 11_000_000, 38.0, 0.003)]
    return page(made, layers, problems=["eight: blocks.1.mlp.up: was kept, but differs (33.00 dB)"])


def test_every_section_is_there_and_sound():
    """Candidates, both frontiers, depth, types, the table and the histograms are on the page, and it is well-formed."""
    text = compare_html(full_page())

    assert_sound(text, scripts=True)
    for heading in ("Candidates", "Size against quality", "By depth", "By type of layer", "All layers", "1 problem"):
        assert f"<h2>{heading}</h2>" in text
    assert text.count("<tr data-name=") == 12
    assert "mean 1 - cosine, end to end" in text
    assert text.count("steps, ") == 6  # histograms with something beyond two steps


@pytest.mark.parametrize(
    "made",
    [
        page([], []),
        page([candidate("one", 1, INF)], [layer("one", 0, INF, status="kept", gain=None)]),
        page([candidate("one", 1, float("nan"))], [layer("one", 0, float("nan"), cosine=float("nan"))]),
        page([candidate("one", 1, 20.0, float("nan"))], [layer("one", 0, 20.0)]),
        page([candidate("one", 1, 20.0, 0.0)], [layer("one", 0, 20.0, output_sqnr=25.0), layer("one", 1, 20.0)]),
    ],
)
def test_odd_results_still_make_a_page(made):
    """No candidates, nothing quantized, NaN, an exact model, and statistics for some layers only: no page breaks."""
    assert_sound(compare_html(made), scripts=True)


def test_names_cannot_become_markup():
    """A layer, candidate or problem named like a tag stays text, in attributes too."""
    evil = '"><script>alert(1)</script>'
    text = compare_html(page([candidate(evil, 5, 20.0)], [layer(evil, 0, name=evil, kind=evil)], problems=[evil]))

    assert "<script>alert" not in text
    assert text.count("<script>") == 1


def test_the_frontier_is_what_nothing_beats():
    """Larger and worse points are off the line; errors are turned so that less is higher."""
    points = [Point("a", 10, 20, ""), Point("b", 20, 30, ""), Point("c", 21, 25, ""), Point("d", 10.1, 19, "")]
    colours = dict.fromkeys("abcd", 1)

    plain = {p["name"]: p for p in frontier(points, colours)["points"]}
    errors = {p["name"]: p for p in frontier(points, colours, log=True)["points"]}

    assert [name for name, p in plain.items() if p["large"]] == ["a", "b"]
    assert [name for name, p in errors.items() if p["large"]] == ["d"]
    assert plain["b"]["y"] < plain["c"]["y"] < plain["a"]["y"]
    assert errors["b"]["y"] > errors["c"]["y"] > errors["a"]["y"]


def test_bars_are_in_the_middle_of_their_bins():
    """The middle bin stands around zero, between the marks of half a step."""
    bars = histogram_bars(ErrorCounts([0] * 20 + [7] + [0] * 20, 0.1, 7, 3.0, 0.1))

    (x, width, height), (low, high) = bars["bars"][0], bars["half"]
    assert height == bars["height"]
    assert low < x < 50 < x + width < high
    assert (low + high) / 2 == pytest.approx(50, abs=1e-3)
    assert bars["outside"] == 0.5


def test_a_place_that_cannot_be_written_is_named(tmp_path):
    """Writing into a folder that does not exist is an error with the path."""
    with pytest.raises(WriteError, match="nowhere"):
        write_compare(tmp_path / "nowhere" / "page.html", full_page())


# ---- in a browser ---------------------------------------------------------------------------------------------------


@pytest.fixture
def browser():
    """A headless Chromium."""
    path = find_browser()
    if path is None:
        pytest.skip("no Chromium (chromium, chromium-browser or google-chrome) on the path")
    with Browser(path) as found:
        yield found


def first_pixel(png):
    """Size and red, green, blue of the upper left pixel: of a PNG's first one, every filter gives the plain value."""
    assert png.startswith(b"\x89PNG\r\n")
    width, height, depth, kind = struct.unpack(">IIBB", png[16:26])
    assert (depth, kind) in {(8, 2), (8, 6)}
    data, at = b"", 8
    while at < len(png):
        (size,), name = struct.unpack(">I", png[at : at + 4]), png[at + 4 : at + 8]
        data += png[at + 8 : at + 8 + size] if name == b"IDAT" else b""
        at += 12 + size
    return (width, height), tuple(zlib.decompress(data)[1:4])


SHOWN = "[...document.querySelectorAll('#layers tbody tr:not([hidden])')]"


def column(browser, index):
    """The texts of a column of the rows that are shown."""
    return browser.run(f"{SHOWN}.map(row => row.cells[{index}].innerText.trim())")


def choose(browser, name, value):
    """Choose in a list as a user does."""
    browser.run(
        f"(e => {{ e.value = '{value}'; e.dispatchEvent(new Event('change')); }})(document.getElementById('{name}'))"
    )


def test_it_sorts_filters_and_shows_itself_in_a_browser(browser, tmp_path):
    """A click sorts by number and another turns the order, typing filters, the screenshot is light or dark."""
    write_compare(tmp_path / "page.html", full_page())
    browser.open(tmp_path / "page.html")
    assert column(browser, 5)[:3] == ["NaN", "9.5 dB", "20.0 dB"]

    browser.click("#layers th button", 5)  # weight SQNR
    up = column(browser, 5)
    browser.click("#layers th button", 5)
    down = column(browser, 5)
    assert up[:2] == ["9.5 dB", "20.0 dB"]
    assert up[-2:] == ["exact", "NaN"]  # NaN is last both ways
    assert (down[0], down[1], down[-1]) == ("exact", "40.0 dB", "NaN")
    assert browser.run("document.querySelector('[aria-sort]').ariaSort") == "descending"
    browser.click("#layers th button", 0)  # names: 2 before 10
    assert column(browser, 0) == sorted(column(browser, 0))

    browser.click("#filter")
    browser.type("MLP")
    assert len(column(browser, 0)) == 6
    assert all("mlp" in name for name in column(browser, 0))
    assert browser.run("document.getElementById('count').textContent") == "6 of 12"
    choose(browser, "candidate", "eight")
    choose(browser, "status", "changed")
    assert column(browser, 0) == ["blocks.1.mlp.up changed"]
    browser.run("document.getElementById('filter').value = ''")
    choose(browser, "status", "worse")
    assert column(browser, 0) == ["blocks.1.attn.q"]
    choose(browser, "status", "")
    choose(browser, "candidate", "")
    browser.click("button.kind", 0)
    assert len(column(browser, 0)) == 6

    backgrounds = {}
    for scheme in ("light", "dark"):
        browser.colours(scheme)
        size, backgrounds[scheme] = first_pixel(browser.screenshot(whole=True))
        assert size[0] == 1200
        assert size[1] > 1500
    assert backgrounds == {"light": (0xF4, 0xF4, 0xF1), "dark": (0x11, 0x11, 0x10)}

    browser.resize(390, 800)
    assert browser.run("document.documentElement.scrollWidth") == 390
    wrong = {"Runtime.exceptionThrown", "Log.entryAdded"}
    assert [event for event in browser.events if event["method"] in wrong] == []
    asked = [e["params"]["request"]["url"] for e in browser.events if e["method"] == "Network.requestWillBeSent"]
    assert all(url.startswith("file:") for url in asked)


def test_layers_without_statistics_are_apart():
    """SQNRs of weights stand in a picture of their own, whose heading says so, not among those of outputs."""
    layers = [layer("four", b, 5.25 + b, "mlp.up") for b in range(3)]
    layers += [layer("four", b, 30 + b, output_sqnr=12.0 + b) for b in range(3)]
    text = compare_html(page([candidate("four", 10_000_000, 20, output_sqnr=13.0)], layers))
    outputs, _, weights = text.partition("Weight SQNR of the layers without statistics, dB")

    assert_sound(text, scripts=True)
    assert "without 3 that the statistics lack" in outputs
    assert "four, blocks.0.attn.q: 12.00 dB" in outputs
    assert "up: 5.25 dB" not in outputs
    assert "four, blocks.0.mlp.up: 5.25 dB" in weights
    assert "four, blocks.1: 13.0 dB" in outputs.partition("By depth")[2]
    rows = re.findall(r'<tr data-name="([^"]+)"', text)
    assert rows == [*(f"blocks.{b}.attn.q" for b in range(3)), *(f"blocks.{b}.mlp.up" for b in range(3))]
    assert "Weight SQNR of the layers without" not in compare_html(full_page())
