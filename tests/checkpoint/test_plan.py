"""The plan says what becomes of every tensor and why."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from lowbit.checkpoint.convert import convert
from lowbit.checkpoint.load import load
from lowbit.checkpoint.plan import Plan, make_plan
from lowbit.checkpoint.source import open_source
from lowbit.checkpoint.verify import verify
from lowbit.errors import CheckpointError, FormatError, LowbitError, PlanError, SolverError
from lowbit.formats import get_format
from tests.support import gaussian
from tests.support.checkpoints import model_tensors, save_shards

TABLE = "embeddings.word_embeddings"
WHY_KEPT = {
    "blocks.0.norm.weight": "1-D",
    "blocks.0.up.bias": "1-D",
    "patch.weight": "4-D weight (convolution)",
    "experts.weight": "3-D weight (convolution or bank of experts)",
    "tiny.weight": "fewer than 4096 weights",
    "steps": "int64 values",
    "scale": "a single value",
}


def by_key(plan: Plan) -> dict:
    """The tensors of a plan by key."""
    return {tensor.key: tensor for tensor in plan.tensors()}


def opened(path, tensors, **metadata):
    """A source of these tensors."""
    save_file(tensors, path, metadata)
    return open_source(path)


def test_every_tensor_is_planned_with_a_reason(source):
    """Each tensor of the source stands once in the plan, with its shape, its dtype and a reason."""
    plan = make_plan(source, "fp8_e4m3", preset="none")
    tensors = by_key(plan)

    assert tensors.keys() == model_tensors().keys()
    assert all(tensor.why for tensor in tensors.values())
    assert {key: tensors[key].why for key in WHY_KEPT} == WHY_KEPT
    assert {tensor.action for tensor in tensors.values() if tensor.key in WHY_KEPT} == {"keep"}
    up = tensors["blocks.1.up.weight"]
    assert (up.action, up.format, up.solver, up.shape, up.dtype) == (
        "quantize",
        "fp8_e4m3",
        "rtn",
        (192, 128),
        "bfloat16",
    )


def test_what_a_format_cannot_hold_is_kept_and_says_so(source):
    """A weight whose K does not fit the format's group is kept, and the reason names K and the group."""
    plan = make_plan(source, "awq_w4a16", preset="none")
    ragged = by_key(plan)["ragged.weight"]

    assert ragged.action == "keep"
    assert "100" in ragged.why
    assert "64" in ragged.why
    assert by_key(make_plan(source, "fp8_e4m3", preset="none"))["ragged.weight"].action == "quantize"


def test_a_table_is_kept_where_there_is_no_lookup(tmp_path, monkeypatch):
    """An embedding table is not stored in a format that cannot look rows up; the reason says that."""
    tensors = {
        "model.embed_tokens.weight": torch.randn(200, 128),
        "model.layers.0.mlp.up_proj.weight": torch.randn(64, 128),
    }
    monkeypatch.setattr(get_format("svdquant_w4a4"), "supports_embedding", False)
    with opened(tmp_path / "a.safetensors", tensors) as source:
        plan = make_plan(source, "svdquant_w4a4(rank=8)", preset="none")

    table = by_key(plan)["model.embed_tokens.weight"]
    assert (table.action, table.why) == ("keep", "embedding table, and svdquant_w4a4 has no lookup")
    assert by_key(plan)["model.layers.0.mlp.up_proj.weight"].action == "quantize"


