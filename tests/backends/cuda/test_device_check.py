"""What is wrong with a machine is a refusal in words before the first launch, and the next backend runs."""

from __future__ import annotations

import contextlib
import sys
import timeit
import types

import pytest
import torch
from torch._subclasses import fake_tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._pytree import tree_map_only

pytest.importorskip("lowbit.backends.cuda", reason="no CUDA compiler", exc_type=ImportError)

from lowbit import dispatch
from lowbit.backends import gpu
from lowbit.backends.cuda import compiler, device_check, kernels, linear_words
from lowbit.backends.cuda.device_check import usable
from lowbit.backends.gpu import Target, assume
from lowbit.errors import UnsupportedError
from lowbit.formats import parse_spec
from lowbit.layouts import words128
from lowbit.layouts.base import get_layout
from tests.support.cpu_linear import activations, packed_weight
from tests.support.cuda_launches import entries
from tests.support.kernel_examples import Sizes, examples, title

# Tensors of a GPU that is not there: launchers ask where they begin.
pytestmark = pytest.mark.filterwarnings("ignore:Accessing the data pointer of FakeTensor")

FIRST, SECOND = torch.device("cuda", 0), torch.device("cuda", 1)
TOO_OLD = "CUDA_ERROR_NO_BINARY_FOR_GPU: no kernel image is available for execution on the device"


@pytest.fixture
def machine(monkeypatch):
    """A machine with two GPUs: what their launches do, and what was launched, are the test's to say and to see."""
    made = types.SimpleNamespace(target=Target("cuda", (9, 0)), capturing=False, broken=(), launched=[], driver="12.4")

    def launch(*what):
        made.launched.append(what)
        if what[2] in made.broken:
            raise RuntimeError(TOO_OLD)

    monkeypatch.setattr(compiler, "driver_version", lambda: made.driver)
    monkeypatch.setattr(device_check, "_found", {})
    monkeypatch.setattr(kernels, "launch", launch)
    monkeypatch.setattr(gpu, "_read", lambda *_: made.target)
    monkeypatch.setattr(fake_tensor, "init_gpu_context", lambda _: None)  # it allocates on GPUs, which may not be there
    for name, value in {
        "is_available": lambda: True, "device_count": lambda: 2, "current_device": lambda: 0,
        "get_device_name": lambda _: "a GPU", "is_current_stream_capturing": lambda: made.capturing,
    }.items():  # fmt: skip
        monkeypatch.setattr(torch.cuda, name, value)
    return made


def call(device="cuda:0"):
    """The arguments of a linear of words128 on a GPU, without values."""
    fmt = parse_spec("awq_w4a16")
    meta = get_layout(words128.NAME, fmt).empty_parts(fmt, (64, 256), torch.device("meta"), torch.float16)
    with FakeTensorMode():
        parts = {name: torch.empty(part.shape, dtype=part.dtype, device=device) for name, part in meta.items()}
        return fmt, torch.empty(1, 256, dtype=torch.float16, device=device), parts, None


def test_a_gpu_that_runs_kernels(machine):
    """A kernel is started once on each GPU; from then on asking costs less than a microsecond."""
    assert usable(FIRST) is None
    assert usable(SECOND) is None
    assert usable(FIRST) is None
    probe = (device_check.SOURCE, device_check.NAME)
    assert machine.launched == [(*probe, device, 1, 32, ()) for device in (FIRST, SECOND)]
    device_check.check()
    assert linear_words.refuses(*call()) is None
    assert min(timeit.repeat(lambda: usable(FIRST), number=200, repeat=50)) / 200 < 1e-6


def test_a_driver_that_cannot_load_the_code(machine):
    """The refusal says what the driver said, both versions and what to do; it is found out once, and Triton runs."""
    machine.broken = (FIRST, SECOND)
    why = usable(FIRST)
    assert "NO_BINARY_FOR_GPU" in why
    assert f"The driver is for CUDA 12.4, the compiler is of CUDA {compiler.nvrtc_version()}: update the driver" in why
    assert linear_words.refuses(*call()) == why
    assert len(machine.launched) == 1
    said = dispatch.explain("linear", "awq_w4a16", words128.NAME, "cuda", call())
    assert said["cuda:linear"] == why
    found = dispatch.select("linear", "awq_w4a16", words128.NAME, "cuda", call())
    assert found.backend != "cuda"
    with pytest.raises(ImportError, match=r"(?s)cuda:0: CUDA kernels do not run on a GPU.*cuda:1: CUDA kernels"):
        device_check.check()


def test_one_gpu_of_two(machine):
    """Where one GPU of the machine runs kernels the backend is there, and refuses the calls of the other one."""
    machine.broken = (FIRST,)
    device_check.check()
    assert "CUDA kernels do not run" in linear_words.refuses(*call("cuda:0"))
    assert linear_words.refuses(*call("cuda:1")) is None


def test_a_newer_driver_that_fails(machine):
    """An error that the driver's age does not explain asks for newer packages."""
    machine.broken, machine.driver = (FIRST,), "99.0"
    assert "update nvidia-cuda-nvrtc" in usable(FIRST)


