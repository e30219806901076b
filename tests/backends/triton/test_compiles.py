from __future__ import annotations

import os
import re
import subprocess
from dataclasses import replace

import pytest
import torch

pytest.importorskip("triton", reason="Triton is not installed")
if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("TRITON_INTERPRET=1 leaves nothing to compile", allow_module_level=True)

from triton.backends.nvidia.compiler import get_ptxas

from lowbit.backends.triton import compile_ahead
from lowbit.backends.triton.compile_ahead import Compiled
from lowbit.backends.triton.device import assume
from lowbit.backends.triton.split_sums import splits_for
from lowbit.backends.triton.tuning import KERNELS, record
from lowbit.formats import parse_spec
from lowbit.layouts.base import get_layout
from tests.support import triton_launches
from tests.support.kernel_examples import META, specs
from tests.support.triton_launches import DTYPES, TOKENS, all_noted, distinct, entries, judge, noted, qualified, title

TITLES = sorted({title(entry) for entry in entries()})
TARGETS = ("sm_90", "sm_80")
TARGET = triton_launches.TARGETS["sm_90"]
# How far apart tokens are in a result, as Triton writes it.
NARROW = """
  %at_3 = tt.splat %n : i32 -> tensor<1x256xi32>
  %at_4 = arith.muli %at_2, %at_3 : tensor<1x256xi32>
"""


@pytest.mark.parametrize("name", TITLES)
def test_every_entry_is_launched(name):
    """The table of examples has arguments that each registered kernel takes, so that nothing escapes the compiler."""
    found, missing = all_noted()
    assert name not in missing, missing[name]
    assert found[name]


@pytest.mark.parametrize("index", range(len(KERNELS)), ids=[qualified(kernel) for kernel in KERNELS])
def test_compiles(index):
    """Every kernel compiles in its first config for Hopper and Ampere, fits their memory and keeps its registers.

    Nor does it count the rows of a result in 32 bits (`narrow_products`): addresses hold for 2**31 elements and more.
    """
    kernel = KERNELS[index]
    for target in TARGETS:
        mine = [one for one in distinct(all_noted(target)[0]) if one.kernel is kernel]
        assert mine, f"no entry of the dispatch table launches {qualified(kernel)} in the examples"
        verdict = judge(mine[0], mine[0].first[0], target)
        assert not verdict.fault, f"{mine[0].by}, {mine[0].first[0]}, {target}: {verdict.fault}"


@pytest.mark.parametrize(
    ("made", "position", "fault", "note"),
    [
        (Compiled(90, 0, 1000, "st.global.v4"), 0, "", ""),
        (Compiled(4, 0, 1000, "trap;"), 1, "nothing is left", ""),
        (Compiled(255, 64, 1000, "st.global.v4"), 0, "spills 64 bytes", ""),
        (Compiled(255, 64, 1000, "st.global.v4"), 1, "", "spills 64 bytes"),
        (Compiled(90, 0, 1 << 20, "st.global.v4"), 0, "needs 1048576 bytes", ""),
        (Compiled(90, 0, 1 << 20, "st.global.v4"), 1, "", "passed over"),
        (Compiled(90, 0, 1000, "st.global.v4", NARROW), 1, "multiplies places in a tile by n in 32 bits", ""),
        (Compiled(90, 0, 1000, "st.global.v4", NARROW.replace("i32", "i64")), 1, "", ""),
    ],
)
def test_verdicts(monkeypatch, made, position, fault, note):
    """An empty kernel and addresses of 32 bits are faults in any config, spills and too much memory in the first."""
    one = next(one for one in distinct(all_noted()[0]) if one.others)
    monkeypatch.setattr(triton_launches, "compile_launch", lambda *_: made)
    verdict = judge(one, (one.others if position else one.first)[0], "sm_90")
    assert verdict.fault.startswith(fault)
    assert verdict.note.startswith(note)
    assert bool(verdict.fault) == bool(fault)
    assert bool(verdict.note) == bool(note)


