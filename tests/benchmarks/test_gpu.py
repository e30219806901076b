"""The GPU benchmark without a GPU: its order, ratios, checks, budget, JSON; CPU tensors, clocks that obey."""

import json
import subprocess
import sys
from dataclasses import replace
from io import StringIO
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from rich.console import Console

pytest.importorskip("triton", reason="Triton is not installed")

from benchmarks import (
    gpu,
    gpu_codecs,
    gpu_compile,
    gpu_linears,
    gpu_machine,
    gpu_model,
    gpu_timing,
)
from benchmarks.cpu_linears import WrongResultError
from benchmarks.gpu_peers import CUBLAS
from benchmarks.gpu_timing import GpuContender, calls_for, copies_for
from lowbit.backends.triton.device import Target
from tests.benchmarks.gpu_bench import Clock, K, N, bench, never

ROOT = Path(__file__).parents[2]


def test_a_graph_holds_a_millisecond_and_every_copy():
    """Short calls are many in a graph, long ones one for each copy, always all copies alike."""
    assert calls_for(1e-5, 8) == 104
    assert calls_for(1.0, 8) == 8
    assert calls_for(1e-9, 3) == 258
    assert copies_for(10, 1000) == 64
    assert copies_for(1000, 1000) == 3
    assert copies_for(1 << 31, 1 << 20) == 2


def test_a_visit_is_the_median_replay_of_a_call():
    """The first replay is not counted, and the seconds are those of one call."""
    replays = iter([9.0, 9.0, 8.0, 4.0, 6.0])
    seen = []

    class Runner:
        calls, how = 2, "fake"

        def __call__(self):
            """The next time."""
            return next(replays)

    def make(call, copies):
        assert copies == 3
        call(4)
        return Runner()

    one = GpuContender("a", seen.append, copies=3, make=make)
    one.prepare(Clock())
    assert seen == [1]  # copy 4 of 3
    assert one.visit(Clock()) == 3.0
    assert one.estimate == 4.5


@pytest.mark.parametrize("spec", ["awq_w4a16", "int8", "svdquant_w4a4", gpu_linears.W4A8])
def test_a_row_has_its_speed_and_ratios(spec):
    """Ours is compared with cuBLAS by the ratio of medians; bytes over time is set against copying."""
    found = bench(cublas=3e-3)
    rows = list(gpu.measure_linear(gpu.Shape(found, N, K), spec, (1, 5), never))
    assert [row["tokens"] for row in rows] == [1, 5]
    for row in rows:
        assert "fault" not in row
        assert row["ratios"][CUBLAS]["ratio"] == pytest.approx(3.0)
        assert row["seconds"] == pytest.approx(1e-3)
        assert row["of_copy"] == pytest.approx(row["bytes"] / 1e-3 / 1e9)
        assert row["of_peak"] == pytest.approx(2 * row["tokens"] * N * K / 1e-3 / 1e12)
        assert 0 <= row["error"] < 0.3
        assert row["copies"] > 1


def test_a_wrong_result_has_no_speed(monkeypatch):
    """A product that is 3 % too large is reported as a fault, without seconds."""
    monkeypatch.setattr(gpu_linears.F, "linear", lambda *args, own=torch.nn.functional.linear: own(*args) * 1.03)
    (row,) = gpu.measure_linear(gpu.Shape(bench(), N, K), "awq_w4a16", (2,), never)
    assert "off by" in row["fault"]
    assert "seconds" not in row


def test_what_the_budget_leaves_over_is_named():
    """Rows beyond the budget are not measured and say so; so do codecs."""
    rows = list(gpu.measure_linear(gpu.Shape(bench(), N, K), "int8", (1, 2), lambda: True))
    rows += gpu.measure_codecs(bench(), (64, 256), lambda: True)
    assert {row["skipped"] for row in rows} == {"the budget is used up"}
    shown = StringIO()
    gpu.show_rest(Console(file=shown, width=400), {"linears": rows[:2], "codecs": rows[2:]})
    assert "int8 256x512 M=2" in shown.getvalue()
    assert "dequantize awq_w4a16" in shown.getvalue()


def test_what_would_run_eager_is_not_measured():
    """A format without a kernel has no speed."""
    found = bench()
    found.takes_eager = False
    with gpu.dispatch.use_backend("eager"):
        (row,) = gpu.measure_linear(gpu.Shape(found, N, K), "int8", (2,), never)
    assert row["skipped"].startswith("no kernel")


def test_codecs_are_right_and_compared_with_copying():
    """Every encoder and decoder gives what eager gives; a result that differs is a fault."""
    rows = list(gpu.measure_codecs(bench(), (64, 1024), never))
    assert len(rows) == len(gpu_codecs.OPS) + 2 * sum(map(gpu_linears.known, gpu_codecs.SPECS)) + len(
        gpu_codecs.DECODED
    )
    assert not [row for row in rows if "fault" in row]
    assert all(row["of_copy"] == pytest.approx(row["bytes"] / 1e-3 / 1e9) for row in rows)
    codes = torch.arange(4000).view(4, 1000) % 100
    codes = codes.to(torch.int8)
    with pytest.raises(WrongResultError, match="of the codes"):
        gpu_codecs.compare("x", codes + (torch.arange(1000) < 5).to(torch.int8), codes)
    with pytest.raises(WrongResultError, match="off by"):
        gpu_codecs.compare("x", torch.ones(8) * 1.01, torch.ones(8))
    with pytest.raises(WrongResultError, match="instead of"):
        gpu_codecs.compare("x", torch.ones(8), torch.ones(7))


