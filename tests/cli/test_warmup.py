"""`lowbit warmup`: what is compiled ahead is what will run, and nothing else."""

from __future__ import annotations

import sys

import pytest
import torch
from safetensors.torch import save_file

pytest.importorskip("lowbit.backends.cuda", reason="no CUDA compiler", exc_type=ImportError)

from lowbit import dispatch
from lowbit.backends import gpu
from lowbit.backends.cuda import ahead, compiler, kernels
from lowbit.backends.gpu import Target, assume
from lowbit.errors import UnsupportedError
from lowbit.formats import parse_spec
from lowbit.formats.parts import raw_bytes
from lowbit.layouts.base import get_layout
from tests.cli.test_bad_input import assert_one_line

AWQ = ("warmup", "--format", "awq_w4a16", "--shape", "128x256", "--arch", "sm_90a")
INT8 = (
    "warmup",
    "--format",
    "int8",
    "--shape",
    "128x256",
    "--arch",
    "sm_90a",
)


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    """A cache of the test's own."""
    monkeypatch.setenv("LOWBIT_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "cuda"


@pytest.fixture
def awq(lowbit, tmp_path):
    """A checkpoint in awq_w4a16, two of its three layers of one shape."""
    shapes = {"a": (128, 256), "b": (128, 256), "c": (64, 128)}
    tensors = {f"{name}.weight": torch.randn(shape).bfloat16() for name, shape in shapes.items()}
    tensors["a.bias"] = torch.zeros(128).bfloat16()
    save_file(tensors, tmp_path / "plain.safetensors")
    made = tmp_path / "awq.safetensors"
    done = lowbit("convert", tmp_path / "plain.safetensors", "-o", made, "--format", "awq_w4a16", "--preset", "none")
    assert done.code == 0, done.err
    return made


def launched(shape, m, dtype=torch.bfloat16):
    """What a linear of awq_w4a16, packed as loading does it, launches on Hopper: recorded by hand."""
    fmt = parse_spec("awq_w4a16")
    layout = dispatch.preferred_layout("linear", fmt, *shape, "cuda")
    parts = get_layout(layout, fmt).pack(fmt, fmt.empty_parts(shape, torch.device("meta"), dtype))
    args = (fmt, torch.empty(m, shape[1], dtype=dtype, device="meta"), parts, None)
    with assume(Target("cuda", (9, 0))), kernels.record() as found:
        dispatch.select("linear", "awq_w4a16", layout, "cuda", args).run(*args)
    return {(launch.source, launch.name) for launch in found}


def test_what_is_compiled_is_what_runs(lowbit, awq, cache):
    """Every launch of the checkpoint's layers lies in the cache, and the second run finds all of it there."""
    first = lowbit("warmup", awq, "--arch", "sm_90a", "-M", "1", "--json")
    assert first.code == 0
    wanted = {one for shape in ((128, 256), (64, 128)) for one in launched(shape, 1)}
    assert wanted <= {(one["source"], one["name"]) for one in first.json["kernels"]}
    assert all(compiler.is_kept(*one, "sm_90a") for one in wanted)
    assert {one["state"] for one in first.json["kernels"]} == {"compiled"}
    assert len(list(cache.iterdir())) == len(first.json["kernels"])
    assert first.json["problems"] == []
    second = lowbit("warmup", awq, "--arch", "sm_90a", "-M", "1", "--json").json
    assert {one["state"] for one in second["kernels"]} == {"kept"}


def test_linears_of_a_checkpoint(lowbit, awq):
    """Layers that are alike count once; layout, bias and dtype are those that loading gives them."""
    found = lowbit("warmup", awq, "--arch", "sm_90a", "-M", "3", "--dry-run", "--json").json["linears"]
    assert [(one["shape"], one["bias"], one["layout"], one["dtype"]) for one in found] == [
        ([128, 256], True, "words128", "bfloat16"),
        ([128, 256], False, "words128", "bfloat16"),
        ([64, 128], False, "words128", "bfloat16"),
    ]
    assert {one["kernel"].partition(":")[0] for one in found} == {"cuda"}


def test_a_dry_run_compiles_nothing(lowbit, cache, monkeypatch):
    """It says what would be compiled, for every architecture, and leaves no file."""
    monkeypatch.setattr(compiler, "compile_now", lambda *_: pytest.fail("compiled"))
    arguments = [*AWQ[:-1], "sm_80,sm_120", "--dry-run"]
    data, text = lowbit(*arguments, "--json").json, lowbit(*arguments).out
    assert data["architectures"] == ["sm_80", "sm_120a"]
    assert {one["state"] for one in data["kernels"]} == {"wanted"}
    assert {one["architecture"] for one in data["kernels"]} == {"sm_80", "sm_120a"}
    assert "to compile" in text
    assert not cache.exists()


def test_what_triton_serves_is_said(lowbit):
    """Calls of many tokens are another backend's; without a GPU it is plain that nothing is compiled for them."""
    done = lowbit(*INT8, "-M", "1,4096", "--dry-run", "--json").json
    if dispatch.load("triton"):
        pytest.skip("Triton is not installed")
    served = {tuple(one["tokens"]): one["kernel"] for one in done["linears"]}
    assert served[1,].startswith("cuda:")
    assert served[4096,].startswith("triton:")
    assert any("Triton serves calls of int8" in note for note in done["notes"])


def test_what_convert_rotates_is_said_once(lowbit):
    """The linears of int8 by its name alone are unrotated here; `convert` would make others of it."""
    shapes = ("--shape", "64x256", "--shape", "128x256", "--arch", "sm_80", "--dry-run", "--json")
    notes = lowbit("warmup", "--format", "int8", *shapes).json["notes"]
    assert notes.count("convert rotates int8 by default; ask with --format 'int8(rotation=256)'") == 1
    assert not [n for n in lowbit("warmup", "-f", "int8(rotation=0)", *shapes).json["notes"] if "rotates" in n]


def test_any_number_of_multiprocessors(lowbit):
    """An architecture's GPUs differ in size: what a small and what a large one launches is compiled."""
    shape = (18432, 3072)
    done = lowbit("warmup", "-f", "awq_w4a16(group_size=128)", "--shape", "18432x3072", "--arch", "sm_90a", "-M", "1",
                  "--dry-run", "--json").json  # fmt: skip
    fmt, names = parse_spec("awq_w4a16(group_size=128)"), set()
    linear = ahead.Linear(fmt, "words128", *shape, torch.bfloat16, bias=False)
    for processors in (16, 192):
        found = ahead.answer(linear, 1, Target("cuda", (9, 0), processors))
        names |= {launch.name for launch in found.launches}
    assert names <= {one["name"] for one in done["kernels"]}


def test_float32_scales_of_a_file():
    """The dtype of a part is that of the file: other kernels take scales in float32."""
    fmt = parse_spec("awq_w4a16")
    linear = ahead.Linear(fmt, "words128", 64, 128, torch.bfloat16, bias=False)
    wide = (("scale", torch.float32), ("zero", torch.float32))
    other = ahead.Linear(fmt, "words128", 64, 128, torch.bfloat16, bias=False, dtypes=wide)
    narrow, wide = (ahead.answer(one, 1, Target("cuda", (9, 0))).launches for one in (linear, other))
    assert narrow != wide
    assert "kFloatScale" in wide[0].name


def test_one_call_of_what_triton_serves(lowbit, monkeypatch):
    """On the GPU at hand what is not of CUDA is called once for each number of tokens; what does not fit is noted."""
    ran = []

    def run_once(linear, m, device):
        ran.append((linear.n, m, device.type))
        if m == 4096:
            raise torch.cuda.OutOfMemoryError

    if dispatch.load("triton"):
        pytest.skip("Triton is not installed")
    about = type("About", (), {"major": 9, "minor": 0, "multi_processor_count": 132})
    for name, value in {
        "is_available": lambda: True, "current_device": lambda: 0, "synchronize": lambda _: None,
        "get_device_properties": lambda _: about,
    }.items():  # fmt: skip
        monkeypatch.setattr(torch.cuda, name, value)
    monkeypatch.setattr(ahead, "run_once", run_once)
    done = lowbit(*INT8[:-2], "-M", "1,64,4096", "--json")
    assert done.code == 0
    assert ran == [(128, m, "cuda") for _ in (False, True) for m in (64, 4096)]
    assert done.json["architectures"] == ["sm_90a"]
    assert done.json["triton_calls"] == 2
    assert sum("not enough GPU memory" in note for note in done.json["notes"]) == 2


def test_a_call_gives_zeros():
    """The call that compiles and tunes is a linear of zeros in the layout that the kernel reads."""
    linear = ahead.Linear(parse_spec("nvfp4"), "words128", 64, 128, torch.bfloat16, bias=True)
    _, x, parts, bias = linear.arguments(3, torch.device("cpu"))
    assert (x.shape, bias.shape, parts["qdata"].dtype) == ((3, 128), (64,), torch.int32)
    assert not any(raw_bytes(part).any() for part in parts.values())
    ahead.run_once(ahead.Linear(parse_spec("nvfp4"), "", 64, 128, torch.bfloat16, bias=True), 3, torch.device("cpu"))


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("warmup",), "name a checkpoint, or formats and shapes"),
        (("warmup", "--format", "awq_w4a16"), "name a checkpoint, or formats and shapes"),
        ((*AWQ[:-2],), "no GPU here; name the architectures"),
        ((*AWQ[:-1], "sm_70"), "'sm_70' is no architecture that the compiler knows"),
        ((*AWQ[:-1], "hopper"), "'hopper' is no architecture"),
        ((*AWQ, "-M", "0"), "-M '0' is no number of tokens"),
        ((*AWQ, "-M", ""), "name at least one number"),
        ((*AWQ, "--dtype", "int4"), "--dtype 'int4' is unknown"),
        ((*AWQ, "--shape", "64"), "write it as NxK"),
        (("warmup", "--format", "awq_w4a16", "--shape", "64x65", "--arch", "sm_80"), "a weight of 64x65"),
        (("warmup", "--format", "int9", "--shape", "64x64", "--arch", "sm_80"), "unknown format"),
    ],
)
def test_wrong_options(lowbit, monkeypatch, arguments, words):
    """Wrong values end with 2 and say what would be right."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert_one_line(lowbit(*arguments), 2, words)


def test_bad_input(lowbit, model, tmp_path, monkeypatch):
    """A checkpoint that is not there or not quantized ends with 3, a cache that cannot be written with 4."""
    assert_one_line(lowbit("warmup", tmp_path / "no.safetensors", "--arch", "sm_80"), 3, "no.safetensors")
    assert_one_line(lowbit("warmup", model, "--arch", "sm_80"), 3, "holds no quantized linear; convert it first")
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("LOWBIT_CACHE", str(tmp_path / "file"))
    assert_one_line(lowbit(*AWQ, "-M", "1"), 4, "the cache cannot be written; let LOWBIT_CACHE name a folder")


def test_a_full_disk(lowbit, monkeypatch):
    """A kernel that was compiled and could not be kept is an error: the run would be for nothing."""
    monkeypatch.setattr(compiler, "write_whole", lambda *_: None)
    assert_one_line(lowbit(*AWQ, "-M", "1"), 4, "could not be written; see whether the disk is full")


def test_a_kernel_that_does_not_compile(lowbit, monkeypatch):
    """It is a problem, in the compiler's words, and the exit code is 1; the others are compiled."""
    there = compiler.compile_now

    def compile_now(source, name, architecture):
        if "words" in source:
            raise UnsupportedError(f"{source} does not compile for {architecture}: too many registers")
        return there(source, name, architecture)

    monkeypatch.setattr(compiler, "compile_now", compile_now)
    done = lowbit(*AWQ, "-M", "1", "--json")
    assert done.code == 1
    assert any("too many registers" in problem for problem in done.json["problems"])
    assert {one["state"] for one in done.json["kernels"]} == {"compiled", "failed"}