@pytest.mark.parametrize("name", ["_int8_gemm", "_int8_gemm_blocks"])
def test_addresses_of_many_rows(name):
    """The largest tile of int8's products counts 256 tokens of more than 2**23 rows in 64 bits, and spills nothing."""
    many = [one for one in distinct(all_noted("sm_80")[0]) if one.kernel.name == name]
    one = next(one for one in many if one.launch.arguments["splits"] == 1)
    largest = max(one.configs, key=lambda config: (config.constants["BLOCK_M"], config.constants["BLOCK_N"]))
    verdict = judge(one, largest, "sm_80")
    assert not verdict.fault, verdict.fault
    assert verdict.made.source.count("arith.muli")
    assert not verdict.made.spills


def test_tile_shapes_of_every_number_of_tokens_are_kept():
    """A variant has the tile shapes of all launches that are alike, each once; what is first in one comes first."""
    few = next(one for one in distinct(all_noted()[0]) if len(one.configs) > 2)
    configs = few.configs
    other = replace(few, hot=not few.hot, what="other", first=(configs[1],), others=(configs[0], configs[2]))
    both = replace(few, first=(configs[0],), others=(configs[1],)).with_shapes_of(other)
    assert both.first == configs[:2]
    assert both.others == (configs[2],)
    assert both.hot
    assert len({both.variant, few.variant, other.variant}) == 1


@pytest.mark.parametrize(
    ("op", "format", "target", "spec", "tokens"),
    [
        ("int4_plain_mm", "*", "sm_100", "", {8: {16}, 16: {16}, 32: {16}, 64: {16}}),
        ("int4_plain_mm", "*", "sm_90", "", {8: {32, 64}, 16: {32, 64}, 32: {32, 64}, 64: {32, 64}}),
        ("linear", "awq_w4a16", "sm_80", "awq_w4a16", {64: {32, 64}}),
        ("linear", "awq_w4a16", "sm_90", "awq_w4a16", {64: {64, 128}}),
        ("linear", "nvfp4", "sm_80", "nvfp4", {16: {64, 128}}),
    ],
)
def test_tiles_that_do_not_fit_are_not_tried(op, format, target, spec, tokens):
    """For 256 tokens, by columns of a group: tiles that spill, or find no place in tensor memory, are left out."""
    (entry,) = [one for one in entries() if (one.op, one.format, one.layout) == (op, format, "")]
    found: dict[int, set[int]] = {}
    for one in noted(entry, triton_launches.TARGETS[target], tokens=(256,), dtypes=DTYPES[:1]):
        if one.kernel.name in ("_int4_mm", "_linear_nibbles") and spec in ("", one.what):
            sizes = {config.constants["BLOCK_M"] for config in one.configs}
            found.setdefault(one.launch.arguments["GROUP"], set()).update(sizes)
    assert found == tokens


def test_more_tokens_reach_more_tile_shapes():
    """What runs with 32 tokens is compiled, though neither 1 nor 16384 tokens run in it."""
    (linear,) = [one for one in entries() if (one.op, one.format, one.layout) == ("linear", "mxfp8", "")]
    few, all_tokens = (
        {config for one in noted(linear, TARGET, tokens=tokens, dtypes=DTYPES[:1]) for config in one.configs}
        for tokens in ((1, 16384), TOKENS)
    )
    assert {config.constants["BLOCK_M"] for config in few if "BLOCK_M" in config.constants} == {16}
    assert {config.constants["BLOCK_M"] for config in all_tokens if "BLOCK_M" in config.constants} == {16, 32, 64, 128}


