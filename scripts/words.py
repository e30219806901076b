"""Find text that must not be in the repository: marks of unfinished work, unresolved merges, and paths of one machine.

The patterns are put together from pieces so that this file does not match itself.
"""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
MARKS = ("TO" + "DO", "FIX" + "ME", "X" + "XX", "HA" + "CK")
RULES = {
    "a mark of unfinished work: do it, or write an issue": re.compile(rf"\b(?:{'|'.join(MARKS)})\b"),
    "an unresolved merge": re.compile(r"^(?:<{7}|>{7}|={7}$)", re.MULTILINE),
    "a path of somebody's machine": re.compile(r"(?<![\w.])/(?:root|home/\w+|Users/\w+|work|workspace|opt/\w+)/"),
    "a hard-coded package index: pip's own settings name it": re.compile(r"--(?:extra-)?index-url[= ]+https?:"),
}


def tracked() -> list[str]:
    """Every file that git knows or would add."""
    listing = ("git", "ls-files", "-z", "--cached", "--others", "--exclude-standard")
    names = subprocess.run(listing, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    return sorted(name for name in names.split("\0") if name and (ROOT / name).is_file())


def rules() -> dict[str, re.Pattern[str]]:
    """RULES, and the folder that this checkout lies in, unless that is one that many machines have (such as /tmp)."""
    here = ROOT.parent
    if len(here.parts) < 3:
        return RULES
    return {**RULES, "a path of this machine": re.compile(re.escape(f"{here}/"))}


def findings(name: str, text: str) -> Iterator[str]:
    """What is wrong in one file, one line each."""
    if Path(name).name == "utils.py":
        yield f"{name}: a file is named after its concept"
    for what, pattern in rules().items():
        for match in pattern.finditer(text):
            line = text.count("\n", 0, match.start()) + 1
            yield f"{name}:{line}: {what}: {match.group()!r}"


def main() -> int:
    """Print every finding; 1 if there is any."""
    found = []
    for name in tracked():
        try:
            text = (ROOT / name).read_text(encoding="utf-8")
        except UnicodeDecodeError:  # a binary file has no words
            continue
        found += findings(name, text)
    for line in found:
        print(line)
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
