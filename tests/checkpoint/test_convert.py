"""A conversion writes what the plan says, proves it, streams, and comes out the same however it is run."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from lowbit.checkpoint import convert as convert_module
from lowbit.checkpoint.convert import convert
from lowbit.checkpoint.dequantize import dequantize
from lowbit.checkpoint.plan import Plan, make_plan
from lowbit.checkpoint.quantized_source import look_for_layers
from lowbit.checkpoint.source import open_source
from lowbit.errors import CheckpointError, PlanError
from lowbit.formats import parse_spec
from lowbit.solvers import solver
from tests.support import outlier_weight, sqnr
from tests.support.checkpoints import files_below, model_tensors, save_model, save_shards
from tests.support.specs import ALL_SPECS


def planned(source, spec="fp8_e4m3", **options) -> Plan:
    """A plan without exceptions by name."""
    return make_plan(source, spec, **{"preset": "none", "solver": "rtn", **options})


def layers_of(path) -> dict:
    """The quantized layers of a file with their parts."""
    with open_source(path) as source:
        held = look_for_layers(source, source.components[0])
        return {name: (stored, held.load(stored)) for name, stored in held.layers.items()}


@pytest.mark.parametrize("name", ["rtn", "scale_search"])
@pytest.mark.parametrize("spec", ALL_SPECS)
def test_parts_are_those_of_the_solver(tmp_path, spec, name):
    """A loader gets from the output bit for bit what the solver gives for the weight, and all else is unchanged."""
    tensors = model_tensors() | {"wide.weight": outlier_weight(48, 1024, dtype=torch.float16)}
    save_file(tensors, tmp_path / "in.safetensors")
    with open_source(tmp_path / "in.safetensors") as source:
        plan = planned(source, spec, solver=name)
        convert(source, tmp_path / "out.safetensors", plan)
    found, out = layers_of(tmp_path / "out.safetensors"), load_file(tmp_path / "out.safetensors")

    assert found.keys() == {t.layer for t in plan.tensors() if t.action == "quantize"}
    for layer, (stored, parts) in found.items():
        fmt = parse_spec(spec)
        assert stored.format == fmt
        expected = solver(name)(tensors[f"{layer}.weight"], fmt)
        for part, tensor in expected.items():
            assert torch.equal(parts[part].reshape(-1).view(torch.uint8), tensor.reshape(-1).view(torch.uint8)), part
    for tensor in plan.tensors():
        if tensor.action == "keep" and not getattr(parse_spec(spec), "act_unsigned", False):
            assert torch.equal(out[tensor.key], tensors[tensor.key])


def test_report_holds_what_was_measured(source, tmp_path):
    """The report's SQNR, cosine and row error are those of the decoded output, and its JSON is strict JSON."""
    report = convert(source, tmp_path / "out.safetensors", planned(source, "nvfp4"))
    found, tensors = layers_of(tmp_path / "out.safetensors"), model_tensors()

    for layer in report.layers:
        stored, parts = found[layer.layer]
        w = tensors[f"{layer.layer}.weight"].double()
        a = stored.format.dequantize(parts, stored.shape, torch.float32).double()
        assert layer.accuracy.sqnr == pytest.approx(sqnr(w, a), abs=1e-3)
        assert layer.accuracy.cosine == pytest.approx(float((w * a).sum() / (w.norm() * a.norm())), abs=1e-5)
        assert layer.accuracy.max_row_error == pytest.approx(
            float(((w - a).norm(dim=1) / w.norm(dim=1)).max()), rel=1e-4
        )
        assert layer.seconds > 0
    assert report.worst(1)[0].accuracy.sqnr == min(layer.accuracy.sqnr for layer in report.layers)
    assert (report.kept, report.dropped, report.resumed) == (11, 0, 0)
    data = json.loads(json.dumps(report.to_json(), allow_nan=False))
    assert len(data["layers"]) == 7
    assert sum(layer["bytes_after"] for layer in data["layers"]) < report.bytes_after


@pytest.mark.parametrize("bias", [True, False])
def test_a_format_with_a_constant_in_the_bias_gets_the_right_one(tmp_path, bias):
    """With act_unsigned the stored bias is the true one minus the format's share; a layer without a bias gets one."""
    tensors = {"a.weight": model_tensors()["blocks.0.up.weight"]}
    true = torch.linspace(-1, 1, 192, dtype=torch.float32)
    if bias:
        tensors["a.bias"] = true
    save_file(tensors, tmp_path / "in.safetensors")
    fmt = parse_spec("svdquant_w4a4(rank=4,act_unsigned=true)")
    with open_source(tmp_path / "in.safetensors") as source:
        convert(source, tmp_path / "out.safetensors", planned(source, fmt.spec))
    out, (_, parts) = load_file(tmp_path / "out.safetensors"), layers_of(tmp_path / "out.safetensors")["a"]

    expected = (true if bias else torch.zeros(192)) - fmt.bias_share(parts)
    assert out["a.bias"].dtype == (torch.float32 if bias else torch.bfloat16)
    assert torch.equal(out["a.bias"], expected.to(out["a.bias"].dtype))
    assert float(fmt.bias_share(parts).abs().max()) > 0


