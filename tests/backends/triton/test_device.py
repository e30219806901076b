from __future__ import annotations

import os
import subprocess
import sys
import textwrap

import pytest
import torch

pytest.importorskip("triton", reason="Triton is not installed")

from lowbit import dispatch
from lowbit.backends.triton import device
from lowbit.backends.triton.device import Target, assume, refuses

CPU, META = torch.device("cpu"), torch.device("meta")
HOPPER, TURING, PASCAL = Target("cuda", (9, 0)), Target("cuda", (7, 5)), Target("cuda", (6, 1))
INTERPRETER, AMD = Target("interpreter"), Target("hip")


def empty(dtype, where=CPU):
    """A tensor of a dtype."""
    return torch.empty(2, dtype=dtype, device=where)


@pytest.mark.parametrize(
    ("target", "x", "others", "said"),
    [
        (PASCAL, torch.float16, {}, "compute capability 6.1; Triton's tensor-core code needs 7.5 or later"),
        (HOPPER, torch.float64, {}, "x is float64; the kernels take float32, bfloat16 and float16"),
        (HOPPER, torch.float16, {"scale": torch.float64}, "scale is float64; the kernels take"),
        (TURING, torch.bfloat16, {}, "x is bfloat16, which this GPU does not multiply; use float16"),
        (TURING, torch.float16, {"bias": torch.bfloat16}, "bias is bfloat16, which this GPU does not multiply"),
        (INTERPRETER, torch.bfloat16, {}, "x is bfloat16, which Triton's interpreter rounds wrongly"),
    ],
)
def test_refusals(target, x, others, said):
    """What a device or the kernels do not take is said in words that name the tensor and what to use."""
    with assume(target):
        why = refuses(empty(x), **{name: empty(dtype) for name, dtype in others.items()})
    assert why is not None
    assert said in why


def test_tensors_on_two_devices_are_refused():
    """The tensor and both devices are named."""
    with assume(HOPPER):
        why = refuses(empty(torch.float16), scale=empty(torch.float16, META))
    assert why is not None
    assert "scale is on meta, x on cpu; move one of them" in why


@pytest.mark.parametrize(
    ("target", "x", "others"),
    [
        (HOPPER, torch.bfloat16, (torch.uint8, torch.float8_e4m3fn, torch.float8_e8m0fnu, torch.int32, torch.bfloat16)),
        (HOPPER, torch.float32, (torch.float16,)),
        (TURING, torch.float16, (torch.int8, torch.float32)),
        (INTERPRETER, torch.float16, (torch.bfloat16,)),
        (AMD, torch.bfloat16, (torch.int8,)),
    ],
)
def test_what_is_taken(target, x, others):
    """Codes of any kind beside activations of a dtype that the target multiplies; a missing tensor is no reason."""
    tensors = {f"t{index}": empty(dtype) for index, dtype in enumerate(others)}
    with assume(target):
        assert refuses(empty(x), bias=None, **tensors) is None


def test_a_target_is_assumed_within_its_block_alone():
    """Blocks nest, and end."""
    outside = device.target_of(CPU)
    with assume(HOPPER):
        with assume(AMD):
            assert device.target_of(CPU) == AMD
        assert device.target_of(CPU) == HOPPER
    assert device.target_of(CPU) == outside


def test_dispatch_says_why(monkeypatch):
    """A call that the kernels refuse is explained by backend and kernel, as `lowbit doctor` prints it."""
    from lowbit.formats import parse_spec
    from lowbit.layouts.base import get_layout

    monkeypatch.setitem(dispatch.BACKENDS, "triton", ("cuda", "xpu", "meta"))
    fmt = parse_spec("awq_w4a16")
    plain = fmt.empty_parts((128, 128), META, torch.bfloat16)
    parts = get_layout("words128", fmt).pack(fmt, plain)
    args = (fmt, torch.empty(1, 128, dtype=torch.bfloat16, device=META), parts, None)
    try:
        with assume(TURING):
            found = dispatch.explain("linear", fmt.name, "words128", "meta", args)
        with assume(HOPPER):
            taken = dispatch.explain("linear", fmt.name, "words128", "meta", args)
    finally:
        dispatch._STATE.candidates.clear()
    (name,) = (name for name in found if name.startswith("triton:linear_awq"))
    assert "use float16" in found[name]
    assert taken[name] == "runs"


HIDE = textwrap.dedent("""
    import sys, warnings
    class Hide:
        def find_spec(self, name, path=None, target=None):
            if name.partition(".")[0] == "triton":
                raise ModuleNotFoundError(f"No module named {name!r}", name=name)
    sys.meta_path.insert(0, Hide())
    import importlib.util
    found = importlib.util.find_spec
    importlib.util.find_spec = lambda name, *rest: None if name.partition(".")[0] == "triton" else found(name, *rest)
    warnings.simplefilter("error")
""")


PROGRAM = """
import lowbit, torch
lowbit.QuantizedTensor.quantize(torch.randn(64, 128), "nvfp4").dequantize()
print("imported", flush=True)
warnings.resetwarnings()
from lowbit import dispatch
try:
    dispatch.use_backend("triton").__enter__()
except lowbit.errors.UnsupportedError as error:
    print(f"asked for: {error}", flush=True)
from lowbit.cli import main
sys.argv[1:] = ["doctor"]
main()
"""


def test_without_triton_the_import_is_silent_and_doctor_says_it():
    """`import lowbit` says nothing and fails at nothing; asking for the backend, or the doctor, says what lacks."""
    env = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    env["PYTHONPATH"] = os.pathsep.join(["src", env.get("PYTHONPATH", "")])
    env["COLUMNS"] = "200"
    words = [sys.executable, "-c", HIDE + PROGRAM]
    found = subprocess.run(words, env=env, capture_output=True, text=True, check=False)
    assert found.returncode == 0, found.stderr
    first, asked, *doctor = found.stdout.splitlines()
    assert first == "imported"
    assert asked.startswith("asked for: the triton backend cannot be used: ImportError: Triton is not installed")
    assert any("Triton is not installed; pip install triton" in line for line in doctor)
    assert found.stderr == ""


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="one GPU")
def test_the_second_gpu_is_read_by_its_index():
    """Each GPU is its own target."""
    for index in range(2):
        found = torch.cuda.get_device_properties(index)
        assert device.target_of(torch.device("cuda", index)).processors == found.multi_processor_count
