"""The dialects of GPTQ and AutoAWQ: against their published layouts, unpacked here number by number."""

from __future__ import annotations

import pytest
import torch

from lowbit.checkpoint.dialects import Container, StoredLayer, TensorSpec, detect_dialect, get_dialect
from lowbit.errors import CheckpointError, PartsError
from lowbit.formats import parse_spec
from tests.checkpoint.dialects.comfy_files import assert_same_bits
from tests.support import gaussian

LAYER = "model.layers.0.self_attn.o_proj"
N, K = 64, 128
GPTQ_SPECS = [
    "wna16(group_size=32)",
    "wna16(group_size=32,zero_point=true)",
    "wna16(bits=2,group_size=64,zero_point=true)",
    "wna16(bits=3,group_size=32,zero_point=true)",
    "wna16(bits=8,group_size=0)",
    "wna16(group_size=128,zero_point=true)",  # a group that is the whole row
    "wna16(group_size=32,act_order=true)",
]
AWQ_SPECS = [
    "wna16(group_size=32,zero_point=true)",
    "wna16(group_size=0,zero_point=true)",
    "wna16(group_size=128,zero_point=true)",
]
CASES = [("gptq", spec) for spec in GPTQ_SPECS] + [("awq", spec) for spec in AWQ_SPECS]


def container(tensors, configs) -> Container:
    """A folder with these tensors and JSON files."""
    return Container({key: TensorSpec.of(tensor) for key, tensor in tensors.items()}, configs=configs, where="folder")


def written(dialect: str, spec: str):
    """A layer, its parts, and the tensors and JSON files of a folder with it."""
    fmt = parse_spec(spec)
    parts = fmt.quantize(gaussian(N, K, dtype=torch.float16) + 0.3)
    if "g_idx" in parts:
        parts["g_idx"] = parts["g_idx"][torch.randperm(K, generator=torch.Generator().manual_seed(0))].contiguous()
    stored = StoredLayer(LAYER, fmt, (N, K), torch.float16)
    tensors = get_dialect(dialect).store_parts(stored, parts)
    configs = get_dialect(dialect).config_fields([stored], {})
    return stored, parts, tensors, configs


def bits_of(words: torch.Tensor, bits: int, count: int) -> list[list[int]]:
    """Numbers of some bits, the lowest first, in the words of each row; in plain Python."""
    rows = []
    for row in words.tolist():
        whole = sum((word & 0xFFFFFFFF) << (32 * index) for index, word in enumerate(row))
        rows.append([(whole >> (bits * i)) & ((1 << bits) - 1) for i in range(count)])
    return rows


@pytest.mark.parametrize(("dialect", "spec"), CASES)
def test_every_format_comes_back_bit_for_bit(dialect, spec):
    """What is written is promised beforehand, described by the JSON files, and read back with the same bits."""
    stored, parts, tensors, configs = written(dialect, spec)
    assert {key: TensorSpec.of(t) for key, t in tensors.items()} == get_dialect(dialect).stored_specs(stored)
    held = container(tensors, configs)
    assert detect_dialect(held).name == dialect
    (layer,) = get_dialect(dialect).find_layers(held, tensors.__getitem__).layers.values()
    assert (layer.format, layer.shape) == (stored.format, stored.shape)
    assert set(layer.keys.values()) == set(tensors)
    back = get_dialect(dialect).load_parts(layer, tensors.__getitem__)
    for name, part in parts.items():
        assert_same_bits(back[name], part)


@pytest.mark.parametrize("spec", GPTQ_SPECS)
def test_gptq_words_mean_what_its_kernels_compute(spec):
    """(code - zero) * scale, with the columns first and version 1 zeros one too small, is the decoded weight."""
    stored, parts, tensors, configs = written("gptq", spec)
    said = configs["quantize_config.json"]
    bits, groups = said["bits"], parts["scale"].shape[1]
    codes = torch.tensor(bits_of(tensors[f"{LAYER}.qweight"].t(), bits, K)).t()
    zeros = torch.tensor(bits_of(tensors[f"{LAYER}.qzeros"], bits, N)) + (said["checkpoint_format"] == "gptq")
    assert zeros.shape == (groups, N)
    order = tensors[f"{LAYER}.g_idx"].long()
    w = (codes - zeros[order]) * tensors[f"{LAYER}.scales"].float()[order]
    assert torch.equal(stored.format.dequantize(parts, (N, K), torch.float32), w.t())


