from __future__ import annotations

import json
import os
import subprocess
import sys
import textwrap
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("triton", reason="Triton is not installed")

from lowbit.backends.triton import device, tuning
from lowbit.backends.triton.device import Target
from lowbit.backends.triton.tuning import TunedKernel, bucket, config, record
from lowbit.errors import UnsupportedError
from lowbit.numerics import cuda_graphs

CPU = torch.device("cpu")
SMALL, MIDDLE, LARGE = (config(BLOCK=size, warps=4, stages=2) for size in (16, 32, 64))
SECONDS = {16: 3.0, 32: 1.0, 64: 2.0}


class Function:
    """Stands for a jitted function: notes its launches, and fails for the blocks in `broken`."""

    __name__ = "_fake"
    cache_key = "source"

    def __init__(self):
        self.launches, self.broken, self.trapped = [], {}, set()

    def __getitem__(self, grid):
        """What launches on a grid."""

        def launch(**arguments):
            if arguments["BLOCK"] in self.broken:
                raise self.broken[arguments["BLOCK"]]
            self.launches.append((grid, arguments))

        return launch

    def warmup(self, grid, **arguments):
        """What compiles without launching: its PTX is a trap for the blocks in `trapped`."""
        ptx = "trap;" if arguments["BLOCK"] in self.trapped else "st.global.b32 [%rd1], %r1;"
        return SimpleNamespace(asm={"ptx": ptx})


@pytest.fixture
def timed(monkeypatch, tmp_path):
    """What was timed, by a clock that prefers blocks of 32; the cache is in a folder of its own."""
    blocks = []

    def do_bench(run, **_):
        run()
        blocks.append(tuned_function.launches[-1][1]["BLOCK"])
        return SECONDS[blocks[-1]]

    tuned_function = Function()
    monkeypatch.setattr(tuning, "do_bench", do_bench)
    monkeypatch.setattr(device, "INTERPRETED", False)
    monkeypatch.setenv("LOWBIT_CACHE", str(tmp_path))
    monkeypatch.delenv("TRITON_PRINT_AUTOTUNING", raising=False)
    blocks_of = type("Timed", (), {})()
    blocks_of.blocks, blocks_of.function, blocks_of.folder = blocks, tuned_function, tmp_path
    return blocks_of


def kernel(function, configs=(SMALL, MIDDLE, LARGE), **options):
    """A tuned kernel of a fake function."""
    return TunedKernel(function, configs, ("n", "x"), **options)