def test_header_keeps_metadata_and_describes_layers(source, tmp_path):
    """The source's header metadata stays, and every quantized layer is described in the header and by a marker."""
    convert(source, tmp_path / "out.safetensors", planned(source, "int8"))
    with safe_open(tmp_path / "out.safetensors", "pt") as file:
        metadata, keys = file.metadata(), set(file.keys())

    assert (metadata["format"], metadata["author"]) == ("pt", "test")
    described = json.loads(metadata["_quantization_metadata"])["layers"]
    assert described.keys() == {key.removesuffix(".comfy_quant") for key in keys if key.endswith(".comfy_quant")}
    assert described.keys() == layers_of(tmp_path / "out.safetensors").keys()


def test_jobs_and_verification_change_no_byte(source, tmp_path):
    """One worker or four, verified or not: the same file."""
    plan = planned(source, "nvfp4")
    outputs = set()
    for number, options in enumerate([{"jobs": 1}, {"jobs": 4}, {"jobs": 2, "verify": False}]):
        report = convert(source, tmp_path / f"{number}.safetensors", plan, **options)
        outputs.add((tmp_path / f"{number}.safetensors").read_bytes())
        assert all((layer.accuracy is None) == ("verify" in options) for layer in report.layers)
    assert len(outputs) == 1


def test_a_seed_rounds_stochastically_and_repeatably(source, tmp_path):
    """The same seed gives the same file, another seed another one; equal layers get unequal noise."""
    save_model(tmp_path / "twin.safetensors", blocks__1__up__weight=model_tensors()["blocks.0.up.weight"])
    with open_source(tmp_path / "twin.safetensors") as twin:
        plan = planned(twin, "fp8_e4m3")
        files = [tmp_path / f"{i}.safetensors" for i in range(3)]
        for path, seed in zip(files, (7, 7, 8), strict=True):
            convert(twin, path, plan, seed=seed)
    out = load_file(files[0])

    assert files[0].read_bytes() == files[1].read_bytes() != files[2].read_bytes()
    assert not torch.equal(out["blocks.0.up.weight"].float(), out["blocks.1.up.weight"].float())
    assert torch.equal(out["blocks.0.up.weight_scale"], out["blocks.1.up.weight_scale"])


def test_a_seed_for_a_format_without_stochastic_rounding_is_refused(source, tmp_path, monkeypatch):
    """A seed that a format cannot use is an error before work starts, which names the tensor."""
    monkeypatch.setattr(type(parse_spec("nvfp4")), "stochastic", False)
    with pytest.raises(PlanError, match=r"weight': nvfp4 has no stochastic rounding; leave the seed out"):
        convert(source, tmp_path / "out.safetensors", planned(source, "nvfp4"), seed=1)
    assert not (tmp_path / "out.safetensors").exists()


def test_progress_counts_all_bytes_once(source, tmp_path):
    """Progress grows with every piece up to the bytes of the whole source, and names layers."""
    calls = []
    convert(source, tmp_path / "out.safetensors", planned(source), progress=lambda *call: calls.append(call))

    done = [call[0] for call in calls]
    assert done == sorted(done)
    assert {call[1] for call in calls} == {done[-1]} == {sum(t.nbytes for t in model_tensors().values())}
    assert "blocks.0.up.weight" in {call[2] for call in calls}


def test_large_plain_tensors_are_copied_in_pieces(tmp_path, monkeypatch):
    """A plain tensor larger than a piece comes out the same, and is never read whole."""
    tensors = {"a.weight": torch.randn(96, 128), "table": torch.randn(1000, 3, 7), "b.weight": torch.randn(999, 64, 1)}
    save_file(tensors, tmp_path / "in.safetensors")
    monkeypatch.setattr("lowbit.checkpoint.rewrite.COPY_BYTES", 1 << 14)
    with open_source(tmp_path / "in.safetensors") as source:
        read = []
        whole = type(source).read
        monkeypatch.setattr(type(source), "read", lambda self, part, key: read.append(key) or whole(self, part, key))
        convert(source, tmp_path / "out.safetensors", planned(source))
    out = load_file(tmp_path / "out.safetensors")

    assert all(torch.equal(out[key], tensors[key]) for key in ("table", "b.weight"))
    assert read == ["a.weight"]