@pytest.mark.parametrize("spec", AWQ_SPECS)
def test_awq_words_mean_what_its_kernels_compute(spec):
    """Nibble i of word c is column 8 c + (0 2 4 6 1 3 5 7)[i]."""
    stored, parts, tensors, configs = written("awq", spec)
    size = configs["config.json"]["quantization_config"]["group_size"]
    columns = [8 * (j // 8) + (0, 2, 4, 6, 1, 3, 5, 7)[j % 8] for j in range(N)]
    codes, zeros = torch.empty(K, N, dtype=torch.long), torch.empty(parts["scale"].shape[1], N, dtype=torch.long)
    codes[:, columns] = torch.tensor(bits_of(tensors[f"{LAYER}.qweight"], 4, N))
    zeros[:, columns] = torch.tensor(bits_of(tensors[f"{LAYER}.qzeros"], 4, N))
    order = torch.arange(K) // (K if size == -1 else size)
    w = (codes - zeros[order]) * tensors[f"{LAYER}.scales"].float()[order]
    assert torch.equal(stored.format.dequantize(parts, (N, K), torch.float32), w.t())


def test_symmetric_zero_points_show_their_version():
    """A symmetric model of either version is read right, even if it says the other; anything else is refused."""
    _, parts, tensors, configs = written("gptq", "wna16(group_size=32)")
    key = f"{LAYER}.qzeros"
    for value in (0x77777777, 0x88888888 - (1 << 32)):
        given = {**tensors, key: torch.full_like(tensors[key], value)}
        (layer,) = get_dialect("gptq").find_layers(container(given, configs), given.__getitem__).layers.values()
        assert_same_bits(get_dialect("gptq").load_parts(layer, given.__getitem__)["qdata"], parts["qdata"])
    given = {**tensors, key: torch.full_like(tensors[key], 0x66666666)}
    with pytest.raises(PartsError, match="zero points from 6 to 6, and the configuration says sym"):
        get_dialect("gptq").load_parts(layer, given.__getitem__)


def test_version_1_zero_points_are_one_more_than_stored():
    """Asymmetric zero points of version 1 mean one more, up to 16; written again they have the same bits."""
    _, parts, tensors, configs = written("gptq", "wna16(group_size=32,zero_point=true)")
    said = {**configs["quantize_config.json"], "checkpoint_format": "gptq"}
    tensors[f"{LAYER}.qzeros"][0, 0] = -1  # 15 eight times
    held = container(tensors, {"quantize_config.json": said})
    (layer,) = get_dialect("gptq").find_layers(held, tensors.__getitem__).layers.values()
    back = get_dialect("gptq").load_parts(layer, tensors.__getitem__)
    assert back["zero_point"][:8, 0].tolist() == [16] * 8
    assert torch.equal(back["zero_point"][8:], parts["zero_point"][8:] + 1)
    again = get_dialect("gptq").store_parts(layer, back)
    for key, tensor in tensors.items():
        assert_same_bits(again[key], tensor)
    with pytest.raises(PartsError, match="zero point of 16, and AutoAWQ stores 4 bits"):
        get_dialect("awq").store_parts(StoredLayer(LAYER, layer.format, layer.shape, torch.float16), back)


@pytest.mark.parametrize(
    ("dialect", "spec", "shape"),
    [
        ("gptq", "int8", (64, 128)),
        ("gptq", "wna16(bits=5)", (64, 128)),
        ("gptq", "wna16(group_size=32)", (63, 128)),
        ("awq", "wna16(group_size=32)", (64, 128)),
        ("awq", "wna16(group_size=32,zero_point=true)", (60, 128)),
        ("awq", "awq_w4a16", (64, 128)),
    ],
)
def test_what_they_cannot_hold_is_refused_in_words(dialect, spec, shape):
    """Formats and shapes without a place are refused before anything is written."""
    stored = StoredLayer(LAYER, parse_spec(spec), shape)
    assert get_dialect(dialect).refuses(stored)
    with pytest.raises(PartsError, match=LAYER):
        get_dialect(dialect).stored_specs(stored)


def load_all(held: Container, tensors) -> None:
    """Find and load every layer of a GPTQ folder."""
    for layer in get_dialect("gptq").find_layers(held, tensors.__getitem__).layers.values():
        get_dialect("gptq").load_parts(layer, tensors.__getitem__)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"bits": 5}, "says 5 bits"),
        ({"group_size": 48}, "expected"),
        ({"dynamic": {"+:(": {"bits": 8}}}, "no regular expression"),
        ({"desc_act": False, "sym": True, "group_size": 64}, "expected"),
    ],
)
def test_wrong_descriptions_of_gptq_are_errors(change, message):
    """A description that does not fit the tensors is an error that names the layer."""
    _, _, tensors, configs = written("gptq", "wna16(group_size=32)")
    held = container(tensors, {"quantize_config.json": configs["quantize_config.json"] | change})
    with pytest.raises((CheckpointError, PartsError), match=message):
        load_all(held, tensors)


