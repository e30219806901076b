"""A hook of mkdocs: links from the docs to other files of the repository.

On a code host they work as they stand. The site holds the docs alone: with `repo_url` set they lead to the repository,
without it they become plain text. A link to a file that does not exist is left for mkdocs to refuse.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
_LINK = re.compile(r"(?<!!)\[((?:[^\[\]]|\[[^\]]*\])+)\]\((?!\w+:|#)([^()\s]+)\)")


def on_page_markdown(markdown: str, page: Any, config: Any, files: Any) -> str:
    """Mkdocs calls this for every page, before it is rendered."""
    folder = (Path(config["docs_dir"]) / page.file.src_uri).parent
    docs = Path(config["docs_dir"]).resolve()

    def changed(match: re.Match[str]) -> str:
        text, target = match[1], match[2]
        path = (folder / target.partition("#")[0]).resolve()
        if path.is_relative_to(docs) or not path.is_relative_to(ROOT) or not path.exists():
            return match[0]
        if not config["repo_url"]:
            return text
        kind = "tree" if path.is_dir() else "blob"
        return f"[{text}]({config['repo_url'].rstrip('/')}/{kind}/main/{path.relative_to(ROOT).as_posix()})"

    return _LINK.sub(changed, markdown)
