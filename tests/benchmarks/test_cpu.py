"""The CPU benchmark: what it refuses, what it counts, what it writes, and the page made of that."""

import json
import sys
from pathlib import Path
from xml.etree import ElementTree as ET

import pytest
import torch

from benchmarks import cpu, cpu_codecs, cpu_linears, cpu_machine, cpu_timing
from benchmarks.cpu_linears import MORE, SPECS, W4A8, Drawn, WrongResultError, copies_for, ours
from benchmarks.cpu_peers import peers

N, K = 256, 512
CACHE = 1 << 16


@pytest.fixture
def docs_cpu(monkeypatch):
    """scripts/docs_cpu.py, which imports its neighbours by their bare names."""
    monkeypatch.syspath_prepend(str(Path(__file__).parents[2] / "scripts"))
    monkeypatch.delitem(sys.modules, "docs_cpu", raising=False)
    import docs_cpu

    return docs_cpu


@pytest.mark.parametrize("spec", [*SPECS, *MORE])
def test_every_format_passes_its_own_check(spec):
    """The chosen kernel's result is right, for one token and for some, with every copy of the weight."""
    entry, _ = ours(spec, N, K, CACHE)
    for tokens in (1, 3):
        x = entry.input(torch.randn(tokens, K).bfloat16())
        for weight in entry.weights:
            assert entry.check(x, entry.run(x, weight)) < 0.2


@pytest.mark.parametrize("spec", ["awq_w4a16", "int8", W4A8, "svdquant_w4a4"])
def test_a_wrong_result_is_refused(spec):
    """Two columns exchanged, one value that is not finite, or everything 3 % too large: nothing is reported."""
    entry, _ = ours(spec, N, K, CACHE)
    x = torch.randn(3, K).bfloat16()
    y = entry.run(x, entry.weights[0])
    swapped, broken = y.clone(), y.clone()
    swapped[:, [0, 1]] = y[:, [1, 0]]
    broken[0, 0] = torch.nan

    for wrong in (swapped, broken, y * 1.03, y[:, :-1]):
        with pytest.raises(WrongResultError, match="nothing is reported"):
            entry.check(x, wrong)


def test_peers_multiply_the_same_weights():
    """Every peer's result is near the product that it is checked with, and a wrong one is refused."""
    drawn = {spec: Drawn.make(cpu_linears.W4A8_FORMAT if spec == W4A8 else spec, N, K) for spec in SPECS}
    x = torch.randn(2, K).bfloat16()
    for peer in peers(drawn, N, K, CACHE, others=False):
        given = peer.input(x)
        y = peer.run(given, peer.weights[0])
        about = given if given.is_floating_point() else x
        peer.check(about, y)
        with pytest.raises(WrongResultError):
            peer.check(about, y * 2)


def test_other_packages_multiply_the_same_weights():
    """comfy-kitchen's functions get our codes in their order and give our products."""
    pytest.importorskip("comfy_kitchen")
    specs = ("awq_w4a16", "nvfp4", "mxfp8", "fp8_e4m3", "int8(rotation=256)", "svdquant_w4a4")
    found = peers({spec: Drawn.make(spec, N, K) for spec in specs}, N, K, CACHE)
    x = torch.randn(2, K).bfloat16()
    kitchen = [peer for peer in found if peer.name.startswith("comfy-kitchen")]

    assert {peer.of for peer in kitchen} == {(spec,) for spec in specs}
    for peer in kitchen:
        peer.check(x, peer.run(x, peer.weights[0]))


def test_no_cache_holds_the_copies():
    """At least two copies, and together some times the size of the last-level cache."""
    assert copies_for(1000, 10_000) * 1000 >= 3 * 10_000
    assert copies_for(1 << 30, 1 << 20) == 2
    assert cpu_machine.cache_bytes() >= 1 << 18


def test_bytes_are_those_of_the_stored_parts():
    """A weight counts with its scales: 4 bits and two bfloat16 in a group of 64 for awq_w4a16."""
    entry, drawn = ours("awq_w4a16", N, K, CACHE)

    assert entry.nbytes == sum(part.nbytes for part in entry.weights[0].part_list)
    assert drawn.weight.nbytes_stored() == N * K // 2 + N * K // 64 * 4


