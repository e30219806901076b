"""The HTML pages: complete, well-formed, alone, and safe for any name."""

from __future__ import annotations

import pytest

from lowbit.errors import WriteError
from lowbit.report import (
    Agreement,
    ComparisonPage,
    ConversionPage,
    KeptGroup,
    LayerRow,
    Variant,
    write_comparison,
    write_conversion,
)
from lowbit.report.comparison import comparison_html
from lowbit.report.conversion import conversion_html
from tests.support.pages import assert_sound


def layer(name, sqnr=21.5, spec="nvfp4"):
    """One quantized layer."""
    return LayerRow(name, spec, "rtn", (64, 128), 16384, 4608, 0.01, sqnr, None if sqnr is None else 0.99)


def conversion(groups):
    """The page of a conversion with these layers."""
    kept = [KeptGroup("norm", 4, "bfloat16, as it is", (64,), 512, "1-D")]
    return ConversionPage("a.safetensors", "b.safetensors", groups, kept, "none", ["a note"], 100_000, 40_000, 1.5)


def variant(spec, count, cosines, **more):
    """One format of a comparison."""
    values = {"groups": {"attn.q": 21.0, "mlp": 22.0}, **more}
    return Variant(spec, "rtn", count, 0.5, 0.2, 4.5, 21.5, 20.0, "attn.q", Agreement(tuple(cosines), 0.9), **values)


def comparison(variants):
    """The page that compares these formats on two sentences."""
    return ComparisonPage(
        "a model", 4000, "float32", 1000, 0.1, variants, ("One.", "Two."), {"torch": "2"}, "lowbit demo", 3.0
    )


def test_a_conversion_shows_every_layer_and_every_reason():
    """Groups, layers, formats and what was kept are all there."""
    page = conversion(
        [("blocks.*.q", [layer("blocks.0.q"), layer("blocks.1.q", 19.25)]), ("head", [layer("head", 30.0, "int8")])]
    )

    text = conversion_html(page)

    assert_sound(text)
    for word in ("blocks.*.q", "blocks.1.q", "head", "int8", "19.2 dB", "1-D", "a note"):
        assert word in text
    assert text.count("<circle") == 3


@pytest.mark.parametrize("sqnr", [None, float("inf"), float("-inf")])
def test_a_conversion_without_numbers_is_still_a_page(sqnr):
    """Nothing verified, nothing lost and nothing left are shown in words."""
    text = conversion_html(conversion([("a", [layer("a", sqnr)])]))

    assert_sound(text)
    assert {None: "not measured", float("inf"): "exact", float("-inf"): "no signal"}[sqnr] in text


def test_names_cannot_bring_markup_into_a_page():
    """A layer's name is text, whatever it holds."""
    evil = "<script>alert(1)</script>"

    assert_sound(conversion_html(conversion([(evil, [layer(evil)])])))
    assert_sound(comparison_html(comparison([variant("nvfp4", 1000, (0.9, 0.95), groups={evil: 1.0})])))


def test_a_comparison_shows_every_format_and_every_sentence():
    """Each format has a dot in both pictures and a row in the table; sentences stand in order of their worst cosine."""
    page = comparison([variant("nvfp4", 1000, (0.98, 0.91)), variant("int8(rotation=64)", 2000, (0.999, 0.9995))])

    text = comparison_html(page)

    assert_sound(text)
    assert text.count("<circle") == 4
    assert text.index("Two.") < text.index("One.")
    assert "int8(rotation=64)" in text


@pytest.mark.parametrize("cosines", [(1.0, 1.0), (-1.0, 0.0), (0.5, 1.0)])
def test_a_comparison_of_one_format_at_the_ends_of_the_scale(cosines):
    """Perfect and hopeless embeddings have a place too."""
    assert_sound(comparison_html(comparison([variant("nvfp4", 1000, cosines)])))


def test_a_place_that_cannot_be_written_is_an_error_that_names_it(tmp_path):
    """Both pages raise a `WriteError`."""
    place = tmp_path / "nowhere" / "page.html"

    with pytest.raises(WriteError, match="nowhere"):
        write_conversion(place, conversion([("a", [layer("a")])]))
    with pytest.raises(WriteError, match="nowhere"):
        write_comparison(place, comparison([variant("nvfp4", 1000, (0.9, 0.9))]))
