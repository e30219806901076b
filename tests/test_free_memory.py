"""Free memory where control groups allow less than the machine has: a container, a service, a job of a cluster."""

from __future__ import annotations

import sys
from types import SimpleNamespace

import pytest
import torch

from lowbit import devices

GIB = 2**30
FREE = 64 * GIB
V1_NONE = 9223372036854771712  # how version 1 says that there is no limit
CPU = torch.device("cpu")


@pytest.fixture
def groups(monkeypatch, tmp_path):
    """Makes a tree of limits in GiB by the folder of the group, and names the groups of this process."""
    fake = SimpleNamespace(
        virtual_memory=lambda: SimpleNamespace(available=FREE),
        Process=lambda: SimpleNamespace(memory_info=lambda: SimpleNamespace(rss=GIB)),
    )
    monkeypatch.setitem(sys.modules, "psutil", fake)
    monkeypatch.setattr(devices.util, "find_spec", lambda _: fake)

    def made(own: str, v2: dict[str, str | int] | None = None, v1: dict[str, int] | None = None):
        folder = tmp_path / "fs"
        files = {folder / group / "memory.max": limit for group, limit in (v2 or {}).items()}
        files |= {folder / "memory" / group / "memory.limit_in_bytes": limit for group, limit in (v1 or {}).items()}
        for path, limit in files.items():
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(f"{limit if isinstance(limit, str) or limit == V1_NONE else limit * GIB}\n")
        (tmp_path / "own").write_text(own)
        limits = (str(folder / "memory.max"), str(folder / "memory" / "memory.limit_in_bytes"))
        monkeypatch.setattr(devices, "_LIMITS", limits)
        monkeypatch.setattr(devices, "_OWN_GROUPS", str(tmp_path / "own"))

    return made


V1_OWN = "9:name=systemd:/user\n4:cpu,memory:/batch/job_7\n0::/\n"


@pytest.mark.parametrize(
    ("own", "v2", "v1", "limit"),
    [
        ("0::/\n", {"": 8}, {}, 8),  # a container: its group is the outermost that it sees
        ("0::/system.slice/lowbit.service\n", {"system.slice/lowbit.service": 8}, {}, 8),
        ("0::/a/b\n", {"a": 4, "a/b": 8}, {}, 4),
        ("0::/a/b\n", {"a": 8, "a/b": "max"}, {}, 8),
        ("0::/a/b:c\n", {"a/b:c": 8, "other": 2, "a/other": 2}, {}, 8),
        ("0::/docker/0f3a\n", {"": 8}, {}, 8),  # named as the machine names it, which the container does not see
        ("0::/a\n", {"a": "max"}, {}, None),
        (V1_OWN, {}, {"": V1_NONE, "batch": 16, "batch/job_7": 8, "user": 2}, 8),
        (V1_OWN, {}, {"": V1_NONE, "batch": V1_NONE, "batch/job_7": V1_NONE}, None),
        (V1_OWN, {}, {"": 8}, 8),
        ("", {}, {}, None),
    ],
)
def test_the_tightest_limit_from_the_own_group_up_counts(groups, own, v2, v1, limit):
    """Without what the process holds; that of other groups does not count."""
    groups(own, v2, v1)
    assert devices.free_bytes(CPU) == (FREE if limit is None else (limit - 1) * GIB)


def test_a_system_without_groups_has_no_limit(groups, monkeypatch, tmp_path):
    """As macOS and Windows."""
    groups("0::/\n", {"": 8})
    monkeypatch.setattr(devices, "_LIMITS", (str(tmp_path / "no"), str(tmp_path / "none")))
    monkeypatch.setattr(devices, "_OWN_GROUPS", str(tmp_path / "nowhere"))
    assert devices.free_bytes(CPU) == FREE