def test_without_the_backend(lowbit, monkeypatch):
    """Where the backend is not there, the reason is the error."""
    monkeypatch.setitem(dispatch._STATE.loaded, "cuda", "ImportError: NVRTC is not there")
    assert_one_line(lowbit(*AWQ), 2, "the cuda backend cannot be used: ImportError: NVRTC is not there")


def test_doctor_shows_the_cache(lowbit, cache):
    """Versions, the driver, the folder, what is in it by architecture and what is broken stand in both outputs."""
    assert lowbit(*AWQ, "-M", "1").code == 0
    (cache / "linear_words-sm_90a-0123.bin").write_bytes(b"cut short")
    text, data = lowbit("doctor").out, lowbit("doctor", "--json").json["cuda_kernels"]
    assert set(data["packages"]) == set(compiler.PACKAGES)
    count = len(list(cache.iterdir())) - 1
    assert data["cache"]["architectures"] == {"sm_90a": count}
    assert data["cache"]["folder"] == str(cache)
    assert data["cache"]["writable"]
    assert data["cache"]["bytes"] > 1000
    assert data["cache"]["broken"] == ["linear_words-sm_90a-0123.bin"]
    assert f"{count} kernels" in text
    assert f"(sm_90a {count})" in text
    assert "broken, compiled again when they are needed: linear_words-sm_90a-0123.bin" in text


