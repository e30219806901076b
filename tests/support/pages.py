"""What a page of a report must be: well-formed, of itself alone, in light and in dark."""

from __future__ import annotations

import re
from html.parser import HTMLParser

_VOID = {"meta", "wbr", "line", "circle", "br", "input"}


class _Balance(HTMLParser):
    """Notices a tag that is closed by another."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []

    def handle_starttag(self, tag: str, attrs: object) -> None:
        """Open a tag."""
        if tag not in _VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: object) -> None:
        """A tag that closes itself."""

    def handle_endtag(self, tag: str) -> None:
        """Close the tag opened last."""
        if tag not in _VOID:
            assert self.open.pop() == tag


def assert_sound(text: str, *, scripts: bool = False) -> None:
    """The page is well-formed, needs nothing from outside, has a style for light and for dark, and draws no NaN.

    `scripts`: it may have some.
    """
    parser = _Balance()
    parser.feed(text)
    assert parser.open == []
    assert not re.search(r"(src|href)=|https?:|@import|url\(", text)
    assert scripts or "<script" not in text
    assert "prefers-color-scheme: dark" in text
    drawn = re.sub(r'data-v="-?(inf|nan)"', "", text.partition("<script>")[0])
    assert not re.search(r"(nan|inf)(%|px|\")", drawn)
