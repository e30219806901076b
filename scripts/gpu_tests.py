"""Run the tests of the GPU kernels: each file in a process of its own, many side by side, within a time.

    scripts/gpu_tests.py LOG [--seconds N] [--jobs N] [--root FOLDER]

A process that dies, stays in a test, or whose GPU answers nothing but errors after a test that failed, loses that test
alone: another goes on with the next. At the end of the time what still runs is interrupted, and killed if that does not
help; what passed until then is in LOG, test by test. Ends with 1 if a test failed or had no time.

No tile shape is timed: each shape of a test takes one of those that tuning would try, another one each, so that all of
them are run, and few are compiled.
"""

from __future__ import annotations

import argparse
import faulthandler
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import pytest

REPOSITORY = Path(__file__).resolve().parents[1]
# Processes that share the tests of a file that takes long: with Triton nearly all of it is compiling.
SHARES = {
    "test_graphs.py": 6, "test_on_gpu.py": 6, "test_linear_awq_w4a16.py": 4, "test_linear_fp8_activations.py": 4,
    "test_linear_int8.py": 4, "test_linear_words.py": 3, "test_linear_nibbles.py": 3, "test_scaled_mm.py": 3,
    "test_linear_svdquant_w4a4.py": 3, "test_int4_plain_mm.py": 3, "test_w4a8_codebook.py": 3, "test_linear_gguf.py": 3,
    "test_linear_nvfp4.py": 2, "test_linear_wna16.py": 2, "test_linear_mxfp8.py": 2, "test_linear_fp8.py": 2,
}  # fmt: skip
WITHOUT_GPU = ("test_compiles.py",)  # compile for any GPU, for minutes: CI does that
FOLDERS = ("tests/backends/triton", "tests/backends/cuda")
# The options of a machine that has pytest and little else.
PYTEST = (
    "-m", "pytest", "-v", "--no-showlocals", "--override-ini=filterwarnings=default", "--override-ini=minversion=8",
    "-p", "no:cacheprovider", "-p", "no:faulthandler", "-p", "scripts.gpu_tests",
)  # fmt: skip
NOTHING = 5  # pytest's exit status where it collected no test, or skipped the whole file
SHARE, BEGUN = "LOWBIT_TEST_SHARE", "LOWBIT_TESTS_BEGUN"
LONGEST = float(os.environ.get("LOWBIT_TEST_LONGEST", "60"))  # seconds of a test
ENDED = "the last one has ended"  # the line behind those of the tests that were begun
MOST_PROCESSES = 8  # of a share, one after the other
_TUNED_ITSELF = "test_tuning.py"
SHOWN = 30  # lines about failures
_ANY = re.compile("PASSED|SKIPPED|FAILED|ERROR|XFAIL|XPASS")


# ---- as a plugin of those processes ---------------------------------------------------------------------------------


def pytest_collection_finish(session: pytest.Session) -> None:
    """Have no tile shape timed, but where the tests are of that. What they want of Triton is imported by now."""
    tuning = sys.modules.get("lowbit.backends.triton.tuning")
    if tuning is not None and not any(_TUNED_ITSELF in one for one in session.config.args):
        _take_any_tile(tuning)


def pytest_collection_modifyitems(items: list[object]) -> None:
    """Leave every process of a file its share of the tests, without those that a process before it began."""
    index, count = (int(number) for number in os.environ[SHARE].split("/"))
    items[:] = items[index::count][len(_begun(os.environ.get(BEGUN))) :]


def pytest_runtest_logstart(nodeid: str) -> None:
    """Note that a test begins, and end the process if it does not end."""
    _note(nodeid)
    faulthandler.dump_traceback_later(LONGEST, exit=True, file=sys.__stderr__)


def pytest_runtest_logfinish() -> None:
    """The test has ended."""
    faulthandler.cancel_dump_traceback_later()


@pytest.hookimpl(trylast=True)
def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    """After a test that failed, end the process if the GPU is lost to it."""
    if report.failed and (why := _lost_gpu()) is not None:
        print(f"\n{report.longreprtext[-4000:]}\nthe GPU answers nothing but errors: {why}", flush=True)
        os._exit(1)


def pytest_sessionfinish() -> None:
    """Note that there are no more tests."""
    _note(ENDED)


def _note(line: str) -> None:
    if path := os.environ.get(BEGUN):
        with Path(path).open("a") as file:
            file.write(f"{line}\n")


def _begun(path: str | Path | None) -> list[str]:
    """What processes of a share noted."""
    return Path(path).read_text().splitlines() if path and Path(path).exists() else []