@pytest.mark.parametrize("dialect", ["compressed_tensors", "gptq", "awq", "modelopt", "nunchaku", "comfy", "torchao"])
def test_a_table_stays_plain_where_other_programs_look_plain_ones_up(tmp_path, dialect):
    """A dialect described in config.json keeps tables of embeddings, says why, and gives way to a rule for them."""
    tensors = {f"{name}.weight": torch.randn(128, 128) for name in (TABLE, "encoder.layer.0.attention.self.query")}
    specs = {"modelopt": "nvfp4", "nunchaku": "svdquant_w4a4(rank=16)", "awq": "wna16(zero_point=true)"}
    spec = specs.get(dialect, "int8" if dialect in ("comfy", "torchao") else "wna16")
    tensors["other.weight"] = torch.randn(128, 128)
    with opened(tmp_path / "a.safetensors", tensors) as source:
        made = [make_plan(source, spec, dialect=dialect, layer_rules=rules) for rules in ([], [(TABLE, spec)])]

    plain = dialect not in ("comfy", "torchao")
    table, ruled = (by_key(plan)[f"{TABLE}.weight"] for plan in made)
    assert (table.action, ruled.action) == ("keep" if plain else "quantize", "quantize")
    assert not plain or table.why == f"embedding table, which programs that read {dialect} take for a plain one"


def test_sizes_are_those_of_the_file(source, tmp_path):
    """The planned bytes are exactly the bytes of all tensors in the input and in the output."""
    for spec in ("fp8_e4m3(granularity=row)", "nvfp4", "mxfp8", "awq_w4a16", "svdquant_w4a4(rank=4,act_unsigned=true)"):
        plan = make_plan(source, spec, solver="rtn", preset="none")
        convert(source, tmp_path / "out.safetensors", plan)
        written = sum(tensor.nbytes for tensor in load_file(tmp_path / "out.safetensors").values())

        assert plan.bytes_before == sum(tensor.nbytes for tensor in model_tensors().values())
        assert plan.bytes_after == written
        assert sum(sum(sizes.values()) for sizes in plan.sizes_after.values()) == written


def test_auto_solver_is_resolved_and_noted(source):
    """The plan holds the solver that `auto` took, format by format, and a note that says so."""
    plan = make_plan(source, "nvfp4", layer_rules=[(r"\.up", "int8(rotation=0)")], preset="none")

    assert by_key(plan)["blocks.0.down.weight"].solver == "scale_search"
    assert by_key(plan)["blocks.0.up.weight"].solver == "rtn"
    assert [note.partition(" (")[0] for note in plan.notes] == ["nvfp4: solver scale_search", "int8: solver rtn"]


def test_patterns_choose_layers(source):
    """`keep` beats a layer rule, the first rule beats the next, a rule beats `only`, and `only` keeps all the rest."""
    plan = make_plan(
        source,
        "fp8_e4m3",
        preset="none",
        keep=[r"blocks\.0"],
        only=[r"\.up$"],
        layer_rules=[(r"blocks\.[01]\.down", "mxfp4"), (r"down", "mxfp8")],
    )
    tensors = by_key(plan)

    assert (tensors["blocks.0.up.weight"].action, tensors["blocks.0.down.weight"].action) == ("keep", "keep")
    assert tensors["blocks.0.down.weight"].why == r"matches --keep 'blocks\\.0'"
    assert tensors["blocks.1.up.weight"].format == "fp8_e4m3"
    assert tensors["blocks.1.down.weight"].format == "mxfp4"
    assert tensors["blocks.2.down.weight"].format == "mxfp8"
    assert (tensors["ragged.weight"].action, tensors["ragged.weight"].why) == ("keep", "matches no --only pattern")


def test_a_layer_rule_overrides_size_but_not_what_is_impossible(source):
    """A rule that names a small layer, or a convolution, quantizes it; one that names a vector cannot."""
    plan = make_plan(source, "fp8_e4m3", preset="none", layer_rules=[("tiny|patch|norm", "fp8_e5m2")])

    assert by_key(plan)["tiny.weight"].format == by_key(plan)["patch.weight"].format == "fp8_e5m2"
    assert by_key(plan)["blocks.0.norm.weight"].action == "keep"


