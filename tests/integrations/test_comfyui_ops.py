"""ComfyUI's operations with lowbit's formats: loading, products, saving, and what is refused."""

from __future__ import annotations

import json
import logging

import pytest
import torch
from torch import nn

pytest.importorskip("comfy_kitchen", reason="comfy-kitchen is not installed")
from lowbit import use_backend
from lowbit.checkpoint.dialects import StoredLayer
from lowbit.checkpoint.dialects.comfy import COMFY
from lowbit.checkpoint.dialects.comfy_marker import marker_tensor
from lowbit.errors import CheckpointError, DependencyError, LowbitError, PartsError, UnsupportedError
from lowbit.formats import parse_spec
from lowbit.integrations.comfyui import is_lowbit, lowbit_ops
from lowbit.integrations.comfyui.layers import Reading, find_layer
from tests.support.comfy_tree import BOTH, OneLinear, install, loaded, same_tensors, stored_linear

SPECS = (
    "awq_w4a16",
    "awq_w4a16(group_size=32)",
    "svdquant_w4a4(rank=16)",
    "svdquant_w4a4(rank=16,act_unsigned=true)",
    "int8(granularity=row)",
    "int8(granularity=row,rotation=64)",
    "int8(granularity=block)",
    "fp8_e4m3",
    "fp8_e4m3(granularity=row)",
    "nvfp4",
    "mxfp8",
    "mxfp4",
    "convrot_w4a4",
    "convrot_w4a4(rotation=0)",
    "w4a8_codebook",
    "wna16(group_size=64)",
)


@pytest.fixture(params=BOTH)
def comfy(request, monkeypatch):
    """ComfyUI: the stand-in, and the source tree where there is one."""
    return install(request.param, monkeypatch)


def _fields(tensors, layer="lin"):
    return json.loads(tensors[f"{layer}.comfy_quant"].numpy().tobytes())


def _say(tensors, drop=(), **fields):
    """The tensors with other fields in the marker."""
    said = {name: value for name, value in _fields(tensors).items() if name not in drop}
    return {**tensors, "lin.comfy_quant": marker_tensor({**said, **fields})}


@pytest.mark.parametrize("spec", SPECS)
def test_a_layer_loads_runs_and_is_saved_as_it_was(comfy, spec):
    """Every format: strict load, the format's own product for 2-D and 3-D input of any dtype, the same bytes back."""
    tensors, fmt, parts, _ = stored_linear(spec)
    model = loaded(lowbit_ops(kernels="lowbit", disabled=()), tensors)

    assert is_lowbit(model.lin.weight)
    assert tuple(model.lin.weight.shape) == (128, 256)
    for shape, dtype in (((5, 256), torch.bfloat16), ((2, 3, 256), torch.bfloat16), ((5, 256), torch.float16)):
        x = torch.randn(shape, dtype=dtype)
        for mode in (torch.inference_mode, torch.no_grad, torch.enable_grad):
            with mode():
                made = model(x)
            expected = fmt.linear(x, parts, tensors["lin.bias"].to(dtype))
            assert made.dtype == dtype
            torch.testing.assert_close(made, expected, rtol=1e-2, atol=1e-2)
    assert same_tensors(model.state_dict(), tensors)


def test_the_layout_is_settled_at_load(comfy):
    """Layout class, its name and whether input is quantized are attributes after loading; stock entries stay."""
    before = dict(comfy.quant_ops.QUANT_ALGOS)
    with use_backend("eager"):
        model = loaded(lowbit_ops(), stored_linear("awq_w4a16")[0])

    assert model.lin.layout_type == model.lin.lowbit_layout.NAME == "Lowbit[awq_w4a16]"
    assert comfy.quant_ops.QUANT_ALGOS[model.lin.quant_format]["quantize_input"] is False
    assert {name: comfy.quant_ops.QUANT_ALGOS[name] for name in before} == before