def test_a_kernel_that_cannot_be_compiled(machine, monkeypatch):
    """A GPU that the compiler does not know is a refusal with the compiler's words."""

    def unknown(*_):
        raise UnsupportedError("device_check.cu does not compile for sm_999: invalid value for --gpu-architecture")

    monkeypatch.setattr(kernels, "launch", unknown)
    assert "invalid value for --gpu-architecture" in usable(FIRST)


@pytest.mark.parametrize(
    ("target", "words"),
    [(Target("cuda", (7, 0)), "compute capability 7.0; CUDA kernels need 7.5"), (Target("hip"), "NVIDIA")],
)
def test_gpus_that_are_too_old_or_of_others(machine, target, words):
    """They are refused without a launch, in words, and so is the backend."""
    machine.target = target
    assert words in usable(FIRST)
    with pytest.raises(ImportError, match="cuda:0"):
        device_check.check()
    assert not machine.launched


def test_while_a_graph_is_captured(machine):
    """A GPU that was never asked is not asked then: that call is refused, nothing is remembered, the backend stays."""
    machine.capturing = True
    assert "call once before" in usable(FIRST)
    device_check.check()
    machine.capturing = False
    assert usable(FIRST) is None
    machine.capturing = True
    assert usable(FIRST) is None


def test_without_a_gpu(machine):
    """On the meta device, and for a target that is assumed, there is nothing to ask."""
    assert usable(torch.device("meta")) is None
    with assume(Target("cuda", (8, 0))):
        assert usable(FIRST) is None
    assert not machine.launched


def test_while_launches_are_recorded(monkeypatch):
    """The check runs then, too, and is not among what is recorded."""
    seen = []
    monkeypatch.setattr(device_check, "_found", {})
    monkeypatch.setattr(gpu, "_read", lambda *_: Target("cuda", (9, 0)))
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    monkeypatch.setattr(torch.cuda, "device", lambda _: contextlib.nullcontext())
    monkeypatch.setattr(kernels, "_enter", lambda _: seen.append("run") or pytest.fail("no GPU"))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "a GPU")
    with kernels.record() as launches, pytest.raises(pytest.fail.Exception):
        usable(FIRST)
    assert seen == ["run"]
    assert not launches


@pytest.mark.parametrize("broken", ["compiler", "driver"])
def test_without_the_backend_the_next_one_runs(machine, monkeypatch, broken):
    """Without NVRTC, and with a driver that is too old, the backend is away as a whole; the next gives the result."""
    if broken == "compiler":
        monkeypatch.setattr(compiler, "_no_nvrtc", lambda: "libnvrtc.so.13 cannot be opened")
    machine.broken = (FIRST, SECOND)
    for name in ("triton", "eager"):  # their kernels are registered once in a process
        dispatch.load(name)
    known = dispatch._STATE.kernels.items()
    eager = {key: [entry for entry in row if entry.backend == "eager"] for key, row in known}
    monkeypatch.setattr(dispatch, "_STATE", dispatch._State(kernels=eager))
    monkeypatch.delitem(sys.modules, "lowbit.backends.cuda")
    words = {"compiler": "NVRTC, the compiler, is not there (libnvrtc", "driver": TOO_OLD}[broken]
    assert words in dispatch.load("cuda")
    fmt = parse_spec("awq_w4a16")
    assert dispatch.preferred_layout("linear", fmt, 64, 256, "cuda") == ""
    packed, _ = packed_weight("awq_w4a16", 64, 256, "")
    parts = dict(zip(fmt.part_names, packed.part_list, strict=True))
    x = activations(2, 256, torch.float32)
    with assume(Target("cuda", (9, 0))):
        found = dispatch.select("linear", "awq_w4a16", "", "cuda", (fmt, x, parts, None)).run(fmt, x, parts, None)
    wanted = x.double() @ fmt.dequantize(parts, (64, 256), torch.float32).double().t()
    torch.testing.assert_close(found.double(), wanted, rtol=1e-5, atol=1e-5 * wanted.abs().max().item())


@pytest.mark.parametrize("entry", entries(), ids=lambda entry: f"{title(entry)}-{entry.run.__name__}")
def test_every_launcher_asks(machine, monkeypatch, entry):
    """Whatever a launcher takes it refuses on a GPU that runs no CUDA kernel."""
    arguments, machine.target = next(_taken(entry))
    monkeypatch.setattr(device_check, "_found", {FIRST: "the driver is too old"})
    with FakeTensorMode():
        assert entry.refuses(*tree_map_only(torch.Tensor, _on_gpu, arguments)) == "the driver is too old"


def _on_gpu(tensor):
    return torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device=FIRST)


def _taken(entry):
    """Examples that an entry takes, and the GPU that it takes them on."""
    for m in (1, 8, 100, 4096):
        for capability in ((9, 0), (8, 0), (12, 0), (10, 0)):
            for _, arguments in examples(entry, Sizes(2048, 2048, m, torch.bfloat16)):
                target = Target("cuda", capability)
                with assume(target):
                    if entry.refuses(*arguments) is None:
                        yield arguments, target