@pytest.mark.parametrize("layout", ["", "words128"])
@pytest.mark.parametrize("spec", ["awq_w4a16(group_size=256)", "wna16(group_size=0,zero_point=True)"])
def test_groups_wider_than_a_block(spec, layout):
    """A scale for more columns than are decoded at a time, or for the whole row, compiles like any other."""
    fmt, x = parse_spec(spec), torch.empty((1, 512), dtype=torch.bfloat16, device="meta")
    parts = fmt.empty_parts((64, 512), x.device, x.dtype)
    parts = get_layout(layout, fmt).pack(fmt, parts) if layout else parts
    (linear,) = [one for one in entries() if (one.op, one.format, one.layout) == ("linear", fmt.name, layout)]
    with assume(TARGET), record() as launches:
        linear.run(fmt, x, parts, None)
    assert compile_ahead.compile_launch(launches[0], launches[0].configs[0], TARGET).spills == 0


@pytest.mark.parametrize("name", sorted({entry.format for entry in entries() if entry.op == "linear"} - {"*"}))
def test_the_smallest_weights(name):
    """One row of the fewest columns: numbers that are 1 are constants to the compiler, and rows end within a tile."""
    (linear,) = [one for one in entries() if (one.op, one.format, one.layout) == ("linear", name, "")]
    with assume(TARGET), record() as launches:
        for fmt in (parse_spec(spec).plain for spec in specs(name)):
            for n in (1, 2, 16, 32):  # what has a rank has more rows
                k = next(k for k in range(1, 4096) if fmt.check_shape(32, k) is None)
                if fmt.check_shape(n, k) is None:
                    x, parts = torch.empty((3, k), device=META).bfloat16(), fmt.empty_parts((n, k), META)
                    if linear.refuses(fmt, x, parts, None) is None:
                        linear.run(fmt, x, parts, None)
                    break
    variants = {triton_launches.variant_of(one): one for one in launches}
    assert variants
    for one in variants.values():
        assert compile_ahead.compile_launch(one, one.configs[0], TARGET).assembly


LAYER = (12288, 3072)
FP8 = "fp8_e4m3(granularity=row)"


def compiled(spec, layout, m, name, target=TARGET):
    """Every tile shape of a kernel that a linear of the shape of a real layer launches for so many tokens."""
    fmt, x = parse_spec(spec), torch.empty((m, LAYER[1]), dtype=torch.bfloat16, device="meta")
    made = get_layout(layout, fmt).empty_parts(fmt, LAYER, x.device, x.dtype) if layout else None
    parts = made or fmt.empty_parts(LAYER, x.device, x.dtype)
    (linear,) = [one for one in entries() if (one.op, one.format, one.layout) == ("linear", fmt.name, layout)]
    with assume(target), record() as launches:
        linear.run(fmt, x, parts, None)
    (launch,) = [one for one in launches if one.kernel.name == name]
    return [(config, compile_ahead.compile_launch(launch, config, target)) for config in launch.configs]


@pytest.mark.parametrize(
    ("spec", "layout", "m", "name"),
    [
        ("awq_w4a16", "words128", 1, "_linear_words"),  # rows are folded
        ("awq_w4a16", "words128", 16, "_linear_words"),  # K is split
        ("nvfp4", "words128", 1, "_linear_words"),
        ("svdquant_w4a4", "", 256, "_grouped_product"),
        ("convrot_w4a4(rotation=64)", "", 256, "_convrot_product"),
        ("awq_w4a16", "", 16, "_linear_nibbles"),
        (f"{FP8[:-1]},activations=fp8)", "", 1, "_fp8_gemm"),
        ("int8(granularity=row)", "", 16, "_int8_gemm"),
    ],
)
def test_weights_are_copied_16_bytes_at_a_time(spec, layout, m, name):
    """The compiler sees that rows and pieces of rows begin at multiples of 16 bytes: no copy is of 4 or 8."""
    for config, made in compiled(spec, layout, m, name):
        sizes = set(re.findall(r"cp\.async\.c[ag]\.shared\.global \[[^]]*\], \[[^]]*\], 0x([0-9a-f]+)", made.assembly))
        assert sizes == {"10"}, config


