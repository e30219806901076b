r"""Text from files on a terminal, where control characters would move the cursor, set colours or a window's title.

>>> print(printable("layer\x1b[2J\x07.weight"))
layer\x1b[2J\x07.weight
"""

from __future__ import annotations


def printable(text: str, *, lines: bool = False) -> str:
    r"""Text with everything that is no visible character escaped as `repr` would. `lines`: "\n" stays."""
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() or (lines and c == "\n") else repr(c)[1:-1] for c in text)