@pytest.mark.parametrize(
    ("kernels", "disabled", "ours"),
    [
        ("auto", (), False),
        ("auto", ("float8_e4m3fn",), True),
        ("lowbit", (), True),
        ("comfy", ("float8_e4m3fn",), False),
    ],
)
def test_comfyuis_own_formats_stay_with_its_code_where_that_runs(comfy, kernels, disabled, ours):
    """fp8 with one scale is ComfyUI's unless it cannot run it here, or the user wants lowbit."""
    tensors, *_ = stored_linear("fp8_e4m3")
    model = loaded(lowbit_ops(kernels=kernels, disabled=disabled), tensors)

    assert is_lowbit(model.lin.weight) == ours
    assert isinstance(model.lin.weight, comfy.quant_ops.QuantizedTensor)
    assert _fields(model.state_dict())["format"] == "float8_e4m3fn"


def test_a_variant_that_comfyui_would_misread_is_lowbits(comfy):
    """fp8 with a scale a row under ComfyUI's own label: ComfyUI takes it for one scale, so lowbit runs it."""
    tensors, fmt, parts, _ = stored_linear("fp8_e4m3(granularity=row)")
    tensors = {**tensors, "lin.comfy_quant": marker_tensor({"format": "float8_e4m3fn"})}
    model = loaded(lowbit_ops(disabled=()), tensors)
    x = torch.randn(4, 256).bfloat16()

    assert is_lowbit(model.lin.weight)
    torch.testing.assert_close(model(x), fmt.linear(x, parts, tensors["lin.bias"]), rtol=1e-2, atol=1e-2)


def test_an_unquantized_layer_is_comfyuis(comfy):
    """A layer without a marker loads and is saved as ComfyUI does it, in the compute dtype."""
    tensors = {"lin.weight": torch.randn(8, 4), "lin.bias": torch.randn(8)}
    model = loaded(lowbit_ops(torch.float32), tensors, 8, 4)

    assert same_tensors(model.state_dict(), tensors)
    torch.testing.assert_close(model(torch.eye(4)), tensors["lin.weight"].t() + tensors["lin.bias"])


def test_a_weight_that_no_file_has_is_zeros_and_reported(comfy):
    """A CLIP-L has no projection in many files: the key is reported, and the layer runs."""
    model = OneLinear(lowbit_ops(torch.float32), 8, 4)
    result = model.load_state_dict({"lin.bias": torch.ones(8)}, strict=False)

    assert result.missing_keys == ["lin.weight"]
    assert torch.equal(model(torch.randn(2, 4)), torch.ones(2, 8))


@pytest.mark.parametrize("spec", ["nvfp4", "mxfp8"])
def test_a_padded_file_without_a_shape_takes_the_models(comfy, spec):
    """ComfyUI's own files pad to 16 or 32 and do not say so: the layer's shape counts."""
    tensors, fmt, parts, _ = stored_linear(spec, 40, 72)
    tensors = _say(tensors, drop=("orig_shape",))
    model = loaded(lowbit_ops(kernels="lowbit"), tensors, 40, 72)
    x = torch.randn(3, 72).bfloat16()

    torch.testing.assert_close(model(x), fmt.linear(x, parts, tensors["lin.bias"]), rtol=1e-2, atol=1e-2)