@pytest.mark.parametrize(
    ("options", "kind", "complaint"),
    [
        ({"keep": ["blocks["]}, PlanError, r"--keep 'blocks\[' is no regular expression"),
        (
            {"keep": ["block_7"]},
            PlanError,
            r"--keep 'block_7' matches no layer; a layer's name is, for example, 'blocks",
        ),
        ({"only": ["nothing"]}, PlanError, "--only 'nothing' matches no layer"),
        ({"layer_rules": [("nothing", "int8")]}, PlanError, "--layer 'nothing' matches no layer"),
        ({"layer_rules": [("up", "int9")]}, FormatError, "unknown format 'int9'"),
        ({"solver": "best"}, SolverError, "unknown solver 'best'"),
        ({"preset": "no_such_family"}, LowbitError, "no_such_family"),
        ({"dialect": "none"}, CheckpointError, "unknown dialect 'none'"),
    ],
)
def test_a_wrong_option_is_one_clear_error(source, options, kind, complaint):
    """A mistyped pattern, format, solver, preset or dialect is refused by name when the plan is made."""
    with pytest.raises(kind, match=complaint):
        make_plan(source, "fp8_e4m3", **{"preset": "none", **options})


def test_a_format_that_needs_calibration_is_refused(source):
    """A spec with parts that only calibration can give is refused before anything is planned."""
    with pytest.raises(PlanError, match="needs calibration"):
        make_plan(source, "fp8_e4m3(input_scale=true)", preset="none")


def test_two_output_tensors_of_one_name_are_refused(tmp_path):
    """A plain tensor that has the name of a part that quantizing makes is found before anything is written."""
    tensors = {"a.weight": torch.randn(128, 128), "a.weight_scale_2": torch.ones(3)}
    with (
        opened(tmp_path / "a.safetensors", tensors) as source,
        pytest.raises(PlanError, match="two output tensors would"),
    ):
        make_plan(source, "nvfp4", preset="none")


def test_quantized_input_is_refused_unless_asked_for(source, tmp_path):
    """Converting a converted file again is an error that names a layer and its format; with requantize it works."""
    convert(source, tmp_path / "fp8.safetensors", make_plan(source, "fp8_e4m3", preset="none"))
    with open_source(tmp_path / "fp8.safetensors") as again:
        with pytest.raises(
            PlanError, match=r"fp8\.safetensors: layer .* is quantized already \(fp8_e4m3\), with \d more"
        ):
            make_plan(again, "int8", preset="none")
        plan = make_plan(again, "mxfp8", preset="none", requantize=True, keep=["ragged"])

    tensors = by_key(plan)
    assert (tensors["blocks.0.up.weight"].was, tensors["blocks.0.up.weight"].format) == ("fp8_e4m3", "mxfp8")
    assert tensors["blocks.0.up.weight_scale"].action == "drop"
    assert {tensors[f"ragged.{part}"].action for part in ("weight", "weight_scale", "comfy_quant")} == {"keep"}
    assert tensors["ragged.weight"].why.startswith("already quantized (fp8_e4m3)")
    assert Plan.from_json(plan.to_json()) == plan


def test_float8_without_a_scale_is_kept_unless_asked_for(tmp_path):
    """A weight cast to float8 is kept, and the reason names the option that takes its values for another format."""
    tensors = {"a.weight": torch.randn(128, 128).to(torch.float8_e4m3fn), "b.weight": torch.randn(128, 128)}
    tensors["c.weight"] = torch.ones(128, 128).to(torch.float8_e8m0fnu)
    with opened(tmp_path / "a.safetensors", tensors) as source:
        plans = [make_plan(source, "int8", preset="none", requantize=again) for again in (False, True)]

    kept, taken = (by_key(plan)["a.weight"] for plan in plans)
    assert (kept.action, taken.action) == ("keep", "quantize")
    assert kept.why.startswith(
        "already quantized (float8_e4m3fn, cast without a scale; --requantize converts its values"
    )
    assert by_key(plans[1])["c.weight"].why == "already quantized (float8_e8m0fnu)"  # scales, no values
    assert Plan.from_json(plans[1].to_json()) == plans[1]


