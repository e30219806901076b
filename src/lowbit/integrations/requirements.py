"""Whether the package that an integration is for is installed, in a version that it works with."""

from __future__ import annotations

import re
from importlib import metadata

from lowbit.errors import DependencyError


def require(package: str, least: str, what: str) -> str:
    """The installed version of a package. Raises `DependencyError` if it is missing or older than `least`.

    `what`: the part of lowbit that needs it, for the message. Versions are compared by their numbers (5.23.0).
    """
    remedy = f"pip install '{package}>={least}'"
    try:
        found = metadata.version(package)
    except metadata.PackageNotFoundError as error:
        raise DependencyError(f"{what} needs {package} {least} or later, which is not installed: {remedy}") from error
    if _numbers(found) < _numbers(least):
        raise DependencyError(f"{what} needs {package} {least} or later, and {found} is installed: {remedy}")
    return found


def _numbers(version: str) -> tuple[int, ...]:
    release = re.match(r"\d+(?:\.\d+)*", version)
    return tuple(map(int, release[0].split("."))) if release else ()