def call(one, n=8, m=3, dtype=torch.float16):
    """Call it for a size."""
    return one(lambda meta: (n // meta["BLOCK"] + 1, m), CPU, x=torch.empty(0, dtype=dtype), n=n, m=m)


def test_the_fastest_is_found_once_for_each_key(timed):
    """Every config is timed at the first call of a key; later ones launch the fastest, whatever else differs."""
    one = kernel(timed.function)
    assert call(one) == MIDDLE
    assert timed.blocks == [16, 32, 64]
    timed.function.launches.clear()
    assert call(one, m=77) == MIDDLE
    assert timed.blocks == [16, 32, 64]
    ((grid, arguments),) = timed.function.launches
    assert grid == (1, 77)
    assert {name: arguments[name] for name in ("n", "m", "BLOCK", "num_warps", "num_stages")} == {
        "n": 8, "m": 77, "BLOCK": 32, "num_warps": 4, "num_stages": 2
    }  # fmt: skip
    call(one, n=9)
    call(one, dtype=torch.bfloat16)
    assert len(timed.blocks) == 9


def test_another_process_reads_the_choice(timed):
    """A kernel that was tuned by another object with the same source and configs times nothing."""
    call(kernel(timed.function))
    timed.blocks.clear()
    assert call(kernel(timed.function)) == MIDDLE
    assert timed.blocks == []
    (path,) = (timed.folder / "triton").iterdir()
    assert list(json.loads(path.read_text()).values()) == [str(MIDDLE)]


@pytest.mark.parametrize("change", ["source", "configs", "version"])
def test_a_choice_is_of_a_source_its_configs_and_a_version(timed, change, monkeypatch):
    """What was found for another source, other configs or another Triton is not used."""
    call(kernel(timed.function))
    timed.blocks.clear()
    configs = (SMALL, MIDDLE)
    if change == "source":
        timed.function.cache_key = "another"
        configs = (SMALL, MIDDLE, LARGE)
    elif change == "version":
        monkeypatch.setattr(tuning.triton, "__version__", "0")
        configs = (SMALL, MIDDLE, LARGE)
    call(kernel(timed.function, configs))
    assert timed.blocks == [16, 32, 64][: len(configs)]


@pytest.mark.parametrize("text", ["", "{", "[1, 2]", '{"(8, \'torch.float16\')": "BLOCK=1"}', '{"(8,)": 3}'])
def test_a_broken_cache_is_ignored(timed, text):
    """A file that is cut short, holds something else or names a config that is gone costs the timing alone."""
    call(kernel(timed.function))
    (path,) = (timed.folder / "triton").iterdir()
    path.write_text(text)
    timed.blocks.clear()
    assert call(kernel(timed.function)) == MIDDLE
    assert timed.blocks == [16, 32, 64]
    assert str(MIDDLE) in json.loads(path.read_text()).values()


def test_a_folder_that_cannot_be_written_is_no_error(timed, monkeypatch):
    """The choice is kept in memory then."""
    blocked = timed.folder / "file"
    blocked.write_text("")
    monkeypatch.setenv("LOWBIT_CACHE", str(blocked))
    one = kernel(timed.function)
    assert call(one) == MIDDLE
    timed.blocks.clear()
    assert call(one) == MIDDLE
    assert timed.blocks == []


def test_a_config_that_fails_is_passed_over(timed):
    """Out of shared memory, or not assembled: the fastest of the others runs."""
    timed.function.broken = {32: tuning.triton.runtime.errors.OutOfResources(1, 2, "shared memory")}
    assert call(kernel(timed.function)) == LARGE
    assert timed.blocks == [16, 64]


def test_a_trap_is_passed_over(timed):
    """A config of which the compiler left nothing that stores is never launched: that would end the process."""
    timed.function.trapped = {16, 32}
    assert call(kernel(timed.function)) == LARGE
    assert timed.blocks == [64]
    assert {arguments["BLOCK"] for _, arguments in timed.function.launches} == {64}


def test_memory_too_short_to_time(timed, monkeypatch):
    """Where the clock finds no memory the first config runs: this process keeps to it, another one times again."""

    def do_bench(run, **_):
        run()
        raise torch.cuda.OutOfMemoryError("no room for the buffer that empties the cache")

    with monkeypatch.context() as short:
        short.setattr(tuning, "do_bench", do_bench)
        assert call(kernel(timed.function)) == SMALL
    assert call(kernel(timed.function)) == MIDDLE
    assert timed.blocks == [16, 32, 64]


def test_none_that_works_is_an_error_in_words(timed):
    """The error names kernel, shape and what each config said; the next call tries again, and another shape works."""
    timed.function.broken = {size: RuntimeError(f"ptxas failed on {size}\nmore") for size in (16, 32, 64)}
    one = kernel(timed.function)
    with pytest.raises(UnsupportedError, match=r"_fake works for .*'n': 8") as caught:
        call(one)
    assert "ptxas failed on 32" in str(caught.value)
    assert "more" not in str(caught.value)
    timed.function.broken = {}
    assert call(one) == MIDDLE


def test_pruning_leaves_configs_out(timed):
    """Only what the kernel finds sensible for a call is timed."""
    one = kernel(timed.function, prune=lambda configs, _: [c for c in configs if c.constants["BLOCK"] > 16])
    call(one)
    assert timed.blocks == [32, 64]


def test_a_single_config_is_not_timed(timed):
    """Nothing to choose, nothing to measure, no file."""
    assert call(kernel(timed.function, (LARGE,))) == LARGE
    assert timed.blocks == []
    assert not list(timed.folder.iterdir())


def test_the_interpreter_takes_the_first(timed, monkeypatch):
    """Timing an interpreter says nothing."""
    monkeypatch.setattr(device, "INTERPRETED", True)
    assert call(kernel(timed.function)) == SMALL
    assert timed.blocks == []


def test_a_capture_takes_the_first_and_is_not_remembered(timed, monkeypatch):
    """While a graph is captured nothing can be timed; the next call outside is timed, and a later capture uses that."""
    gpu = torch.device("cuda", 0)
    capturing = [True]
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: capturing[0])
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "A GPU/B")
    monkeypatch.setattr(cuda_graphs, "_driver", lambda: SimpleNamespace(cuThreadExchangeStreamCaptureMode=lambda _: 0))
    one = kernel(timed.function)

    def run():
        return one(lambda _: (1,), gpu, x=torch.empty(0), n=8)

    assert run() == SMALL
    assert timed.blocks == []
    capturing[0] = False
    assert run() == MIDDLE
    capturing[0] = True
    assert run() == MIDDLE
    (path,) = (timed.folder / "triton").iterdir()
    assert path.name.startswith("_fake-A_GPU_B-")