def test_shards_stay_shards_with_a_new_index(tmp_path):
    """A sharded model becomes a folder of the same shards; the index has every new tensor and the new size."""
    with open_source(save_shards(tmp_path / "in")) as source:
        plan = planned(source, "nvfp4")
        convert(source, tmp_path / "out", plan)
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    names = {f"model-0000{i}-of-00002.safetensors" for i in (1, 2)}

    assert {p.name for p in (tmp_path / "out").iterdir()} == {*names, "model.safetensors.index.json"}
    held = {name: load_file(tmp_path / "out" / name) for name in names}
    assert index["weight_map"] == {key: name for name, tensors in held.items() for key in tensors}
    assert index["metadata"] == {"note": 1, "total_size": plan.bytes_after}
    assert layers_of(tmp_path / "out").keys() == {t.layer for t in plan.tensors() if t.action == "quantize"}
    assert not (tmp_path / "out.partial").exists()


def test_shards_can_become_one_file(tmp_path):
    """A target that ends in .safetensors takes all shards of one model, the same as from a single file."""
    save_model(tmp_path / "one.safetensors")
    outputs = []
    for place in (save_shards(tmp_path / "in"), tmp_path / "one.safetensors"):
        with open_source(place) as source:
            convert(source, tmp_path / "out.safetensors", planned(source, "int8"))
        outputs.append(load_file(tmp_path / "out.safetensors"))

    assert outputs[0].keys() == outputs[1].keys()
    assert all(torch.equal(outputs[0][key], outputs[1][key]) for key in outputs[0])


def test_a_model_folder_keeps_its_other_files(tmp_path):
    """A pipeline folder comes out with every file, each model converted in its place and its config saying so."""
    root = tmp_path / "pipe"
    for name in ("text_encoder", "transformer"):
        save_shards(root / name)
        (root / name / "config.json").write_text(json.dumps({"name": name}))
    index = {"_class_name": "P", "text_encoder": ["x", "y"], "transformer": ["x", "y"]}
    (root / "model_index.json").write_text(json.dumps(index))
    (root / "tokenizer").mkdir()
    (root / "tokenizer" / "vocab.txt").write_text("a\nb\n")
    with open_source(root) as source:
        report = convert(source, tmp_path / "out", planned(source, "fp8_e4m3"))
    before, after = files_below(root), files_below(tmp_path / "out")

    assert before.keys() == after.keys()
    for name in ("model_index.json", "tokenizer/vocab.txt"):
        assert after[name] == before[name]
    for name in ("transformer", "text_encoder"):
        config = json.loads(after[f"{name}/config.json"])
        assert config == {"name": name, "quantization_config": {"quant_method": "lowbit"}}
    with open_source(tmp_path / "out") as source:
        dequantize(source, tmp_path / "back")
    assert json.loads(files_below(tmp_path / "back")["transformer/config.json"]) == {"name": "transformer"}
    assert {layer.component for layer in report.layers} == {"text_encoder", "transformer"}
    assert "transformer/blocks.0.up" in {layer.name for layer in report.layers}


def test_a_folder_with_contents_is_no_target(tmp_path):
    """A folder target that exists and is not empty is refused and left alone; an empty one is used."""
    index = save_shards(tmp_path / "in")
    (tmp_path / "out").mkdir()
    with open_source(index) as source:
        (tmp_path / "out" / "mine.txt").write_text("precious")
        with pytest.raises(CheckpointError, match="out: exists already"):
            convert(source, tmp_path / "out", planned(source))
        assert files_below(tmp_path / "out") == {"mine.txt": b"precious"}
        (tmp_path / "out" / "mine.txt").unlink()
        convert(source, tmp_path / "out", planned(source))
    assert (tmp_path / "out" / "model.safetensors.index.json").exists()


def test_converting_a_quantized_file_again(source, tmp_path):
    """With requantize the codes are those of the decoded weights, biases are true, kept layers keep all parts."""
    first, second = tmp_path / "first.safetensors", tmp_path / "second.safetensors"
    convert(source, first, planned(source, "svdquant_w4a4(rank=4,act_unsigned=true)", keep=["ragged"]))
    with open_source(first) as again:
        plan = planned(again, "int8", requantize=True, keep=["blocks.2.down"])
        convert(again, second, plan)
    before, after, out = layers_of(first), layers_of(second), load_file(second)

    assert before.keys() | {"ragged"} == after.keys()
    for layer, (stored, parts) in before.items():
        if layer == "blocks.2.down":
            assert after[layer][0].format == stored.format
            assert all(torch.equal(after[layer][1][name], part) for name, part in parts.items())
            continue
        w = stored.format.dequantize(parts, stored.shape, torch.bfloat16)
        expected = parse_spec("int8").quantize(w)
        assert torch.equal(after[layer][1]["qdata"], expected["qdata"])
    # The bias went down and up by the share, rounded to bfloat16 twice.
    share = before["blocks.0.up"][0].format.bias_share(before["blocks.0.up"][1])
    stored_bias = load_file(first)["blocks.0.up.bias"]
    assert torch.equal(out["blocks.0.up.bias"], (stored_bias.float() + share).bfloat16())