def test_a_drawn_weight_repeats_rows_in_no_order():
    """The reference of a weight made of few quantized rows is the float64 product of its own dequantized values."""
    drawn = Drawn.make("nvfp4", 2 * cpu_linears.DRAWN, 64)
    x = torch.randn(3, 64)

    product = x.double() @ drawn.weight.dequantize(torch.float32).double().t()

    torch.testing.assert_close(drawn.exact(x), product)
    assert (drawn.rows[1:] > drawn.rows[:-1]).any()
    assert (drawn.rows[1:] < drawn.rows[:-1]).any()


def test_a_forced_instruction_set_that_is_not_there_ends_the_run(monkeypatch, tmp_path):
    """The reason is said, and nothing is written."""
    monkeypatch.setenv("LOWBIT_CPU_ISA", "")
    monkeypatch.setattr(cpu.dispatch, "load", lambda _: "no such set")
    target = tmp_path / "cpu.json"

    with pytest.raises(SystemExit, match="--isa z80: no such set"):
        cpu.main(["--isa", "z80", "--json", str(target)])
    assert not target.exists()


def test_a_peer_that_takes_too_long_is_left_out_and_named(monkeypatch):
    """What fewer tokens say would take too long is not waited for; ours is measured whatever it takes."""
    monkeypatch.setattr(cpu_machine, "cache_bytes", lambda: CACHE)
    monkeypatch.setattr(cpu, "TOO_SLOW", 1e-9)

    first, second = cpu.measure_shape(
        f"{N}x{K}", (2, 1), ("nvfp4",), rounds=2, budget=0.0, others=False, read_mb=1
    )  # fmt: skip

    assert (first["tokens"], first["too_slow"], len(first["rows"])) == (1, {}, 3)
    assert [row["name"] for row in second["rows"]] == ["nvfp4"]
    assert set(second["too_slow"]) == {"bf16 F.linear", "float32 F.linear"}
    assert second["rows"][0]["ratios"] == {}


def test_results_and_the_page_that_is_made_of_them(tmp_path, monkeypatch, docs_cpu):
    """A run writes what the tables and the plot need; a second one keeps the sections that it does not measure."""
    monkeypatch.setattr(cpu, "CURVE", (1, 2))
    monkeypatch.setattr(cpu_timing, "VISIT", 1e-3)
    monkeypatch.setattr(cpu_machine, "cache_bytes", lambda: CACHE)  # few copies
    monkeypatch.setattr(cpu_codecs, "SPECS", ("int8",))
    monkeypatch.setattr(cpu_machine, "peaks", lambda _: {"float32": 100.0, "bfloat16": 1.0, "int8": 200.0})
    monkeypatch.setattr(cpu.torch, "set_num_threads", lambda _: None)
    target = tmp_path / "cpu.json"
    common = ["--quick", "--shapes", f"{N}x{K}", "--read-mb", "1", "--json", str(target)]
    cpu.main([*common, "--tokens", "1", "--formats", "int8", "awq_w4a16", "--sections", "linears", "codecs"])
    cpu.main([*common, "--formats", "awq_w4a16", "--sections", "curve"])
    result = json.loads(target.read_text())

    assert set(result) == {"linears", "codecs", "curve"}
    rows = {row["name"]: row for row in result["linears"]["groups"][0]["rows"]}
    assert set(rows["awq_w4a16"]["ratios"]) == {"bf16 F.linear", "float32 F.linear", "_weight_int4pack_mm_for_cpu"}
    assert rows["awq_w4a16"]["kernel"]["name"].endswith(("linear_awq_w4a16", "eager:linear"))
    assert rows["int8"]["gflop_s"] == pytest.approx(2 * N * K / rows["int8"]["seconds"] / 1e9)

    monkeypatch.setattr(docs_cpu, "RESULTS", tmp_path)
    assert "| `awq_w4a16` |" in docs_cpu.cpu_linears()
    assert "_weight_int8pack_mm" in docs_cpu.cpu_peers()
    assert "| `int8` | quantize |" in docs_cpu.cpu_codecs()
    drawing = ET.fromstring(docs_cpu.cpu_plot())
    texts = [element.text for element in drawing.iter("{http://www.w3.org/2000/svg}text")]
    assert {"awq_w4a16", "bf16 F.linear", "int8 product 200"} <= set(texts)
    assert not any("bfloat16 product" in text for text in texts)  # below float32: no limit of anything
    assert len(list(drawing.iter("{http://www.w3.org/2000/svg}path"))) == 6
