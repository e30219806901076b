from __future__ import annotations

from pathlib import Path

from lowbit.backends.cache import cache_folder, write_whole


def test_folder(monkeypatch, tmp_path):
    """LOWBIT_CACHE names the folder, else it lies in the user's cache."""
    monkeypatch.setenv("LOWBIT_CACHE", str(tmp_path))
    assert cache_folder("cuda") == tmp_path / "cuda"
    monkeypatch.delenv("LOWBIT_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cache_folder("cuda") == tmp_path / "lowbit" / "cuda"


def test_no_home(monkeypatch):
    """A user without a home, as containers have them, keeps nothing, and that is no error."""

    def none(_):
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("LOWBIT_CACHE", raising=False)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setattr(Path, "expanduser", none)
    folder = cache_folder("cuda")
    write_whole(folder / "entry", b"content")
    assert not folder.exists()
    assert not (folder / "entry").exists()


def test_a_failed_write_leaves_nothing(monkeypatch, tmp_path):
    """A full disk is no error, keeps the old entry and leaves no part of a new one."""
    path = tmp_path / "folder" / "entry"
    write_whole(path, b"old")

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "replace", full)
    write_whole(path, b"new")
    assert [file.name for file in path.parent.iterdir()] == ["entry"]
    assert path.read_bytes() == b"old"
