"""Run the tests of the GPU kernels: each file in a process of its own, many side by side, within a time.

    scripts/gpu_tests.py LOG [--seconds N] [--jobs N] [--root FOLDER]

A crash of the device ends one file's process alone. At the end of the time what still runs is interrupted, and killed
if that does not help; what passed until then is in LOG, test by test. Ends with 1 if a test failed or had no time.
"""

from __future__ import annotations

import argparse
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO

REPOSITORY = Path(__file__).resolve().parents[1]
SHARES = {"test_graphs.py": 6}  # processes that share the tests of a file that takes long
FOLDERS = ("tests/backends/triton", "tests/backends/cuda")
# The options of a machine that has pytest and little else.
PYTEST = (
    "-m", "pytest", "-v", "--no-showlocals", "--override-ini=filterwarnings=default", "--override-ini=minversion=8",
    "--override-ini=faulthandler_timeout=60", "-p", "no:cacheprovider", "-p", "scripts.gpu_tests",
)  # fmt: skip
NOTHING = 5  # pytest's exit status where it collected no test, or skipped the whole file
SHARE = "LOWBIT_TEST_SHARE"
SHOWN = 30  # lines about failures
_ANY = re.compile("PASSED|SKIPPED|FAILED|ERROR|XFAIL|XPASS")


def pytest_collection_modifyitems(items: list[object]) -> None:
    """As a plugin of those processes: leave every process of a file its share of the tests."""
    index, count = (int(number) for number in os.environ[SHARE].split("/"))
    items[:] = items[index::count]


@dataclass
class File:
    """A test file whose process was started."""

    path: Path
    process: subprocess.Popen[bytes]
    log: IO[bytes]
    cut: bool = False

    def end(self, signal_: int) -> None:
        """Send a signal, if it still runs."""
        if self.process.poll() is None:
            self.cut = True
            self.process.send_signal(signal_)

    @property
    def verdict(self) -> str:
        """What became of it."""
        code = self.process.returncode
        if self.cut:
            return "cut off"
        return "passed" if code in {0, NOTHING} else f"died of signal {-code}" if code < 0 else "failed"


def run(
    files: Sequence[Path], root: Path, seconds: float, jobs: int, grace: float, folder: str
) -> tuple[list[File], list[Path]]:
    """Run every file, `jobs` at once; returns those that were started, and those, or shares of them, that were not."""
    end = time.monotonic() + seconds
    # What is timed while others use the GPU must not be remembered.
    env = {
        **os.environ,
        "LOWBIT_CACHE": folder,
        "PYTHONPATH": f"{REPOSITORY}:{os.environ.get('PYTHONPATH', '')}",
        "PYTHONUNBUFFERED": "1",
        "OMP_NUM_THREADS": "2",
    }
    started: list[File] = []
    counts = {path: SHARES.get(path.name, 1) for path in files}
    waiting = [(path, f"{index}/{count}") for path, count in counts.items() for index in range(count)]
    while time.monotonic() < end:
        free = jobs - sum(one.process.poll() is None for one in started)
        for path, share in waiting[:free]:
            log = (Path(folder) / f"{len(started)}.log").open("w+b")
            command = [sys.executable, *PYTEST, str(path.relative_to(root))]
            process = subprocess.Popen(
                command, cwd=root, env={**env, SHARE: share}, stdout=log, stderr=subprocess.STDOUT
            )
            started.append(File(path, process, log))
        del waiting[: max(0, free)]
        if not waiting and all(one.process.poll() is not None for one in started):
            break
        time.sleep(0.1)
    for which, wait in ((signal.SIGINT, grace), (signal.SIGKILL, grace)):
        for one in started:
            one.end(which)
        end = time.monotonic() + wait
        while any(one.process.poll() is None for one in started) and time.monotonic() < end:
            time.sleep(0.1)
    return started, list(dict.fromkeys(path for path, _ in waiting))


def report(started: Sequence[File], late: Sequence[Path], log: Path) -> int:
    """Write the log, print what failed, and the counts last."""
    passed, bad = 0, []
    with log.open("wb") as whole:
        for one in started:
            one.log.seek(0)
            text = one.log.read()
            one.log.close()
            whole.write(f"==== {one.path}: {one.verdict}\n".encode() + text + b"\n")
            lines = text.decode(errors="replace").splitlines()
            passed += sum(" PASSED" in line for line in lines)
            if one.verdict != "passed":
                named = [line for line in lines if line.startswith(("FAILED", "ERROR"))]
                # A line without a verdict is of the test that the process was in when it ended.
                named += [line for line in lines if "::" in line and not _ANY.search(line)]
                bad.append((one, named))
        for path in late:
            whole.write(f"==== {path}: no time was left\n".encode())
    for one, named in bad:
        print(f"{one.path.name}: {one.verdict}")
        for line in named[: max(1, SHOWN // len(bad))]:
            print(f"  {line[:200]}")
    for path in late:
        print(f"{path.name}: no time was left")
    print(
        f"tests: {passed} passed; of {len(started)} processes {len(bad)} failed; {len(late)} files had no time: {log}"
    )
    return 1 if bad or late or not started else 0


def main(arguments: Sequence[str] | None = None) -> int:
    """Run and report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("log", type=Path)
    parser.add_argument("--seconds", type=float, default=170.0)
    parser.add_argument("--grace", type=float, default=10.0, help="seconds after an interrupt")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--root", type=Path, default=REPOSITORY)
    given = parser.parse_args(arguments)
    files = [path for folder in FOLDERS for path in sorted((given.root / folder).glob("test_*.py"))]
    files.sort(key=lambda path: (SHARES.get(path.name, 1), path.stat().st_size), reverse=True)  # long ones first
    with tempfile.TemporaryDirectory() as folder:
        started, late = run(files, given.root, given.seconds, given.jobs, given.grace, folder)
        return report(started, late, given.log)


if __name__ == "__main__":
    sys.exit(main())
