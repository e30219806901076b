from __future__ import annotations

import types

import pytest
import torch

pytest.importorskip("lowbit.backends.cuda", reason="no CUDA compiler", exc_type=ImportError)

from lowbit.backends.cuda import compiler, kernels
from lowbit.errors import UnsupportedError


def test_arguments():
    """Addresses, numbers and nothing are handed over in kinds that cuda.core takes."""
    holder = pytest.importorskip("cuda.core._kernel_arg_handler").ParamHolder
    holder(tuple(map(kernels._argument, (torch.zeros(3), 5, 0.5, None))))


def test_architecture():
    """Capabilities with instructions of their own are compiled for themselves alone, the others for their family."""
    names = {(7, 5): "sm_75", (8, 6): "sm_86", (9, 0): "sm_90a", (10, 0): "sm_100a", (12, 0): "sm_120a"}
    assert {capability: kernels.architecture(capability) for capability in names} == names


def test_launch(monkeypatch):
    """A launch goes to torch's current stream on the tensors' device, and a kernel is loaded there once."""
    said = []
    core = types.SimpleNamespace(
        Stream=types.SimpleNamespace(from_handle=lambda handle: ("stream", handle)),
        LaunchConfig=lambda **sizes: sizes,
        launch=lambda *what: said.append(what),
        Device=lambda index: types.SimpleNamespace(set_current=lambda: said.append(("device", index))),
        ObjectCode=types.SimpleNamespace(
            from_cubin=lambda code: types.SimpleNamespace(get_kernel=lambda symbol: (code, symbol))
        ),
    )
    monkeypatch.setattr(compiler, "core", lambda: core)
    monkeypatch.setattr(compiler, "compiled", lambda *what: compiler.Binary(repr(what).encode(), "symbol"))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (9, 0))
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: types.SimpleNamespace(cuda_stream=7))
    monkeypatch.setattr(torch.cuda, "device", lambda index: _Entered(said, index))
    kernels._loaded.cache_clear()
    x = torch.zeros(2)
    for _ in range(2):
        kernels.launch("a.cu", "f<1>", torch.device("cuda", 1), 3, 64, [x, 2])
    kernels._loaded.cache_clear()
    starts = [what for what in said if what[0] == ("stream", 7)]
    assert len(starts) == 2
    assert starts[0][1] == {"grid": 3, "block": 64, "shmem_size": 0}
    assert starts[0][2] == (b"('a.cu', 'f<1>', 'sm_90a')", "symbol")
    assert starts[0][3] == x.data_ptr()
    assert said.count(("device", 1)) == 1
    assert said.count(("entered", 1)) == 2


def test_shared_memory(monkeypatch):
    """What a kernel wants of shared memory beyond 48 KB is asked for, and an error says that there is too little."""
    asked = []
    driver = types.SimpleNamespace(
        CUfunction_attribute=types.SimpleNamespace(CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES="shared"),
        CUresult=types.SimpleNamespace(CUDA_SUCCESS=0),
        cuKernelSetAttribute=lambda *what: asked.append(what) or (status,),
    )
    monkeypatch.setattr(kernels.importlib, "import_module", lambda _: driver)
    kernel, status = types.SimpleNamespace(handle="h"), 0
    kernels._allow_shared(kernel, "f", 2, 100_000)
    assert asked == [("shared", 100_000, "h", 2)]
    status = types.SimpleNamespace(name="CUDA_ERROR_INVALID_VALUE")
    with pytest.raises(UnsupportedError, match=r"f cannot have 300000 bytes .* GPU 2: CUDA_ERROR_INVALID_VALUE"):
        kernels._allow_shared(kernel, "f", 2, 300_000)


class _Entered:
    def __init__(self, said, index):
        self.said, self.index = said, index

    def __enter__(self):
        self.said.append(("entered", self.index))

    def __exit__(self, *_):
        pass