# ---- act_unsigned ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("said", "layer", "infer", "expected"),
    [
        (True, "blk.proj", False, True),
        (False, "blk.proj", False, False),
        (None, "blk.proj", False, False),
        (None, "blk.proj", True, False),
        (True, "blk.img_mlp.net.2", True, True),
        (False, "blk.img_mlp.net.2", True, False),
        (None, "blk.img_mlp.net.2", True, True),
        (None, "blk.txt_mlp.net.2", True, True),
        (None, "blk.img_mlp.net.2", False, False),
    ],
)
def test_act_unsigned_is_what_the_file_says(comfy, caplog, said, layer, infer, expected):
    """Inferred only where the key is absent, the name fits and the user asks, with a log line; saved as it then is."""
    tensors, *_ = stored_linear("svdquant_w4a4(rank=16,act_unsigned=true)", layer=layer)
    fields = {name: value for name, value in _fields(tensors, layer).items() if name not in ("act_unsigned", "lowbit")}
    fields |= {} if said is None else {"act_unsigned": said}
    state = {key.removeprefix("blk."): tensor for key, tensor in tensors.items()}
    name = layer.removeprefix("blk.")
    state[f"{name}.comfy_quant"] = marker_tensor(fields)
    ops = lowbit_ops(infer_act_unsigned=infer)
    model = nn.Module()
    owner = model
    for piece in name.split(".")[:-1]:
        owner.add_module(piece, nn.Module())
        owner = getattr(owner, piece)
    owner.add_module(name.rpartition(".")[2], ops.Linear(256, 128))
    # The name must end in ".img_mlp.net.2": a model has something in front of it.
    outer = nn.Module()
    outer.blk = model

    with caplog.at_level(logging.INFO, logger="lowbit"):
        outer.load_state_dict({f"blk.{key}": tensor for key, tensor in state.items()})

    linear = outer.get_submodule(layer)
    assert linear.weight.layout_cls.FORMAT.act_unsigned == expected
    assert _fields(outer.state_dict(), layer)["act_unsigned"] == expected
    assert ("act_unsigned" in caplog.text) == (said is None and name.endswith("net.2"))