@pytest.mark.parametrize("scale", ["a.scale", "a.qscale_weight", "a.weight.scale"])
def test_float8_beside_an_unknown_scale_is_kept(tmp_path, scale):
    """Other programs spell scales otherwise (DeepSeek's .scale): without it the values would be wrong."""
    tensors = {f"{name}.weight": torch.randn(128, 128).to(torch.float8_e4m3fn) for name in "ab"}
    with opened(tmp_path / "a.safetensors", {**tensors, scale: torch.full((1, 1), 1e-3)}) as source:
        plan = by_key(make_plan(source, "int8", preset="none", requantize=True))

    assert plan["a.weight"].why == f"already quantized (float8_e4m3fn), and how {scale!r} scales it is not known"
    assert [plan[f"{name}.weight"].action for name in "ab"] == ["keep", "quantize"]


@pytest.mark.parametrize(("dialect", "noted"), [("compressed_tensors", True), ("comfy", False)])
def test_a_table_that_is_converted_again_for_others_is_named(tmp_path, dialect, noted):
    """It was quantized, so it is not plain to keep; a note says what programs make of it, unless a rule asks for it."""
    tensors = {f"{name}.weight": torch.randn(128, 128) for name in (TABLE, "encoder.layer.0.attention.self.query")}
    with opened(tmp_path / "a.safetensors", tensors) as source:
        convert(source, tmp_path / "b.safetensors", make_plan(source, "int8"))
    with open_source(tmp_path / "b.safetensors") as again:
        made, ruled = (
            make_plan(again, "wna16" if noted else "int8", dialect=dialect, requantize=True, layer_rules=rules)
            for rules in ([], [(TABLE, "wna16" if noted else "int8")])
        )

    said = f"{TABLE}: is a quantized embedding table, which programs that read {dialect} take for a plain one"
    assert [any(note.startswith(said) for note in plan.notes) for plan in (made, ruled)] == [noted, False]
    assert by_key(made)[f"{TABLE}.weight"].action == "quantize"


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2])
@pytest.mark.parametrize("spec", ["int8", "nvfp4", "svdquant_w4a4(rank=8)"])
def test_values_cast_to_float8_are_converted_as_if_they_were_bfloat16(tmp_path, dtype, spec):
    """What ComfyUI's users hold as fp8 without scales gives the same file, bit for bit, as its values in bfloat16."""
    torch.manual_seed(0)
    cast = {f"blocks.{i}.q.weight": (0.1 * torch.randn(128, 128)).to(dtype) for i in range(2)}
    made = []
    for name, tensors in (("cast", cast), ("wide", {key: w.bfloat16() for key, w in cast.items()})):
        with opened(tmp_path / f"{name}.safetensors", tensors) as source:
            plan = make_plan(source, spec, preset="none", requantize=True)
            convert(source, tmp_path / f"{name}-out.safetensors", plan)
            with open_source(tmp_path / f"{name}-out.safetensors") as output:
                assert verify(source, output).problems == ()
        made.append(load_file(tmp_path / f"{name}-out.safetensors"))

    assert made[0].keys() == made[1].keys()
    for key, tensor in made[0].items():
        assert tensor.dtype == made[1][key].dtype, key
        assert torch.equal(tensor.reshape(-1).view(torch.uint8), made[1][key].reshape(-1).view(torch.uint8)), key