def test_all_sections_and_the_report(tmp_path, monkeypatch):
    """A run writes valid JSON around every row, prints its tables, and ends with 1 if a result was wrong."""
    model = [{"name": "bf16", "seconds": 1e-3}]
    monkeypatch.setattr(gpu_model, "measure", lambda *_, **__: model)
    target = tmp_path / "gpu.json"
    given = gpu.parse(
        ["--quick", "--shapes", f"{N}x{K}", "--tokens", "1", "3", "--formats", "int8", "--budget", "1e9"]
    )  # fmt: skip
    written = []
    monkeypatch.setattr(gpu_codecs, "SPECS", ("int8",))
    monkeypatch.setattr(gpu_codecs, "DECODED", ())
    monkeypatch.setattr(gpu_codecs, "OPS", {})
    result = gpu.measure(bench(), given, lambda so_far: (written.append(list(so_far)), gpu._write(target, so_far)))
    assert list(dict.fromkeys(key for keys in written for key in keys))[2:] == [
        "linears",
        "running",
        "codecs",
        "model",
        "start",
    ]
    kept = gpu.measure(bench(), given, [].append, {**result, "linears": result["linears"][:1]})
    assert [row["tokens"] for row in kept["linears"]] == [1, 3]
    assert kept["linears"][0] == result["linears"][0]
    assert json.loads(target.read_text())["linears"][0]["format"] == "int8"
    machine = {"gpu": "none", "driver": None, **gpu_machine.where()}
    whole = {"machine": machine, "copy_bytes_s": 1e9, "peaks_flop_s": {"bfloat16": 1e12}, **result}
    shown = StringIO()
    assert gpu.report(Console(file=shown, width=200), whole) == 0
    assert "256 x 512" in shown.getvalue()
    whole["linears"][0] = {**whole["linears"][0], "fault": "wrong"}
    assert gpu.report(Console(file=shown, width=200), whole) == 1


def test_what_is_measured_is_compiled_before(monkeypatch):
    """Each config of each launch is compiled once, in shares that miss none; what fails is left to the benchmark."""
    if gpu_compile.dispatch.load("triton") is not None:
        pytest.skip("no triton backend")
    target = Target("cuda", (9, 0))
    found = gpu_compile.jobs(target, ["awq_w4a16", "int8", gpu_linears.W4A8], [(N, K), (2 * N, K)], (1, 512))
    names = {launch.kernel.name for launch, _ in found}
    assert {"_linear_words", "_int8_gemm"} <= names
    assert len({(id(launch), config) for launch, config in found}) == len(found)
    compiled = []

    class Function:
        def warmup(self, **arguments):
            """Note it, and fail for some."""
            compiled.append(arguments)
            if len(compiled) == 2:
                raise RuntimeError("ptxas")

    launch, config = found[0]
    fake = replace(launch, kernel=replace(launch.kernel, function=Function()))
    assert [gpu_compile.compile_job((fake, config)) for _ in range(3)] == [True, False, True]
    assert compiled[0]["grid"] == (1,)
    assert compiled[0]["num_warps"] == config.warps
    assert set(config.constants) | set(launch.arguments) <= set(compiled[0])
    assert gpu_compile.options([(1, 2)], (3,), ["a"]) == ["--shapes", "1x2", "--tokens", "3", "--formats", "a"]


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_the_command_says_so():
    """scripts/gpu and the benchmark end with 3 and one line."""
    env = {"PYTHON": sys.executable, "PATH": "/usr/bin:/bin", "HOME": "/nonexistent"}
    found = subprocess.run(["scripts/gpu"], cwd=ROOT, env=env, capture_output=True, text=True, check=False)
    assert found.returncode == gpu.NO_GPU
    assert "no GPU" in found.stdout
    assert gpu.main([]) == gpu.NO_GPU


@pytest.mark.gpu
@pytest.mark.real_empty
def test_a_captured_call_is_replayed():
    """On a GPU the calls are in a graph that uses every copy, and what cannot be captured is launched."""
    copies = [torch.zeros(1000, device="cuda") for _ in range(3)]
    runner = gpu_timing.capture(lambda i: copies[i % 3].add_(1), 3)
    before = [one[0].item() for one in copies]
    assert runner() > 0
    after = [one[0].item() for one in copies]
    assert runner.how == "graph"
    assert [b - a for a, b in zip(before, after, strict=True)] == [runner.calls / 3] * 3
    waiting = gpu_timing.capture(lambda i: copies[i % 3].sum().item(), 3)
    assert waiting.how == "launches"
    assert waiting() > 0


def test_quantizers_are_timed_without_the_check_that_waits(monkeypatch):
    """Triton's quantizers return without a look at the flag of values that are not finite, and only while timed."""
    encoders = pytest.importorskip("lowbit.backends.triton.encoders")
    fault = AssertionError("looked")
    monkeypatch.setattr(encoders, "check_finite", lambda *_: (_ for _ in ()).throw(fault))
    parts = {"qdata": torch.zeros(1)}
    before = encoders.finished
    with gpu_codecs.unchecked(SimpleNamespace(backend="triton")):
        assert encoders.finished(parts, torch.ones(()), parts["qdata"], "weight") is parts
    assert encoders.finished is before
    with pytest.raises(AssertionError, match="looked"):
        encoders.finished(parts, torch.ones(()), parts["qdata"], "weight")
    with gpu_codecs.unchecked(SimpleNamespace(backend="cpu")):
        assert encoders.finished is before
