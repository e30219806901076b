"""The GPU benchmark without a GPU: a model's variants, the peers that ours are compared with, and forced routes."""

from io import StringIO

import pytest
import torch
from rich.console import Console

pytest.importorskip("triton", reason="Triton is not installed")

from benchmarks import gpu, gpu_linears, gpu_model, gpu_peers
from benchmarks.cpu_linears import WrongResultError
from benchmarks.gpu_linears import Route
from benchmarks.gpu_peers import CUBLAS, Dense
from lowbit.errors import UnsupportedError
from tests.benchmarks.gpu_bench import CPU, L2, K, N, bench, never

TINY = gpu_model.Sizes(hidden=256, mlp=512, heads=2, blocks=1, image=24, text=8)


def test_the_model_measures_every_variant():
    """Each variant's output is near that of float32, its weights are smaller, and its time is set against bf16's."""
    rows = {row["name"]: row for row in gpu_model.measure(bench(bf16=2e-3), sizes=TINY)}
    assert set(rows) == set(gpu_model.VARIANTS)
    for name, row in rows.items():
        if "skipped" in row:
            continue
        assert "fault" not in row
        assert row["ratio"]["ratio"] == pytest.approx(1.0 if name == "bf16" else 2.0)
    assert rows["bf16"]["error"] < rows["int8"]["error"] < rows["svdquant_w4a4 + awq_w4a16"]["error"]
    assert rows["int8"]["of_dense_weights"] < 0.52
    assert rows["svdquant_w4a4 + awq_w4a16"]["of_dense_weights"] < 0.42  # the low rank is 32 of 256 columns here
    shown = StringIO()
    gpu_model.show(Console(file=shown, width=200), list(rows.values()))
    assert "svdquant_w4a4 + awq_w4a16" in shown.getvalue()


def test_a_wrong_model_has_no_time(monkeypatch):
    """A variant whose error is beyond its limit reports a fault."""
    monkeypatch.setattr(gpu_model, "VARIANTS", {"bf16": ("", "", 0.03), "int8": ("int8", "int8", 1e-9)})
    rows = gpu_model.measure(bench(), sizes=TINY)
    assert "off by" in rows[1]["fault"]
    assert "seconds" not in rows[1]
    assert "seconds" in rows[0]


def test_peers_that_are_missing_or_fail_are_named():
    """A package that is not there, and a peer that raises, have a reason and no row."""
    failures = {}
    dense = Dense.make(N, K, CPU)

    def drawn(spec):
        return gpu_linears.drawn_on(CPU, spec, N, K)

    found = gpu_peers.peers(list(gpu_linears.SPECS), dense, drawn, L2, failures)
    made = {entry.name for entry in found}
    expected = {peer.name for peer in gpu_peers.PEERS if peer.package not in gpu_peers.missing()}
    assert made | set(failures) == expected
    assert not made & set(failures)
    x = torch.randn(20, K).bfloat16()
    int_mm = next(entry for entry in found if "_int_mm" in entry.name)
    given = int_mm.input(x)
    assert int_mm.check(given, int_mm.run(given, int_mm.weights[0])) == 0
    with pytest.raises(WrongResultError):
        int_mm.check(given, int_mm.run(given, int_mm.weights[0]) + 1)
    with pytest.raises(RuntimeError, match="17 tokens"):
        int_mm.input(x[:3])
    mine = gpu_peers.cublas(dense, L2)
    assert mine.check(x, mine.run(x, mine.weights[0])) < 0.01
    with pytest.raises(WrongResultError):
        mine.check(x, mine.run(x, mine.weights[0]) * 2)