def test_two_files_that_disagree_are_an_error():
    """config.json and quantize_config.json with different bits are refused."""
    _, _, tensors, configs = written("gptq", "wna16(group_size=32)")
    configs["quantize_config.json"] = configs["quantize_config.json"] | {"bits": 8}
    with pytest.raises(CheckpointError, match=r"bits is 8 in quantize_config\.json and 4 in config\.json"):
        get_dialect("gptq").find_layers(container(tensors, configs), tensors.__getitem__)


@pytest.mark.parametrize("version", ["gemv", "marlin", "exllama"])
def test_other_versions_of_awq_are_refused_by_name(version):
    """Only the gemm arrangement is read; the others are never taken for it."""
    _, _, tensors, configs = written("awq", AWQ_SPECS[0])
    configs["config.json"]["quantization_config"]["version"] = version
    with pytest.raises(CheckpointError, match=f"AutoAWQ version {version}"):
        get_dialect("awq").find_layers(container(tensors, configs), tensors.__getitem__)


def test_layers_that_stay_plain_are_named():
    """Weights that are not quantized are listed, so that an engine does not look for their codes."""
    stored = StoredLayer(LAYER, parse_spec(AWQ_SPECS[0]), (N, K), torch.float16)
    plain = {"model.router.weight": TensorSpec(torch.float16, (8, K)), "norm.weight": TensorSpec(torch.float16, (K,))}
    awq = get_dialect("awq").config_fields([stored], plain)["config.json"]["quantization_config"]
    assert awq["modules_to_not_convert"] == ["model.router"]
    gptq = get_dialect("gptq").config_fields([stored], plain)["quantize_config.json"]
    assert list(gptq["dynamic"]) == [r"-:^model\.router$"]


@pytest.mark.parametrize("dialect", ["gptq", "awq"])
@pytest.mark.parametrize(
    ("layers", "size"),
    [
        ([(128, 256), (0, 128)], 128),  # as torchao's files are read
        ([(0, 256), (128, 128)], -1),
        ([(0, 256), (0, 128)], -1),
        ([(256, 256), (128, 128)], -1),
        ([(0, 128), (0, 128)], -1),
    ],
)
def test_a_group_of_all_columns_is_described_as_a_row(dialect, layers, size):
    """One size for all layers, of which each is a group size or a whole row [group_size, K]."""
    found = [
        StoredLayer(f"{LAYER}.{i}", parse_spec(f"wna16(group_size={group},zero_point=true)"), (N, k), torch.float16)
        for i, (group, k) in enumerate(layers)
    ]
    configs = get_dialect(dialect).config_fields(found, {})
    assert configs["config.json"]["quantization_config"]["group_size"] == size


@pytest.mark.parametrize("dialect", ["gptq", "awq"])
def test_layers_that_one_description_does_not_fit_are_named(dialect):
    """Both of them, and what to do."""
    specs = {"a": "wna16(group_size=32,zero_point=true)", "b": "wna16(group_size=0,zero_point=true)"}
    found = [StoredLayer(name, parse_spec(spec), (N, K), torch.float16, where="f") for name, spec in specs.items()]
    with pytest.raises(PartsError, match=r"f: layer 'b': is .*, and layer 'a' is .*one format for all, or choose a "):
        get_dialect(dialect).config_fields(found, {})
    assert get_dialect(dialect).config_fields([], {}) == {}


@pytest.mark.parametrize(("dialect", "spec"), [("gptq", GPTQ_SPECS[0]), ("awq", AWQ_SPECS[0])])
@pytest.mark.parametrize("shape", [(-1,), (1, K // 8, -1)])
def test_codes_that_are_no_matrix_are_named(dialect, spec, shape):
    """A bank of experts, or codes that a program flattened, is one error about the layer."""
    _, _, tensors, configs = written(dialect, spec)
    key = f"{LAYER}.qweight"
    held = container({**tensors, key: tensors[key].reshape(shape)}, configs)

    with pytest.raises(CheckpointError, match=rf"folder: layer '{LAYER}': its qweight is .* expected a matrix"):
        get_dialect(dialect).find_layers(held, tensors.__getitem__)


def test_an_order_of_columns_without_the_order_is_an_error():
    """With desc_act the codes mean nothing without g_idx."""
    _, _, tensors, configs = written("gptq", "wna16(group_size=32,act_order=true)")
    del tensors[f"{LAYER}.g_idx"]

    with pytest.raises(CheckpointError, match=rf"folder: layer '{LAYER}': lacks {LAYER}.g_idx"):
        get_dialect("gptq").find_layers(container(tensors, configs), tensors.__getitem__)