def test_the_shift_of_act_unsigned_is_made_up_for_on_every_path(comfy):
    """Kernel, decoded weight with a function, and full precision all give x W^T + the true bias."""
    tensors, fmt, parts, _ = stored_linear("svdquant_w4a4(rank=16,act_unsigned=true)", dtype=torch.float32)
    true_bias = tensors["lin.bias"].clone()
    tensors["lin.bias"] = true_bias - fmt.bias_share(parts)
    x = torch.rand(256, 256)
    expected = x @ fmt.dequantize(parts, (128, 256), torch.float32).t() + true_bias
    size = float((expected - true_bias).std())

    model = loaded(lowbit_ops(torch.float32), tensors)
    with torch.no_grad():
        kernel = model(x)
        model.lin.weight_function = [lambda weight: weight]
        decoded = model(x)
        full = loaded(lowbit_ops(torch.float32, full_precision_mm=True), tensors)(x)

    assert float((kernel - expected).mean(0).abs().max()) < 0.05 * size
    torch.testing.assert_close(decoded, expected, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(full, expected, rtol=1e-4, atol=1e-4)
    assert torch.equal(model.state_dict()["lin.bias"], tensors["lin.bias"])


def test_a_layer_without_a_bias_takes_the_files(comfy):
    """A format that folds something into the bias brings one where the model has none."""
    tensors, fmt, parts, _ = stored_linear("svdquant_w4a4(rank=16,act_unsigned=true)")
    model = loaded(lowbit_ops(), tensors, bias=False)
    x = torch.rand(4, 256).bfloat16()

    torch.testing.assert_close(model(x), fmt.linear(x, parts, tensors["lin.bias"]), rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize("spec", ["awq_w4a16", "svdquant_w4a4(rank=16)"])
def test_comfy_kitchens_spellings_are_read(comfy, spec):
    """weight_zeros and weight_proj_down and their like, which comfy_kitchen saves, load; today's names are saved."""
    tensors, *_ = stored_linear(spec)
    other = {"weight_zero": "weight_zeros", "proj_down": "weight_proj_down", "proj_up": "weight_proj_up"}
    other["smooth_factor"] = "weight_smooth_factor"
    spelled = {f"lin.{other.get(key[4:], key[4:])}": tensor for key, tensor in tensors.items()}

    assert set(spelled) != set(tensors)
    assert same_tensors(loaded(lowbit_ops(), spelled).state_dict(), tensors)


def test_a_tile_packed_layer_is_saved_tile_packed(comfy):
    """svdquant in comfy_kitchen's tile layout runs as the natural one and is written back in its tiles."""
    tensors, fmt, parts, _ = stored_linear("svdquant_w4a4(rank=16)", layout="kitchen_tile_packed_w4a4")
    model = loaded(lowbit_ops(), tensors)
    x = torch.randn(4, 256).bfloat16()

    assert tensors["lin.weight"].dim() == 4
    torch.testing.assert_close(model(x), fmt.linear(x, parts, tensors["lin.bias"]), rtol=1e-2, atol=1e-2)
    assert same_tensors(model.state_dict(), tensors)


def test_an_int8_fast_marker_loads(comfy):
    """A marker without a format, as INT8-Fast writes it, is int8_tensorwise, and says so when it is saved."""
    tensors, *_ = stored_linear("int8(granularity=row)")
    tensors["lin.comfy_quant"] = marker_tensor({"per_row": True, "convrot": False})

    assert _fields(loaded(lowbit_ops(disabled=()), tensors).state_dict())["format"] == "int8_tensorwise"


def test_a_hybrid_mxfp8_layer_loads_as_mxfp8(comfy):
    """lowbit's code and ComfyUI's get it as mxfp8, and without its second scale it is saved."""
    tensors, *_ = stored_linear("mxfp8")
    fields = {**_fields(tensors), "format": "hybrid_mxfp8"}
    hybrid = {**tensors, "lin.comfy_quant": marker_tensor(fields), "lin.weight_scalar": torch.tensor(0.01)}
    model, plain = (loaded(lowbit_ops(), dict(held)) for held in (hybrid, tensors))

    assert torch.equal(model.lin.weight.dequantize(), plain.lin.weight.dequantize())
    assert same_tensors(model.state_dict(), plain.state_dict())
    assert find_layer(hybrid, "lin.", (128, 256), Reading({"mxfp8": {}})) is None  # ComfyUI's to load
    assert hybrid.keys() == tensors.keys()
    assert _fields(hybrid)["format"] == "mxfp8"


# ---- what is not a linear -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("spec", ["int8(granularity=row)", "nvfp4", "awq_w4a16"])
def test_an_embedding_decodes_the_rows_it_looks_up(comfy, spec):
    """Tables in formats that ComfyUI has no lookup for give the decoded rows, and are saved as they were."""
    tensors, fmt, parts, _ = stored_linear(spec, layer="emb")
    del tensors["emb.bias"]
    model = nn.Module()
    model.emb = lowbit_ops(kernels="lowbit").Embedding(128, 256, dtype=torch.bfloat16)
    model.load_state_dict(dict(tensors))
    model.emb.weight_function, model.emb.bias_function = [], []
    indices = torch.tensor([[3, 127], [0, 3]])

    made = model.emb.forward_comfy_cast_weights(indices, out_dtype=torch.float32)

    torch.testing.assert_close(made, fmt.dequantize(parts, (128, 256), torch.float32)[indices])
    assert same_tensors(model.state_dict(), tensors)


def test_a_quantized_convolution_is_refused(comfy):
    """ComfyUI would take the codes of a kernel for its weights."""
    tensors, *_ = stored_linear("int8(granularity=row)", layer="conv")
    model = nn.Module()
    model.conv = lowbit_ops(where="a.safetensors").Conv2d(4, 128, 8)

    with pytest.raises(CheckpointError, match=r"a\.safetensors: layer 'conv': is quantized, .* Conv2d"):
        model.load_state_dict(tensors)


def test_a_bank_of_experts_must_be_comfyuis(comfy):
    """A bank in a format that ComfyUI has no bank for is an error that names layer and format."""
    tensors, *_ = stored_linear("svdquant_w4a4(rank=16)", layer="bank")
    model = nn.Module()
    model.bank = lowbit_ops().MoEExperts(2, 256, 128)

    with pytest.raises(CheckpointError, match=r"'bank': is a bank of experts in svdquant_w4a4"):
        model.load_state_dict(tensors)


# ---- errors ---------------------------------------------------------------------------------------------------------


def test_an_unknown_format_is_a_key_error_and_a_value_error_with_the_list(comfy):
    """The message names file, layer, format and the sorted formats that are known, ComfyUI's and lowbit's."""
    tensors = _say(stored_linear("awq_w4a16")[0], drop=("lowbit",), format="awq_w9a99")
    for kind in (KeyError, ValueError, LowbitError):
        with pytest.raises(kind) as caught:
            loaded(lowbit_ops(where="model.safetensors"), tensors)
    text = str(caught.value)
    listed = text.partition("known formats: ")[2].split(", ")

    assert "'awq_w9a99'" in text
    assert "model.safetensors: layer 'lin'" in text
    assert listed == sorted(listed)
    assert {"awq_w4a16", "svdquant_w4a4", "float8_e4m3fn"} <= set(listed)


@pytest.mark.parametrize(
    ("change", "kind", "words"),
    [
        (lambda t: t.pop("lin.proj_down"), PartsError, "proj_down is missing"),
        (lambda t: t.pop("lin.weight_scale"), PartsError, "scale.* is missing"),
        (lambda t: t.update({"lin.weight": t["lin.weight"][:, :-1]}), LowbitError, "layer 'lin'"),
        (lambda t: t.update({"lin.weight_odd": torch.ones(1)}), PartsError, "weight_odd"),
        (lambda t: t.update({"lin.comfy_quant": t["lin.comfy_quant"].float()}), CheckpointError, "has cast"),
        (lambda t: t.update({"lin.comfy_quant": torch.tensor([123], dtype=torch.uint8)}), CheckpointError, "marker"),
        (lambda t: t.pop("lin.comfy_quant"), CheckpointError, "no comfy_quant marker"),
        (lambda t: t.pop("lin.weight"), CheckpointError, "no tensor 'lin.weight'"),
    ],
)
def test_a_broken_layer_is_one_error_that_names_it(comfy, change, kind, words):
    """Missing, extra and misshapen tensors and markers that cannot be read: a ValueError or OSError with the remedy."""
    tensors, *_ = stored_linear("svdquant_w4a4(rank=16)")
    change(tensors)

    with pytest.raises(kind, match=words):
        loaded(lowbit_ops(), tensors)


def test_missing_tensors_are_a_value_error(comfy):
    """What programs that wrap ComfyUI catch."""
    tensors, *_ = stored_linear("awq_w4a16")
    del tensors["lin.weight_zero"]

    with pytest.raises(ValueError, match=r"layer 'lin': .*zero"):
        loaded(lowbit_ops(), tensors)


def test_another_shape_is_another_model(comfy):
    """A layer of another size is refused before anything runs."""
    with pytest.raises(CheckpointError, match=r"\[128, 256\], the model expects \[128, 512\]"):
        loaded(lowbit_ops(), stored_linear("awq_w4a16")[0], 128, 512)


def test_options_and_surroundings_are_checked(comfy, monkeypatch):
    """An unknown choice of kernels is refused with the choices; a ComfyUI that rounds every input is too old."""
    with pytest.raises(UnsupportedError, match="auto, lowbit, comfy"):
        lowbit_ops(kernels="fast")
    lowbit_ops()
    with monkeypatch.context() as older:
        older.setattr(comfy.quant_ops, "QUANT_ALGOS", {"lowbit_x": {"quantize_input": False}, "nvfp4": {}})
        with pytest.raises(DependencyError, match="too old"):
            lowbit_ops()
    monkeypatch.delattr(comfy.ops, "mixed_precision_ops")
    with pytest.raises(DependencyError, match="update it"):
        lowbit_ops()


def test_optional_scales_are_part_of_the_weight(comfy):
    """A pre-quant scale multiplies the input once, and it and an input scale are saved."""
    fmt = parse_spec("awq_w4a16(pre_quant_scale=true,input_scale=true)")
    parts = fmt.plain.quantize(0.05 * torch.randn(128, 256).bfloat16())
    parts |= {"pre_quant_scale": torch.rand(256).bfloat16() + 0.5, "input_scale": torch.tensor(0.1)}
    tensors = COMFY.store_parts(StoredLayer("lin", fmt, (128, 256)), parts) | {"lin.bias": torch.zeros(128).bfloat16()}
    model = loaded(lowbit_ops(), tensors)
    x = torch.randn(4, 256).bfloat16()

    expected = (x * parts["pre_quant_scale"]) @ fmt.plain.dequantize(parts, (128, 256), torch.bfloat16).t()
    torch.testing.assert_close(model(x), expected, rtol=2e-2, atol=2e-2)
    assert same_tensors(model.state_dict(), tensors)
