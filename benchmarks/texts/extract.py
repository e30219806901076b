"""Write reference.txt anew: prose sentences of the Python Language Reference, as the interpreter itself carries it.

    python benchmarks/texts/extract.py

The standard library's `pydoc_data.topics` holds what `help("assignment")` shows. Sentences with code are left out,
marks of emphasis are taken off, and what is left is drawn at random with a fixed seed. Another Python has another
edition of the reference: the file in the repository came from 3.11, and benchmarks read the file, not this program.
"""

from __future__ import annotations

import random
import re
from collections.abc import Iterator
from pathlib import Path
from pydoc_data.topics import topics

TARGET = Path(__file__).with_name("reference.txt")
SENTENCES = 320
WORDS = range(8, 51)
SEED = 0
PROSE = re.compile(r"[A-Z][A-Za-z0-9 ,;:'()/-]*[a-z)]\.")
MARKS = re.compile(r"\*\*?(?=\S)|(?<=\S)\*\*?|\"")
END = re.compile(r"(?<=[a-z)]\.)\s+(?=[A-Z])")


def main() -> None:
    """Draw the sentences and write them, one a line."""
    found = sorted({sentence for text in topics.values() for sentence in sentences(text)})
    random.Random(SEED).shuffle(found)
    TARGET.write_text("".join(f"{sentence}\n" for sentence in found[:SENTENCES]), encoding="utf-8")
    print(f"{TARGET.name}: {min(SENTENCES, len(found))} of {len(found)} sentences")


def sentences(text: str) -> Iterator[str]:
    """Sentences of a topic that are prose: whole paragraphs are joined first, their indentation and bullets removed."""
    for paragraph in re.split(r"\n\s*\n", text):
        lines = [line.strip() for line in paragraph.splitlines()]
        joined = " ".join(lines).removeprefix("* ").replace("’", "'").replace("‘", "'")
        joined = joined.replace("“", "").replace("”", "").replace("built- in", "built-in")
        for sentence in END.split(joined):
            clean = re.sub(r"\s+", " ", MARKS.sub("", sentence)).strip()
            if PROSE.fullmatch(clean) and len(clean.split()) in WORDS and not _is_code(clean):
                yield clean


def _is_code(sentence: str) -> bool:
    """Whether calls, hyphens left by line breaks, or cross references make it more than prose."""
    return bool(re.search(r"\w\(|\(\)|- |\bSee \b|\bPEP\b|[a-z][A-Z]|::|  ", sentence))


if __name__ == "__main__":
    main()