def test_kernels_are_loaded_while_a_graph_is_captured(timed, monkeypatch):
    """CUDA forbids to load one then, and ends the capture, unless the thread has said that it means it."""
    modes, seen = [0], []

    def exchange(mode):
        modes[0], mode._obj.value = mode._obj.value, modes[0]

    monkeypatch.setattr(cuda_graphs, "_driver", lambda: SimpleNamespace(cuThreadExchangeStreamCaptureMode=exchange))
    monkeypatch.setattr(torch.version, "hip", None)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    one, gpu = kernel(timed.function, (SMALL,)), torch.device("cuda", 0)

    def grid(_):
        seen.append(modes[0])
        return (1,)

    one(grid, gpu, x=torch.empty(0), n=8)
    assert (seen, modes) == ([2], [0])  # relaxed, and as before
    timed.function.broken = {16: RuntimeError("no memory for a kernel")}
    with pytest.raises(RuntimeError, match="no memory"):
        one(grid, gpu, x=torch.empty(0), n=8)
    assert (seen, modes) == ([2, 2], [0])


def test_recording_runs_nothing(timed):
    """Within `record` launches are noted with the sensible configs, and not run."""
    one = kernel(timed.function, prune=lambda configs, _: configs[1:])
    with record() as launches:
        assert call(one, n=5) == MIDDLE
    assert timed.function.launches == []
    (launch,) = launches
    assert (launch.kernel, launch.configs, launch.arguments["n"]) == (one, (MIDDLE, LARGE), 5)


def test_what_was_found_is_printed_on_request(timed, monkeypatch, capsys):
    """TRITON_PRINT_AUTOTUNING=1 shows the kernel, the key, the config and its time."""
    monkeypatch.setenv("TRITON_PRINT_AUTOTUNING", "1")
    call(kernel(timed.function))
    said = capsys.readouterr().out
    assert "_fake {'n': 8, 'x': 'torch.float16'}" in said
    assert str(MIDDLE) in said
    assert "1000.0 us" in said


def test_buckets():
    """Numbers of tokens are rounded up to powers of two."""
    assert [bucket(m) for m in (1, 2, 3, 4, 5, 64, 65, 4096)] == [1, 2, 4, 4, 8, 64, 128, 4096]


def test_two_processes_share_the_cache(timed):
    """This process finds on the disk what another one chose."""
    program = textwrap.dedent(f"""
        import sys
        sys.path[:0] = [{str(Path.cwd())!r}, "src"]
        from tests.backends.triton import test_tuning as here
        from lowbit.backends.triton import tuning
        function = here.Function()
        timed = []
        def do_bench(run, **_):
            run()
            timed.append(1)
            return here.SECONDS[function.launches[-1][1]["BLOCK"]]
        tuning.do_bench = do_bench
        print(here.call(here.kernel(function)), len(timed))
    """)
    env = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    found = subprocess.run([sys.executable, "-c", program], env=env, capture_output=True, text=True, check=True)
    assert found.stdout.strip() == f"{MIDDLE} 3"
    assert call(kernel(timed.function)) == MIDDLE
    assert timed.blocks == []


def test_targets_assemble_from_ampere_on():
    """PTX is used on NVIDIA from compute capability 8.0 alone."""
    found = [Target("cuda", (8, 0)), Target("cuda", (7, 5)), Target("hip"), Target("interpreter"), Target("xpu")]
    assert [target.assembles for target in found] == [True, False, False, False, False]
