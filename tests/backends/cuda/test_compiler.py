from __future__ import annotations

import importlib.metadata

import pytest
import torch

pytest.importorskip("lowbit.backends.cuda", reason="no CUDA compiler", exc_type=ImportError)

from lowbit.backends.cuda import compiler, int4_plain_mm, kernels, linear_words
from lowbit.backends.gpu import Target, assume
from lowbit.errors import UnsupportedError
from lowbit.formats import parse_spec
from lowbit.layouts import words128

ARCHITECTURES = {"sm_80": (8, 0), "sm_90a": (9, 0), "sm_120a": (12, 0)}
SPECS = (
    "awq_w4a16", "awq_w4a16(group_size=16)", "awq_w4a16(group_size=32)", "awq_w4a16(group_size=128)", "wna16", "nvfp4",
    "mxfp4",
)  # fmt: skip
NAME = "lowbit::linear_words<lowbit::kIntegers, lowbit::kFloat16, lowbit::kHalfScale, true, 4, 1, 8>"


def launches(spec: str, dtype: torch.dtype, capability: tuple[int, int]) -> set[kernels.Launch]:
    """What a linear of this format launches, for small and large weights."""
    fmt, found = parse_spec(spec), set()
    for n in (3072, 18432):
        plain = fmt.empty_parts((n, 3072), torch.device("meta"), dtype)
        parts = words128.pack(
            fmt, {key: part.to(dtype) if part.dtype.itemsize == 2 else part for key, part in plain.items()}
        )
        x = torch.empty(1, 3072, dtype=dtype, device="meta")
        with assume(Target("cuda", capability)), kernels.record() as made:
            assert linear_words.refuses(fmt, x, parts, None) is None
            linear_words.linear(fmt, x, parts, None)
        found |= set(made)
    return found


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("spec", SPECS)
def test_compiles(spec, architecture):
    """Every variant that is launched compiles for every architecture without a warning, and keeps to its registers."""
    for dtype in (torch.bfloat16, torch.float16):
        for launch in launches(spec, dtype, ARCHITECTURES[architecture]):
            made = compiler.compile_now(launch.source, launch.name, architecture)
            assert not made.warnings
            assert not made.spills, launch.name
            assert 0 < made.registers <= 255


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_int4_plain_mm_compiles(architecture):
    """Every variant of W4A8 decode compiles for every architecture without a warning or a spill."""
    meta = torch.device("meta")
    with assume(Target("cuda", ARCHITECTURES[architecture])), kernels.record() as made:
        for dtype in (torch.float32, torch.bfloat16, torch.float16):
            scale = torch.empty(4096, 128, dtype=dtype, device=meta)
            qdata = torch.empty(4096, 2048, dtype=torch.uint8, device=meta)
            for m in (1, 2, 4, 8):
                x = torch.empty(m, 4096, dtype=dtype, device=meta)
                assert int4_plain_mm.refuses(x, qdata, scale, scale, None, 32) is None
                int4_plain_mm.int4_plain_mm(x, qdata, scale, scale, None, 32)
    for launch in set(made):
        found = compiler.compile_now(launch.source, launch.name, architecture)
        assert not found.warnings
        assert not found.spills, launch.name


def test_kept_on_disk(tmp_path, monkeypatch):
    """A kernel is compiled once; an entry that was cut short or changed is compiled again, and replaced."""
    monkeypatch.setenv("LOWBIT_CACHE", str(tmp_path))
    first = compiler.compiled("linear_words.cu", NAME, "sm_80")
    (entry,) = (tmp_path / "cuda").iterdir()
    whole = entry.read_bytes()
    monkeypatch.setattr(compiler, "compile_now", lambda *_: pytest.fail("compiled again"))
    assert compiler.compiled("linear_words.cu", NAME, "sm_80") == compiler.Binary(first.code, first.symbol)
    monkeypatch.undo()
    monkeypatch.setenv("LOWBIT_CACHE", str(tmp_path))
    for broken in (whole[:-7], b"", whole[:40] + b"\0" + whole[41:]):
        entry.write_bytes(broken)
        again = compiler.compiled("linear_words.cu", NAME, "sm_80")  # not the same bytes: the compiler numbers its runs
        assert again.symbol == first.symbol
        assert len(entry.read_bytes()) > len(again.code) > 1000
        assert again.code in entry.read_bytes()


def test_unwritable_cache(tmp_path, monkeypatch):
    """A cache folder that cannot be written is no error."""
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("LOWBIT_CACHE", str(tmp_path / "file"))
    assert compiler.compiled("linear_words.cu", NAME, "sm_80").code


def test_errors_name_the_kernel(tmp_path, monkeypatch):
    """What does not compile is an error with the kernel, the architecture and the compiler's words."""
    monkeypatch.setenv("LOWBIT_CACHE", str(tmp_path))
    with pytest.raises(
        UnsupportedError, match=r"(?s)linear_words<9> of linear_words.cu does not compile for sm_90a.*error"
    ):
        compiler.compiled("linear_words.cu", "lowbit::linear_words<9>", "sm_90a")
    assert not (tmp_path / "cuda").exists()


def test_missing_compiler(monkeypatch):
    """Without the compiler or the headers the import says what to install."""
    monkeypatch.setattr(compiler.importlib.util, "find_spec", lambda _: None)
    with pytest.raises(ImportError, match=r"cuda\.core is not installed.*pip install"):
        compiler.check()
    monkeypatch.undo()

    def missing(name):
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "files", missing)
    monkeypatch.setattr(compiler, "_TOOLKIT", compiler.FOLDER / "nowhere")
    monkeypatch.setattr(compiler, "_headers", compiler._headers.__wrapped__)
    with pytest.raises(ImportError, match="no CUDA headers"):
        compiler.check()