def test_our_other_backends_are_rivals(monkeypatch):
    """A linear is compared with our other backends, each with the weight as it wants it; not with its own."""
    failures = {}
    drawn = gpu_linears.drawn_on(CPU, "awq_w4a16", N, K)
    monkeypatch.setattr(gpu_linears, "HEADLINE", (N, K))
    triton, eager = gpu_linears.rivals("awq_w4a16", drawn, L2, failures)
    assert (triton.name, eager.name, eager.layout) == ("lowbit triton", "lowbit eager", "")
    with pytest.raises(UnsupportedError):
        triton.run(torch.randn(2, K).bfloat16(), triton.weights[0])  # a GPU's alone, or the interpreter's
    x = torch.randn(2, K).bfloat16()
    assert eager.check(x, eager.run(x, eager.weights[0])) < 0.01
    found = bench()
    found.others = True
    monkeypatch.setattr(gpu_peers, "peers", lambda *_: [])
    (row,) = gpu.measure_linear(gpu.Shape(found, N, K), "awq_w4a16", (2,), never)
    mine = row["kernel"].partition(":")[0]
    assert "lowbit triton" in row["absent"]
    assert set(row["ratios"]) == {CUBLAS, *({"lowbit eager"} if mine != "eager" else ())}
    assert all(0 <= value < 0.01 for value in row["largest_difference"].values())
    assert set(row["largest_difference"]) == set(row["ratios"]) - {CUBLAS}


def test_crossovers_force_each_route(monkeypatch):
    """Every route is timed under its own constants, the fastest is named, a closed one says why, and nothing stays."""
    from lowbit.backends.triton import linear_words

    before, seen = linear_words._FEW, set()

    def linear(x, w, own=torch.nn.functional.linear):
        seen.add(linear_words._FEW)
        return own(x, w)

    routes = {
        "one": Route("eager", {"triton.linear_words": {"_FEW": 7}}),
        "two": Route("eager"),
        "closed": Route("cuda"),
    }
    monkeypatch.setattr(gpu_linears.F, "linear", linear)
    monkeypatch.setattr(gpu_linears, "ROUTES", routes)
    rows = gpu.crossovers(bench(two=5e-4), "int8", (N, K), (1, 4))
    assert [row["best"] for row in rows] == ["two", "two"]
    assert set(rows[0]["seconds"]) == {CUBLAS, "one", "two"}
    assert "UnsupportedError" in rows[0]["faults"]["closed"]
    assert seen == {before, 7}
    assert before == linear_words._FEW
    shown = StringIO()
    gpu.show_crossovers(Console(file=shown, width=400), "int8", rows)
    assert "500.0" in shown.getvalue()


def test_the_decoding_route_passes_the_launcher_by(monkeypatch):
    """The weight is decoded as it is packed, and an op without a format is refused."""
    from lowbit.backends.triton import decoded_linear

    route = gpu_linears.ROUTES["triton, decoded"]
    mine = gpu_linears.ours("awq_w4a16", gpu_linears.drawn_on(CPU, "awq_w4a16", N, K), L2)
    given = []
    monkeypatch.setattr(decoded_linear, "refuses", lambda *_: None)
    monkeypatch.setattr(decoded_linear, "product", lambda *arguments: given.append(arguments))
    gpu_linears.along(route, mine)("x", mine.weights[0])
    ((fmt, x, _, bias, layout),) = given
    assert (fmt, x, bias, layout) == (mine.weights[0].format, "x", None, mine.layout)
    with pytest.raises(UnsupportedError, match="op of its own"):
        gpu_linears.along(route, mine)("x", ())


def test_a_route_that_names_no_constant_is_refused():
    """A constant that a kernel file does not have is an error that says where the table is."""
    route = Route("eager", {"triton.linear_words": {"NOT_THERE": 1}})
    with pytest.raises(UnsupportedError, match="ROUTES"), gpu_linears.forced(route):
        pass


@pytest.mark.parametrize("name", gpu_linears.ROUTES)
def test_the_routes_name_constants_that_exist(name):
    """Each route of the table can be forced."""
    route = gpu_linears.ROUTES[name]
    with gpu_linears.forced(Route("eager", route.constants)):
        pass
    assert {"triton, blocks decoded"} == set(gpu_linears.routes("gguf(type=Q4_0)")) - set(gpu_linears.routes("int8"))
    assert {"triton, torch._scaled_mm"} == set(gpu_linears.routes(gpu_linears.FP8_ROW)) - set(
        gpu_linears.routes("int8")
    )