def test_a_pipeline_is_planned_model_by_model(tmp_path):
    """In a folder of several models patterns see "<model>/<layer>", and equal names in two models do not clash."""
    (tmp_path / "pipe").mkdir()
    for name in ("text_encoder", "transformer"):
        save_shards(tmp_path / "pipe" / name)
    index = {"_class_name": "P", "text_encoder": ["x", "y"], "transformer": ["x", "y"]}
    (tmp_path / "pipe" / "model_index.json").write_text(json.dumps(index))
    with open_source(tmp_path / "pipe") as source:
        plan = make_plan(source, "int8", preset="none", only=["^transformer/"])

    actions = {c.name: {t.action for t in c.tensors if t.key == "blocks.0.up.weight"} for c in plan.components}
    assert actions == {"text_encoder": {"keep"}, "transformer": {"quantize"}}
    assert Plan.from_json(plan.to_json()) == plan


def test_the_family_is_detected_and_says_why_layers_stay(tmp_path):
    """A Qwen-Image checkpoint is recognized by its names; its rules keep layers, unless a user says otherwise."""
    names = ["transformer_blocks.0.img_mod.1", "transformer_blocks.1.img_mod.1", "transformer_blocks.0.attn.add_q_proj"]
    tensors = {f"{name}.weight": torch.randn(64, 128) for name in [*names, "img_in", "proj_out"]}
    tensors["txt_norm.weight"] = torch.ones(64)
    with opened(tmp_path / "a.safetensors", tensors) as source:
        plan = make_plan(source, "fp8_e4m3")
        none = by_key(make_plan(source, "fp8_e4m3", preset="none"))
        forced = by_key(make_plan(source, "fp8_e4m3", layer_rules=[("^img_in$", "mxfp8")]))

    assert plan.components[0].preset == "qwen_image"
    kept = {key for key, tensor in by_key(plan).items() if tensor.action == "keep" and len(tensor.shape) == 2}
    assert kept == {"img_in.weight", "proj_out.weight", "transformer_blocks.0.img_mod.1.weight"}
    assert "shape" in by_key(plan)["img_in.weight"].why
    assert {none[key].action for key in kept} == {"quantize"}
    assert forced["img_in.weight"].format == "mxfp8"


LAST = "transformer_blocks.0.img_mlp.net.2"


def qwen_block(bias: bool = True) -> dict[str, torch.Tensor]:
    """As much of a Qwen-Image as it takes to be known, the last linear of its MLP among it."""
    named = {
        "transformer_blocks.0.img_mod.1": (256, 128),
        "transformer_blocks.0.attn.add_q_proj": (128, 128),
        "transformer_blocks.0.img_mlp.net.0.proj": (256, 128),
        LAST: (128, 256),
    }
    tensors = {f"{name}.weight": gaussian(*shape, seed=i) for i, (name, shape) in enumerate(named.items())}
    return {**tensors, "txt_norm.weight": torch.ones(128), **({f"{LAST}.bias": torch.randn(128)} if bias else {})}


@pytest.mark.parametrize(
    ("options", "bias", "unsigned"),
    [({}, True, True), ({"preset": "none"}, True, False), ({}, False, False), ({"dialect": "nunchaku"}, True, False)],
)
def test_what_follows_a_gelu_gets_unsigned_activations(tmp_path, options, bias, unsigned):
    """By the family, and only where a bias can make up for the shift and the dialect has a place for it."""
    with opened(tmp_path / "in.safetensors", qwen_block(bias)) as source:
        plan = make_plan(source, "svdquant_w4a4(rank=16)", **options)
    formats = {tensor.layer: tensor for tensor in plan.tensors() if tensor.action == "quantize"}
    assert formats[LAST].format == f"svdquant_w4a4(rank=16{',act_unsigned=True' if unsigned else ''})"
    said = "it reads what a GELU gave, as the preset qwen_image says"
    assert (said in formats[LAST].why) == (unsigned or "dialect" in options)
    assert not any("act_unsigned" in tensor.format for name, tensor in formats.items() if name != LAST)