def _lost_gpu() -> str | None:
    """What the GPU says where it answers nothing but errors, or None."""
    torch = sys.modules.get("torch")
    try:
        if torch is not None and torch.cuda.is_available():
            torch.cuda.synchronize()
    except RuntimeError as error:
        return str(error).partition("\n")[0]
    return None


def _take_any_tile(tuning: Any) -> None:
    """Have tuning take the first tile shape that runs, from one on that the shape of the call draws."""
    measure = tuning.TunedKernel._measure  # noqa: SLF001

    def take(self: Any, grid: Any, arguments: Any, configs: Sequence[Any]) -> tuple[Any, bool]:
        drawn = repr([self.name, *(tuning._plain(arguments[name]) for name in self.key)])  # noqa: SLF001
        first = zlib.crc32(drawn.encode()) % len(configs)
        for config in (*configs[first:], *configs[:first]):
            try:
                return measure(self, grid, arguments, [config])[0], False
            except tuning.UnsupportedError as error:  # noqa: PERF203  (too much shared memory, for one)
                failed = error
        raise failed

    tuning.TunedKernel._measure = take  # noqa: SLF001
    tuning.do_bench = lambda run, **_: run() or 0.0


# ---- as the program that starts them --------------------------------------------------------------------------------


@dataclass
class File:
    """A test file whose process was started."""

    path: Path
    share: str
    begun: Path
    process: subprocess.Popen[bytes]
    log: IO[bytes]
    cut: bool = False
    followed: bool = False
    """Whether another process goes on where this one ended."""

    @property
    def ended_early(self) -> bool:
        """Whether it ended before its last test did, by itself."""
        return not self.cut and self.process.poll() is not None and ENDED not in _begun(self.begun)

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
        if code > 0 and self.followed:
            return "ended in the middle"
        return "passed" if code in {0, NOTHING} else f"died of signal {-code}" if code < 0 else "failed"


def _start(path: Path, share: str, root: Path, env: Mapping[str, str], folder: Path, number: int) -> File:
    """Start a process for a share of the tests of a file; those that one before it began are left out."""
    log = (folder / f"{number}.log").open("w+b")
    begun = folder / f"{path.parent.name}-{path.stem}-{share.replace('/', '-')}.begun"
    command = [sys.executable, *PYTEST, str(path.relative_to(root))]
    given = {**env, SHARE: share, BEGUN: str(begun)}
    process = subprocess.Popen(command, cwd=root, env=given, stdout=log, stderr=subprocess.STDOUT)
    return File(path, share, begun, process, log)


def run(
    files: Sequence[Path], root: Path, seconds: float, jobs: int, grace: float, folder: str
) -> tuple[list[File], list[Path]]:
    """Run every file, `jobs` at once, and go on behind tests that end their process.

    Returns what was started, and what was not, or not all shares of it.
    """
    end = time.monotonic() + seconds
    # What is timed while others use the GPU must not be remembered.
    env = {
        **os.environ,
        "LOWBIT_CACHE": folder,
        "PYTHONPATH": f"{REPOSITORY}:{os.environ.get('PYTHONPATH', '')}",
        "PYTHONUNBUFFERED": "1",
        "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1",  # none is needed, and whatever else a machine has may do as it likes
        "OMP_NUM_THREADS": "2",
    }
    started: list[File] = []
    counts = {path: SHARES.get(path.name, 1) for path in files}
    waiting = [(path, f"{index}/{count}") for path, count in counts.items() for index in range(count)]
    while time.monotonic() < end:
        over = all(one.process.poll() is not None for one in started)  # before it is looked at how they ended
        for one in started:
            if one.ended_early and not one.followed:
                one.followed = True
                if sum(other.begun == one.begun for other in started) < MOST_PROCESSES and _begun(one.begun):
                    waiting.insert(0, (one.path, one.share))
        free = max(0, jobs - sum(one.process.poll() is None for one in started))
        if over and not waiting:
            break
        for path, share in waiting[:free]:
            started.append(_start(path, share, root, env, Path(folder), len(started)))
        del waiting[:free]
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
    files = [path for path in files if path.name not in WITHOUT_GPU]
    files.sort(key=lambda path: (SHARES.get(path.name, 1), path.stat().st_size), reverse=True)  # long ones first
    with tempfile.TemporaryDirectory() as folder:
        started, late = run(files, given.root, given.seconds, given.jobs, given.grace, folder)
        return report(started, late, given.log)


if __name__ == "__main__":
    sys.exit(main())