@pytest.mark.parametrize(
    ("spec", "layout", "m", "name"),
    [
        ("awq_w4a16", "words128", 16, "_linear_words"),
        ("awq_w4a16", "words128", 256, "_linear_words"),
        ("nvfp4", "words128", 64, "_linear_words"),
        (FP8, "", 256, "_linear_bytes"),
        ("awq_w4a16", "", 256, "_linear_nibbles"),
    ],
)
def test_products_of_hopper_go_on_by_themselves(spec, layout, m, name, tmp_path):
    """The assembler does not say that it lets each product end before the next instruction."""
    tool = get_ptxas(90).path
    for config, made in compiled(spec, layout, m, name):
        (tmp_path / "kernel.ptx").write_text(made.assembly)
        command = [tool, "-arch=sm_90a", "-v", tmp_path / "kernel.ptx", "-o", tmp_path / "kernel.cubin"]
        found = subprocess.run(command, capture_output=True, text=True, check=True)
        said = found.stdout + found.stderr
        assert "Compiling entry function" in said
        assert "serialized" not in said, config


def test_a_tensor_of_int8_is_quantized_in_vectors():
    """Of a number of values that 16 divides, none is read or written alone; of another, any may be the last."""
    (entry,) = [one for one in entries() if one.op == "quantize_int8_tensorwise"]
    for size, vectors in ((4096, True), (4095, False)):
        with assume(TARGET), record() as launches:
            entry.run(torch.empty((3, size), dtype=torch.bfloat16, device="meta"), None, 0)
        assert len(launches) == 2
        for launch in launches:
            made = compile_ahead.compile_launch(launch, launch.configs[0], TARGET).assembly
            assert bool(re.search(r"ld\.global\S*\.v4\.b32", made)) == vectors
            assert bool(re.search(r"ld\.global\S*\.b16", made)) != vectors


def test_pieces_of_k_are_few_for_many_tokens():
    """Of a wide weight: with few tokens enough programs for every processor, with many no float32 sums in pieces."""
    n, k = LAYER
    assert [splits_for(m, n, k // 128, TARGET) for m in (1, 16, 64, 256, 4096)] == [4, 4, 2, 1, 1]
    assert [splits_for(m, k, n // 128, TARGET) for m in (1, 64, 256, 4096)] == [16, 8, 2, 1]
    assert [splits_for(m, n, k // 128, TARGET, decodes=False) for m in (1, 64, 256)] == [1, 1, 1]
    assert splits_for(1, 128, 3, TARGET) == 2  # not more than there are blocks of columns


def test_resources_are_those_of_the_kernel():
    """Functions that are not inlined are listed beside the kernel, before it or behind."""
    said = """Resource usage:
 Common:
  GLOBAL:0
 Function __internal_division:
  REG:40 STACK:16 SHARED:0
 Function _linear:
  REG:4 STACK:0 SHARED:0
 Function _linear_part:
  REG:80 STACK:8 SHARED:0
"""
    assert compile_ahead._read_resources(said, "_linear") == (4, 0)
    with pytest.raises(RuntimeError, match="nothing of the registers of _other"):
        compile_ahead._read_resources(said, "_other")


def test_what_the_compiler_raises_is_a_fault(monkeypatch):
    """An error of the compiler is reported with its text; the others are still compiled."""

    def refuse(*_):
        raise RuntimeError("ptxas says no")

    monkeypatch.setattr(triton_launches, "compile_launch", refuse)
    one = distinct(all_noted()[0])[0]
    assert "ptxas says no" in judge(one, one.first[0], "sm_90").fault


def test_an_op_without_examples_is_named(monkeypatch):
    """A kernel of an op that the table of examples does not know fails by name."""
    known = entries()[0]
    unknown = type(known)("no_such_op", "*", "triton", "", 0.0, None, known.run)
    monkeypatch.setattr(triton_launches, "entries", lambda: [unknown])
    all_noted.cache_clear()
    try:
        found, missing = all_noted()
    finally:
        all_noted.cache_clear()
    assert not found
    assert "no example arguments for this op" in missing[title(unknown)]
