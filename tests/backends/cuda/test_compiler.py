from __future__ import annotations

import importlib.metadata

import pytest

pytest.importorskip("lowbit.backends.cuda", reason="no CUDA compiler", exc_type=ImportError)

from lowbit.backends.cuda import compiler
from lowbit.errors import UnsupportedError

NAME = "lowbit::linear_words<lowbit::kIntegers, lowbit::kFloat16, lowbit::kHalfScale, true, 4, 1, 8>"


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
