"""The documentation site builds without a warning, and without a network."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """The folder of the built site."""
    pytest.importorskip("mkdocs", reason="the site needs mkdocs-material (extra: docs)")
    pytest.importorskip("material", reason="the site needs mkdocs-material (extra: docs)")
    target = tmp_path_factory.mktemp("site")
    # Python leaves a proxy that is not there to refuse whatever the build would fetch.
    nowhere = dict.fromkeys(("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY"), "http://127.0.0.1:9")
    done = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", target],
        cwd=ROOT, capture_output=True, text=True, check=False,
        env={**os.environ, **nowhere, "NO_MKDOCS_2_WARNING": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    return target


def test_every_page_is_built(site):
    """Every page of the docs is a page of the site, and can be searched."""
    pages = {path.relative_to(ROOT / "docs").with_suffix(".html") for path in (ROOT / "docs").rglob("*.md")}

    assert {page for page in pages if not (site / page).is_file()} == set()
    assert (site / "search/search_index.json").is_file()


def test_the_pages_fetch_nothing(site):
    """No page asks another server for fonts, styles or scripts."""
    for page in site.rglob("*.html"):
        fetched = re.findall(r"<(?:link|script|img)[^>]+(?:href|src)=\"?(https?://[^\"> ]+)", page.read_text())
        assert [address for address in fetched if "preconnect" not in address] == [], page.name


def test_links_out_of_the_docs_are_no_dead_ends(site):
    """No page of the site links to a file of the repository that is not part of the site."""
    for page in site.rglob("*.html"):
        for target in re.findall(r"href=\"?([^\"> #]+)", page.read_text()):
            if not re.match(r"\w+:|/", target):
                assert (page.parent / target).exists(), f"{page.name}: {target}"
