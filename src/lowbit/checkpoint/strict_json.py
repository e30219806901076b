"""JSON as checkpoints need it: an object at the top, UTF-8, and no name twice.

Python's parser keeps the last of two equal names and drops the first without a word.
In a checkpoint that is a lost layer.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any


class DuplicateNameError(ValueError):
    """One JSON object has the same name twice. `name` is that name."""

    def __init__(self, name: str) -> None:
        super().__init__(f"the name {name!r} stands twice in one object")
        self.name = name


def _unique_object(pairs: Sequence[tuple[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, value in pairs:
        name.encode()  # a lone surrogate (an escape such as \ud800) is no text: nothing could print or write it
        if name in found:
            raise DuplicateNameError(name)
        found[name] = value
    return found


def parse_object(raw: bytes) -> dict[str, Any]:
    """Parse UTF-8 JSON text whose top level is an object.

    Raises:
        DuplicateNameError: an object, at any depth, has one name twice.
        ValueError: the text is not UTF-8, not JSON, nested too deeply, or not an object; the message says which.
    """
    try:
        parsed = json.loads(raw.decode("utf-8"), object_pairs_hook=_unique_object)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None
    except DuplicateNameError:
        raise
    except UnicodeError:
        raise ValueError("it is not UTF-8 text") from None
    except ValueError as error:
        raise ValueError(f"it is not JSON: {error}") from None
    if not isinstance(parsed, dict):
        raise ValueError(f"it is a JSON {type(parsed).__name__}, not an object")  # noqa: TRY004
    return parsed
