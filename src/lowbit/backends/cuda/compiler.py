"""CUDA C++ to machine code by NVRTC, kept on disk: no CUDA toolkit, and no GPU where nothing runs.

What a kernel was compiled from is its key: the source with every header of this folder, the template arguments, the
architecture and the compiler's version. Entries are written as a whole and carry a digest, so that one cut short, or
changed, is compiled again. `LOWBIT_CACHE` names the folder.
"""

from __future__ import annotations

import hashlib
import importlib
import importlib.metadata
import importlib.util
import io
import re
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from lowbit.backends.cache import cache_folder, write_whole
from lowbit.errors import UnsupportedError

FOLDER = Path(__file__).parent
_HEADERS = FOLDER / "device"
_DIGEST = hashlib.sha256().digest_size
_TOOLKIT = Path("/usr/local/cuda/include")
_INSTALL = "pip install 'lowbit[cuda]'"


def check() -> None:
    """Raise `ImportError`, saying what to install, unless there is a compiler."""
    if not _is_there("cuda.core"):
        raise ImportError(f"cuda.core is not installed, which compiles and launches CUDA kernels; {_INSTALL}")
    if _headers() is None:
        raise ImportError(f"no CUDA headers: the package nvidia-cuda-runtime is not installed; {_INSTALL}")


def _is_there(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:  # not even the package around it
        return False


@cache
def _headers() -> Path | None:
    """The folder with cuda_fp16.h, of the pip packages or of a toolkit."""
    for package in ("nvidia-cuda-runtime", "nvidia-cuda-runtime-cu13", "nvidia-cuda-runtime-cu12"):
        try:
            found = importlib.metadata.files(package) or ()
        except importlib.metadata.PackageNotFoundError:
            continue
        for file in found:
            if file.name == "cuda_fp16.h":
                return Path(str(file.locate())).parent
    return _TOOLKIT if (_TOOLKIT / "cuda_fp16.h").exists() else None


@dataclass(frozen=True)
class Binary:
    """A compiled kernel. `log` is what the assembler said, of registers and spills; "" for one read from disk."""

    code: bytes
    symbol: str
    log: str = ""

    @property
    def registers(self) -> int:
        """Registers a thread, from the log."""
        return _number(r"Used (\d+) registers", self.log)

    @property
    def spills(self) -> int:
        """Bytes a thread that left the registers, from the log."""
        stored, loaded = r"(\d+) bytes spill stores", r"(\d+) bytes spill loads"
        return _number(stored, self.log) + _number(loaded, self.log)

    @property
    def warnings(self) -> list[str]:
        """Lines of the log that warn."""
        return [line for line in self.log.splitlines() if "warning" in line.lower()]


def _number(pattern: str, text: str) -> int:
    found = re.search(pattern, text)
    if found is None:
        raise ValueError(f"the compiler's log does not say {pattern!r}")
    return int(found[1])


def compiled(source: str, name: str, architecture: str) -> Binary:
    """The kernel `name` (a C++ expression such as `f<8>`) of a file of this folder, from disk or the compiler.

    Raises `UnsupportedError` with the compiler's words when it does not compile.
    """
    entry = cache_folder("cuda") / f"{Path(source).stem}-{architecture}-{_key(source, name, architecture)}.bin"
    found = _read(entry)
    if found is None:
        found = compile_now(source, name, architecture)
        content = found.symbol.encode() + b"\0" + found.code
        write_whole(entry, hashlib.sha256(content).digest() + content)
    return found


def compile_now(source: str, name: str, architecture: str) -> Binary:
    """The same without the disk, and with the assembler's log."""
    cuda = core()
    headers = _headers()
    if headers is None:
        raise UnsupportedError(f"{source} cannot be compiled: there are no CUDA headers; {_INSTALL}")
    options = cuda.ProgramOptions(
        arch=architecture, std="c++17", include_path=[str(_HEADERS), str(headers), str(headers / "cccl")],
        ptxas_options=["-v"], minimal=False,
    )  # fmt: skip
    log = io.StringIO()
    try:
        program = cuda.Program((FOLDER / source).read_text(), "c++", options=options)
        made = program.compile("cubin", name_expressions=(name,), logs=log)
    except Exception as error:  # cuda.core raises its own kinds, which differ between versions
        raise UnsupportedError(
            f"the CUDA kernel {name} of {source} does not compile for {architecture}: {error}\n{log.getvalue()}"
        ) from error
    symbol = made.symbol_mapping[name]
    return Binary(bytes(made.code), symbol if isinstance(symbol, str) else symbol.decode(), log.getvalue())


def _read(entry: Path) -> Binary | None:
    try:
        content = entry.read_bytes()
    except OSError:
        return None
    body = content[_DIGEST:]
    if hashlib.sha256(body).digest() != content[:_DIGEST]:
        return None
    symbol, _, code = body.partition(b"\0")
    return Binary(code, symbol.decode())


@cache
def _key(source: str, name: str, architecture: str) -> str:
    parts = [FOLDER / source, *sorted(_HEADERS.glob("*.cuh"))]
    digest = hashlib.sha256(f"{name}\0{architecture}\0{_version()}".encode())
    for part in parts:
        digest.update(b"\0" + part.read_bytes())
    return digest.hexdigest()[:24]


@cache
def _version() -> str:
    """The versions that what is compiled depends on."""
    packages = ("cuda-core", "cuda-bindings", "nvidia-cuda-nvrtc", "nvidia-cuda-runtime")
    return ", ".join(f"{package} {_installed(package)}" for package in packages)


def _installed(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "of the system"


@cache
def core() -> Any:
    """The module cuda.core, under the name that it had before its first release, too."""
    core = importlib.import_module("cuda.core")
    return core if hasattr(core, "Program") else importlib.import_module("cuda.core.experimental")