def test_doctor_says_what_is_wrong(lowbit, monkeypatch, tmp_path):
    """No driver, a cache that cannot be written, and a GPU that runs nothing are told in words."""
    check = sys.modules["lowbit.backends.cuda.device_check"]

    def no_driver():
        raise UnsupportedError("no NVIDIA driver: it was not found")

    (tmp_path / "file").write_text("")
    monkeypatch.setenv("LOWBIT_CACHE", str(tmp_path / "file"))
    monkeypatch.setattr(compiler, "driver_version", no_driver)
    text = lowbit("doctor").out
    assert "no NVIDIA driver: it was not found" in text
    assert "cannot be written: they are compiled in every process" in text
    about = type("About", (), {"name": "a GPU", "major": 9, "minor": 0, "total_memory": 1, "multi_processor_count": 1})
    for name, value in {
        "is_available": lambda: True, "device_count": lambda: 1, "get_device_properties": lambda _: about,
    }.items():  # fmt: skip
        monkeypatch.setattr(torch.cuda, name, value)
    monkeypatch.setattr(gpu, "_read", lambda *_: Target("cuda", (9, 0)))
    monkeypatch.setattr(check, "_found", {torch.device("cuda", 0): "the driver is too old"})
    assert "cuda:0: the driver is too old" in lowbit("doctor").out
    assert lowbit("doctor", "--json").json["cuda_kernels"]["refusals"] == {"cuda:0": "the driver is too old"}
    monkeypatch.setattr(check, "_found", {torch.device("cuda", 0): None})
    hopper = sys.modules["lowbit.backends.cuda.hopper_check"]
    monkeypatch.setattr(hopper, "_found", {torch.device("cuda", 0): "5 sums were wrong"})
    assert "cuda:0, products of a warpgroup: 5 sums were wrong; those of a warp run instead" in lowbit("doctor").out