def test_what_reads_back_differently_is_not_put_in_place(source, tmp_path, monkeypatch):
    """A disk that returns another byte than was written is noticed; the target does not appear."""
    writer = convert_module.rewrite.__globals__["CheckpointWriter"]
    honest = writer.read_back

    def lying(self, name):
        tensor = honest(self, name)
        if name == "blocks.1.up.weight":
            tensor.view(torch.uint8)[0, 0] ^= 1
        return tensor

    monkeypatch.setattr(writer, "read_back", lying)
    with pytest.raises(CheckpointError, match=r"'blocks\.1\.up\.weight' reads back different"):
        convert(source, tmp_path / "out.safetensors", planned(source))
    assert not (tmp_path / "out.safetensors").exists()


def test_threads_of_torch_are_as_before(source, tmp_path):
    """The caller's thread count is the same after a conversion, in this thread and in new ones."""
    before = torch.get_num_threads()
    convert(source, tmp_path / "out.safetensors", planned(source), jobs=2)

    assert torch.get_num_threads() == before


def test_the_output_has_the_permissions_of_any_new_file(source, tmp_path):
    """The output is as readable as a file that the user makes, not private as a temporary one."""
    convert(source, tmp_path / "out.safetensors", planned(source))
    (tmp_path / "plain").touch()

    assert (tmp_path / "out.safetensors").stat().st_mode == (tmp_path / "plain").stat().st_mode


@pytest.mark.parametrize("rule", [True, False])
@pytest.mark.parametrize("unsigned", [True, False])
def test_the_arrangement_in_the_file_can_be_chosen(tmp_path, rule, unsigned):
    """A spec with a layout writes tiles, in a plan file too; a loader gets what it gets from the plain arrangement."""
    tensors = {"a.weight": outlier_weight(256, 192, seed=1), "b.weight": outlier_weight(96, 128, seed=2)}
    save_file(tensors, tmp_path / "in.safetensors")
    fields = f"svdquant_w4a4(rank=8,act_unsigned={unsigned})"
    tiled = f"{fields}@kitchen_tile_packed_w4a4"
    with open_source(tmp_path / "in.safetensors") as source:
        options = {"layer_rules": [("a", tiled)]} if rule else {"only": ["a"]}
        planned(source, "int8" if rule else tiled, **options).save(tmp_path / "plan.json")
        report = convert(source, tmp_path / "tiles.safetensors", Plan.load(tmp_path / "plan.json"))
        convert(source, tmp_path / "plain.safetensors", planned(source, fields, only=["a"]))
    (stored, parts), (plain, expected) = (layers_of(tmp_path / f"{n}.safetensors")["a"] for n in ("tiles", "plain"))

    assert load_file(tmp_path / "tiles.safetensors")["a.weight"].shape == (2, 3, 32, 128)
    assert (stored.layout, plain.layout, stored.format) == ("kitchen_tile_packed_w4a4", "", plain.format)
    assert all(torch.equal(parts[name], expected[name]) for name in expected)
    assert report.layers[0].format == parse_spec(fields).spec + "@kitchen_tile_packed_w4a4"


def test_a_group_of_the_whole_row_may_be_read_back_as_a_row(tmp_path):
    """torchao's files do not tell them apart: 128 columns in a group of 128 are converted, and load."""
    folder = tmp_path / "in"
    folder.mkdir()
    (folder / "config.json").write_text('{"architectures": ["LlamaForCausalLM"], "torch_dtype": "float32"}')
    weights = {f"model.layers.0.mlp.{name}.weight": torch.randn(64, k) for name, k in (("up_proj", 128), ("x", 256))}
    save_file(weights, folder / "model.safetensors")
    with open_source(folder) as source:
        plan = make_plan(source, "wna16(group_size=128)", preset="none", dialect="torchao")
        report = convert(source, tmp_path / "out", plan)
    assert [layer.format for layer in report.layers] == ["wna16"] * 2
    with open_source(tmp_path / "out") as converted:
        held = look_for_layers(converted, converted.components[0])
        found = {name: held.dequantized(stored, torch.float32)[0] for name, stored in held.layers.items()}
    for name, decoded in found.items():
        assert (decoded - weights[f"{name}.weight"]).square().mean() < 0.02
    assert len(found) == 2