@pytest.mark.parametrize("asked", [False, True])
def test_what_is_asked_for_by_name_stays(tmp_path, asked):
    """A spec that says act_unsigned has it, whatever the family knows of the layer; a rule for layers alike."""
    spec = f"svdquant_w4a4(rank=16,act_unsigned={asked})"
    for options in ({"format": spec}, {"format": "svdquant_w4a4(rank=16)", "layer_rules": [(".*", spec)]}):
        with opened(tmp_path / "in.safetensors", qwen_block()) as source:
            plan = make_plan(source, **options)
        formats = [tensor.format for tensor in plan.tensors() if tensor.action == "quantize"]
        assert formats
        assert all(("act_unsigned=True" in one) == asked for one in formats)


def test_unsigned_activations_of_a_family_lose_less(tmp_path):
    """Of what a GELU gave, the converted layer makes a result with less error than one with signed activations."""
    tensors, errors = qwen_block(), []
    x = torch.nn.functional.gelu(gaussian(128, 256, seed=9), approximate="tanh")
    expected = x @ tensors[f"{LAST}.weight"].T + tensors[f"{LAST}.bias"]
    for preset in ("auto", "none"):
        with opened(tmp_path / "in.safetensors", tensors) as source:
            convert(source, tmp_path / "out.safetensors", make_plan(source, "svdquant_w4a4(rank=8)", preset=preset))
        linear = torch.nn.Linear(256, 128)
        load(linear, tmp_path / "out.safetensors", prefix=f"{LAST}.", strict=False)
        with torch.no_grad():
            errors.append(float((linear(x) - expected).norm()))
    assert errors[0] < 0.85 * errors[1]


def test_what_a_family_can_do_without_is_dropped_only_when_asked(tmp_path):
    """T5's decoder is left out of a text encoder with `drop`, and only then."""
    layer = "encoder.block.{}.layer.0.SelfAttention.q.weight"
    tensors = {layer.format(i): torch.randn(64, 128) for i in range(2)}
    tensors |= {layer.replace("encoder", "decoder").format(0): torch.randn(64, 128)}
    with opened(tmp_path / "a.safetensors", tensors) as source:
        plans = {drop: by_key(make_plan(source, "fp8_e4m3", preset="t5xxl", drop=drop)) for drop in (False, True)}

    decoder = layer.replace("encoder", "decoder").format(0)
    assert plans[True][decoder].action == "drop"
    assert plans[False][decoder].action != "drop"
    assert plans[True][layer.format(1)].action == "quantize"


def test_rows_that_fill_no_tile_are_kept_and_said_so(tmp_path):
    """A weight that the layout cannot hold stays, with the layout's reason; an order to pack it is refused."""
    save_file({"a.weight": torch.ones(256, 128), "b.weight": torch.ones(96, 128)}, tmp_path / "in.safetensors")
    with open_source(tmp_path / "in.safetensors") as source:
        plan = make_plan(source, "svdquant_w4a4@kitchen_tile_packed_w4a4", preset="none")
    kept = plan.components[0].tensors[1]

    assert (kept.key, kept.action, kept.why) == ("b.weight", "keep", "has 96 rows, not a multiple of 128")
    data = plan.to_json()
    data["components"][""]["tensors"]["b.weight"] |= {
        k: data["components"][""]["tensors"]["a.weight"][k] for k in ("action", "format", "solver")
    }
    with pytest.raises(PlanError, match=r"'b.weight' cannot become .*96 rows, not a multiple of 128; set its action"):
        Plan.from_json(data)


@pytest.mark.parametrize("spec", ["nvfp4@kitchen_tile_packed_w4a4", "svdquant_w4a4@tiles", "svdquant_w4a4@"])
def test_an_unknown_layout_is_refused(tmp_path, spec):
    """A layout that the format does not have is an error that lists the ones it has."""
    save_file({"a.weight": torch.ones(256, 128)}, tmp_path / "in.safetensors")
    unknown = pytest.raises(FormatError, match=r"has no layout .*it has")
    with open_source(tmp_path / "in.safetensors") as source, unknown:
        make_plan(source, spec, preset="none")
