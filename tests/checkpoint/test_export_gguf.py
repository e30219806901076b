"""Writing GGUF files: the gguf package reads what was meant, blocks are ggml's own, nothing is left half written."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from lowbit.checkpoint.convert import convert
from lowbit.checkpoint.export_gguf import export_gguf
from lowbit.checkpoint.layer_statistics import InMemory
from lowbit.checkpoint.plan import make_plan
from lowbit.checkpoint.quantized_source import look_for_layers
from lowbit.checkpoint.source import open_source
from lowbit.errors import CheckpointError, DependencyError, PlanError, WeightError, WriteError
from lowbit.formats import parse_spec
from lowbit.ops.encode import encode, encode_searched
from lowbit.solvers.base import Statistics
from tests.checkpoint.gguf_files import blocks, export, gguf, read_file, write_file
from tests.support import outlier_weight
from tests.support.checkpoints import flux_tensors
from tests.support.layers import Layer

MODEL = {
    "a.weight": outlier_weight(48, 128),
    "b.weight": outlier_weight(8, 40, seed=1).half(),
    "bank.weight": outlier_weight(12, 64, seed=2).reshape(3, 4, 64),
    "norm.weight": torch.rand(9).bfloat16(),
    "steps": torch.arange(5),
    "table": torch.rand(4, 64).bfloat16(),
}


@pytest.fixture
def path(tmp_path):
    """A small plain model."""
    save_file(MODEL, tmp_path / "in.safetensors")
    return tmp_path / "in.safetensors"


def parts_of(path):
    """The parts of the layers of a file."""
    with open_source(path) as source:
        held = look_for_layers(source, source.components[0])
        return {name: (stored.format.spec, held.load(stored)) for name, stored in held.layers.items()}


@pytest.mark.parametrize("kind", ["Q4_0", "Q8_0", "MXFP4", "Q4_1", "Q5_0", "Q5_1"])
def test_blocks_lose_less_than_those_of_the_package(path, tmp_path, kind):
    """Weights are searched, banks of experts too, and the package reads them; other tensors keep their values."""
    report = export(path, tmp_path / "out.gguf", kind, architecture="flux", metadata={"general.name": "tiny"})
    found = read_file(tmp_path / "out.gguf")

    for name in ("a.weight", "bank.weight"):
        w, number = MODEL[name].numpy(), gguf.GGMLQuantizationType[kind]
        expected = encode_searched(MODEL[name].flatten(0, -2), parse_spec(f"gguf(type={kind})"))["qdata"]
        assert found[name][0] == kind
        assert np.array_equal(found[name][1].reshape(expected.shape), expected.numpy())
        lost, plain = (
            float(np.square(gguf.dequantize(raw, number) - w).sum())
            for raw in (found[name][1], gguf.quantize(w, number))
        )
        assert lost < 0.99 * plain
    assert found["norm.weight"][0] == "F32"
    assert np.array_equal(found["norm.weight"][1], MODEL["norm.weight"].float().numpy())
    assert found["b.weight"][0] == "F16"
    assert np.array_equal(found["b.weight"][1], MODEL["b.weight"].numpy())
    assert np.array_equal(found["steps"][1], np.arange(5))
    assert found["table"][0] == "BF16"
    assert report.types == {name: entry[0] for name, entry in found.items()}
    assert report.bytes == (tmp_path / "out.gguf").stat().st_size
    assert report.notes == (
        "b.weight: [8, 40] has 40 columns, not a multiple of the 32 of a " + kind + " block; kept as F16",
    )


@pytest.mark.parametrize("kind", ["Q4_0", "Q8_0", "MXFP4", "Q4_1", "Q5_0", "Q5_1"])
def test_a_plan_of_plain_rounding_gives_the_bytes_of_the_package(path, tmp_path, kind):
    """With the solver rtn blocks are those of gguf.quantize."""
    with open_source(path) as source:
        plan = make_plan(source, f"gguf(type={kind})", preset="none", solver="rtn")
        export_gguf(source, tmp_path / "out.gguf", plan)

    expected = gguf.quantize(MODEL["a.weight"].numpy(), gguf.GGMLQuantizationType[kind])
    assert np.array_equal(read_file(tmp_path / "out.gguf")["a.weight"][1], expected)


def test_statistics_serve_without_a_plan(tmp_path):
    """A type by its name takes the solver that is best for what is known of a layer."""
    layer = Layer.make(32, 128)
    known = InMemory({"a": layer.exact()})
    save_file({"a.weight": layer.weight}, tmp_path / "in.safetensors")
    lost = []
    for statistics in (None, known):
        export(tmp_path / "in.safetensors", tmp_path / "out.gguf", "Q4_0", statistics=statistics)
        raw = read_file(tmp_path / "out.gguf")["a.weight"][1]
        error = torch.from_numpy(gguf.dequantize(raw, gguf.GGMLQuantizationType.Q4_0)) - layer.weight
        lost.append(float((error @ layer.exact().hessian * error).sum()))
    assert lost[1] < 0.9 * lost[0]


@pytest.mark.parametrize("kind", ["Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K", "NVFP4"])
def test_searched_blocks_are_read_by_the_package(tmp_path, kind):
    """K-quants and NVFP4 hold the weight; rows that they do not divide get a type with blocks of 32, or stay."""
    w = outlier_weight(6, 512)
    model = {"a.weight": w, "b.weight": w[:, :96].contiguous(), "c.weight": w[:, :40].half()}
    save_file(model, tmp_path / "in.safetensors")

    report = export(tmp_path / "in.safetensors", tmp_path / "out.gguf", kind)

    found, smaller = read_file(tmp_path / "out.gguf"), parse_spec(f"gguf(type={kind})").smaller
    assert report.types == {"a.weight": kind, "b.weight": smaller, "c.weight": "F16"}
    back = torch.from_numpy(gguf.dequantize(found["a.weight"][1], gguf.GGMLQuantizationType[kind]).copy())
    fmt = parse_spec(f"gguf(type={kind})")
    assert torch.equal(back, fmt.dequantize(encode(w, fmt), (6, 512), torch.float32))
    assert [note.partition("; ")[2] for note in report.notes] == [f"made {smaller}", "kept as F16"]
    with open_source(tmp_path / "out.gguf") as source:
        assert parts_of(tmp_path / "out.gguf")["a"][0] == f"gguf(type={kind})"
        stated = next(iter(source.files.values())).metadata["general.file_type"]
    assert gguf.LlamaFileType(int(stated)).name in (f"MOSTLY_{kind}", f"MOSTLY_{kind}_S")


def test_a_plan_of_k_quants_is_solved_with_statistics(tmp_path):
    """Layers of a plan are solved by their solver: with second moments, less of the output is lost than by rounding."""
    w = outlier_weight(32, 256)
    x = torch.randn(1024, 256, generator=torch.Generator().manual_seed(1)) @ outlier_weight(256, 256, seed=2)
    halves = [half.t() @ half / 512 for half in x.split(512)]
    known = Statistics(hessian=halves[0], tokens=512, held_out=halves[1], held_out_tokens=512)
    save_file({"a.weight": w}, tmp_path / "in.safetensors")
    lost = {}
    for solver in ("rtn", "auto"):
        with open_source(tmp_path / "in.safetensors") as source:
            plan = make_plan(source, "gguf(type=Q4_K)", preset="none", solver=solver, statistics=InMemory({"a": known}))
            export_gguf(source, tmp_path / "m.gguf", plan, statistics=InMemory({"a": known}))
        spec, parts = parts_of(tmp_path / "m.gguf")["a"]
        assert spec == "gguf(type=Q4_K)"
        error = parse_spec(spec).dequantize(parts, (32, 256), torch.float32) - w
        lost[solver] = float((error @ halves[1] * error).sum())
    assert lost["auto"] < 0.7 * lost["rtn"]


def test_our_reader_reads_it(path, tmp_path):
    """The file is sound to our own reader, with its fields and with the shapes of the source."""
    export(path, tmp_path / "out.gguf", "F16", architecture="flux", metadata={"q.n": 3, "q.f": 0.5, "q.on": True})

    with open_source(tmp_path / "out.gguf") as source:
        file = next(iter(source.files.values()))
        assert {name: info.shape for name, info in file.tensors.items()} == {
            k: tuple(v.shape) for k, v in MODEL.items()
        }
        assert torch.equal(source.read("", "a.weight"), MODEL["a.weight"].half())
        assert file.metadata["general.architecture"] == "flux"
        assert [file.metadata[f"q.{name}"] for name in ("n", "f", "on")] == ["3", "0.5", "true"]
        assert file.metadata["general.file_type"] == str(int(gguf.LlamaFileType.MOSTLY_F16))


def test_blocks_are_copied_bit_for_bit(tmp_path):
    """Of a GGUF source, blocks in their type stay as they are, with scales beside them, and all fields go along."""
    tensors = {
        "q.weight": ("Q6_K", blocks("Q6_K", 4, 256)),
        "k.weight": ("NVFP4", blocks("NVFP4", 4, 128)),
        "k.scale": ("F32", np.array([0.25], dtype=np.float32)),
        "norm.weight": ("F32", np.ones(5, dtype=np.float32)),
    }
    write_file(tmp_path / "in.gguf", tensors, {"llama.block_count": 7, "tokenizer.ggml.tokens": ["a", "b", "c"]})

    export(tmp_path / "in.gguf", tmp_path / "out.gguf", "keep", metadata={"general.name": "again"})

    found, reader = read_file(tmp_path / "out.gguf"), gguf.GGUFReader(tmp_path / "out.gguf")
    assert set(found) == set(tensors)
    for name, (kind, array) in tensors.items():
        assert found[name][0] == kind
        assert np.array_equal(found[name][1], array)
    assert reader.fields["llama.block_count"].contents() == 7
    assert reader.fields["tokenizer.ggml.tokens"].contents() == ["a", "b", "c"]
    assert reader.fields["general.architecture"].contents() == "llama"
    assert reader.fields["general.name"].contents() == "again"


def test_blocks_of_a_safetensors_file_are_copied(tmp_path):
    """Layers that were converted to gguf(type=...) in another dialect are the same bytes in a GGUF file."""
    save_file({"a.weight": MODEL["a.weight"]}, tmp_path / "in.safetensors")
    with open_source(tmp_path / "in.safetensors") as source:
        convert(source, tmp_path / "q.safetensors", make_plan(source, "gguf(type=Q4_0)", preset="none", solver="rtn"))
    export(tmp_path / "q.safetensors", tmp_path / "out.gguf", "Q4_0")

    before, after = parts_of(tmp_path / "q.safetensors"), parts_of(tmp_path / "out.gguf")

    assert before["a"][0] == after["a"][0] == "gguf(type=Q4_0)"
    assert torch.equal(before["a"][1]["qdata"], after["a"][1]["qdata"])


def test_other_formats_are_quantized_again_only_when_asked(path, tmp_path):
    """int8 layers become blocks with `requantize` alone, from what they decode to; decoding to floats is no loss."""
    with open_source(path) as source:
        convert(
            source, tmp_path / "q.safetensors", make_plan(source, "int8(granularity=row)", preset="none", solver="rtn")
        )
    with pytest.raises(
        CheckpointError, match=r"layer 'a': is quantized already, as int8.*with requantize \(--requantize\)"
    ):
        export(tmp_path / "q.safetensors", tmp_path / "out.gguf", "Q8_0")
    assert not (tmp_path / "out.gguf").exists()
    export(tmp_path / "q.safetensors", tmp_path / "out.gguf", "Q8_0", requantize=True)
    export(tmp_path / "q.safetensors", tmp_path / "f32.gguf", "F32")

    decoded = torch.tensor(read_file(tmp_path / "f32.gguf")["a.weight"][1])
    expected = encode_searched(decoded, parse_spec("gguf(type=Q8_0)"))["qdata"]
    assert np.array_equal(read_file(tmp_path / "out.gguf")["a.weight"][1], expected.numpy())


def test_a_plan_chooses_types_and_solvers(path, tmp_path):
    """A plan of gguf formats is followed, its refinements with statistics included; other formats are refused."""
    hessian = (outlier_weight(128, 128, seed=3) * 50).float()
    hessian = hessian @ hessian.t() + torch.eye(128)
    known = InMemory({"a": Statistics(hessian=hessian, tokens=64)})
    with open_source(path) as source:
        plan = make_plan(source, "gguf(type=Q4_0)", preset="none", solver="rtn+gptq", statistics=known)
        report = export_gguf(source, tmp_path / "out.gguf", plan, statistics=known)
        other = make_plan(source, "int8", preset="none", solver="rtn")
        with pytest.raises(PlanError, match=r"layer 'a': the plan says int8, and a GGUF file is given gguf"):
            export_gguf(source, tmp_path / "other.gguf", other)

    plain = gguf.quantize(MODEL["a.weight"].numpy(), gguf.GGMLQuantizationType.Q4_0)
    found = read_file(tmp_path / "out.gguf")["a.weight"][1]
    errors = [
        gguf.dequantize(raw, gguf.GGMLQuantizationType.Q4_0) - MODEL["a.weight"].numpy() for raw in (plain, found)
    ]
    plain_loss, loss = (float(np.trace(error @ hessian.numpy() @ error.T)) for error in errors)
    assert report.types["a.weight"] == "Q4_0"
    assert report.types["bank.weight"] == "F32"
    assert loss < plain_loss


@pytest.mark.parametrize("prefix", ["", "model.diffusion_model."])
def test_sensitive_layers_stay_as_convert_keeps_them(tmp_path, prefix):
    """The family's preset keeps the same plain weights that a plan keeps; with "none" they are quantized."""
    save_file(flux_tensors(prefix), tmp_path / "in.safetensors")
    with open_source(tmp_path / "in.safetensors") as source:
        (planned,) = make_plan(source, "gguf(type=Q4_K)").components
    report = export(tmp_path / "in.safetensors", tmp_path / "out.gguf", "Q4_K", architecture="flux")
    bare = export(tmp_path / "in.safetensors", tmp_path / "bare.gguf", "Q4_K", architecture="flux", preset="none")

    assert (report.preset, report.preset_why) == (planned.preset, planned.preset_why)
    assert report.preset == "flux"
    assert report.kept == {
        tensor.layer: tensor.why for tensor in planned.tensors if tensor.action == "keep" and len(tensor.shape) == 2
    }
    assert {layer.removeprefix(prefix) for layer in report.kept} == {"img_in", "final_layer.linear"}
    assert {report.types[f"{layer.removeprefix(prefix)}.weight"] for layer in report.kept} == {"BF16"}
    assert list(report.types.values()).count("Q4_K") == 2
    assert list(bare.types.values()).count("Q4_K") == 4
    assert bare.kept == {}
    with pytest.raises(PlanError, match="'fluks'"):
        export(tmp_path / "in.safetensors", tmp_path / "no.gguf", "Q4_K", preset="fluks")


def test_five_axes_are_noted_beside_four(tmp_path):
    """A kernel over time has more axes than ggml: its shape is where ComfyUI-GGUF and our own reader look for it."""
    tensors = {"conv.weight": torch.rand(8, 4, 1, 2, 2).half(), "a.weight": outlier_weight(8, 64)}
    save_file(tensors, tmp_path / "in.safetensors")
    export(tmp_path / "in.safetensors", tmp_path / "out.gguf", "Q8_0", architecture="wan")

    reader = gguf.GGUFReader(tmp_path / "out.gguf")
    noted = reader.fields["comfy.gguf.orig_shape.conv.weight"]
    assert noted.contents() == [8, 4, 1, 2, 2]
    assert noted.types == [gguf.GGUFValueType.ARRAY, gguf.GGUFValueType.INT32]
    assert next(list(t.shape) for t in reader.tensors if t.name == "conv.weight") == [2, 2, 1, 32]
    with open_source(tmp_path / "out.gguf") as source:
        assert torch.equal(source.read("", "conv.weight"), tensors["conv.weight"])
    export(tmp_path / "out.gguf", tmp_path / "again.gguf", "keep")
    with open_source(tmp_path / "again.gguf") as source:
        assert torch.equal(source.read("", "conv.weight"), tensors["conv.weight"])


def test_a_file_that_llama_cpp_cannot_load_is_warned_of(path, tmp_path):
    """Missing hyperparameters, tokenizers, architectures and names are said; a complete file is not warned of."""
    prefix, folder = "model.layers.0.mlp", tmp_path / "model"
    folder.mkdir()
    save_file({f"{prefix}.up_proj.weight": outlier_weight(8, 64)}, folder / "model.safetensors")
    (warning,) = export(folder, tmp_path / "qwen.gguf", architecture="qwen2").warnings
    assert "hyperparameters and the tokenizer are missing (qwen2.context_length, " in warning
    assert "convert_hf_to_gguf.py" in warning
    (warning,) = export(folder, tmp_path / "bare.gguf").warnings
    assert "no general.architecture is written" in warning
    (warning,) = export(folder, tmp_path / "gemma.gguf", architecture="gemma3").warnings
    assert "names stay those of the source" in warning
    assert export(path, tmp_path / "flux.gguf", architecture="flux").warnings == ()

    names = ("context_length", "embedding_length", "block_count", "feed_forward_length", "attention.head_count")
    fields = {f"qwen2.{name}": 1 for name in names} | {"qwen2.attention.layer_norm_rms_epsilon": 1e-5}
    report = export(folder, tmp_path / "some.gguf", "F16", architecture="qwen2", metadata=fields)
    assert "the tokenizer are missing (tokenizer.ggml.model, tokenizer.ggml.tokens)" in report.warnings[0]
    fields |= {"tokenizer.ggml.model": "gpt2", "tokenizer.ggml.tokens": ["a", "b"]}
    fields["qwen2.attention.layer_norm_rms_epsilon"] = 2.0**-20
    export(folder, tmp_path / "f16.gguf", "F16", architecture="qwen2", metadata=fields)
    report = export(tmp_path / "f16.gguf", tmp_path / "q8_0.gguf", "Q8_0")
    assert (report.warnings, report.types) == ((), {"blk.0.ffn_up.weight": "Q8_0"})
    kept = gguf.GGUFReader(tmp_path / "q8_0.gguf").fields
    assert {name: kept[name].contents() for name in fields} == fields


def test_nothing_is_left_behind(tmp_path):
    """An error in the middle leaves no file, and a file that was there stays as it was."""
    target = tmp_path / "out.gguf"
    target.write_bytes(b"before")
    save_file({"a.weight": torch.full((4, 32), torch.nan)}, tmp_path / "nan.safetensors")
    with pytest.raises(WeightError, match="layer 'a': holds NaN"):
        export(tmp_path / "nan.safetensors", target)

    assert target.read_bytes() == b"before"
    assert not list(tmp_path.glob("*.partial"))


def test_what_cannot_be_done_is_said(path, tmp_path, monkeypatch):
    """Unknown types, places, names and dtypes, and a missing package, each give one error that says what to do."""
    with pytest.raises(CheckpointError, match="'IQ4_XS' is no GGUF type that is made here; those are Q4_0"):
        export(path, tmp_path / "out.gguf", "IQ4_XS")
    with pytest.raises(WriteError, match="is a folder"):
        export(path, tmp_path)
    with pytest.raises(WriteError, match=r"is the input .* itself"):
        export(path, path)
    with pytest.raises(CheckpointError, match="metadata 'x' is None"):
        export(path, tmp_path / "out.gguf", metadata={"x": None})
    save_file({"x" * 64: torch.ones(4)}, tmp_path / "long.safetensors")
    with pytest.raises(CheckpointError, match="longer than the 63 bytes"):
        export(tmp_path / "long.safetensors", tmp_path / "out.gguf")
    save_file({"x": torch.ones(4, dtype=torch.uint8)}, tmp_path / "bytes.safetensors")
    with pytest.raises(CheckpointError, match=r"tensor 'x' is uint8 \[4\], which GGUF has no type for"):
        export(tmp_path / "bytes.safetensors", tmp_path / "out.gguf")
    monkeypatch.setattr("lowbit.checkpoint.export_gguf.util.find_spec", lambda _: None)
    with pytest.raises(DependencyError, match="pip install gguf"):
        export(path, tmp_path / "out.gguf")
    assert not (tmp_path / "out.gguf").exists()


@pytest.mark.parametrize(("spec", "kind"), [("mxfp4", "MXFP4"), ("nvfp4", "NVFP4")])
def test_four_bit_floats_keep_their_codes(tmp_path, spec, kind):
    """mxfp4 and nvfp4 layers become the blocks of the same codes, and the package decodes the same weights."""
    save_file({"a.weight": MODEL["a.weight"]}, tmp_path / "in.safetensors")
    with open_source(tmp_path / "in.safetensors") as source:
        convert(source, tmp_path / "q.safetensors", make_plan(source, spec, preset="none", solver="rtn"))
    with open_source(tmp_path / "q.safetensors") as source:
        held = look_for_layers(source, source.components[0])
        weight = held.dequantized(held.layers["a"], torch.float32)[0]

    export(tmp_path / "q.safetensors", tmp_path / "out.gguf", "keep")
    found = read_file(tmp_path / "out.gguf")

    kept = gguf.dequantize(found["a.weight"][1], gguf.GGMLQuantizationType[kind])
    scale = found["a.scale"][1] if kind == "NVFP4" else np.float32(1)
    assert found["a.weight"][0] == kind
    torch.testing.assert_close(torch.from_numpy(kept * scale), weight, rtol=2e-7, atol=0)


@pytest.mark.parametrize("shape", [(256, 0), (0, 256), (0, 0)])
def test_weights_without_elements_are_written(tmp_path, shape):
    """They have their shape, also where other weights become blocks."""
    save_file({"a.weight": torch.ones(64, 64), "empty.weight": torch.zeros(shape)}, tmp_path / "in.safetensors")
    export(tmp_path / "in.safetensors", tmp_path / "out.gguf", "Q8_0")

    with open_source(tmp_path / "out.gguf") as source:
        held = look_for_layers(source, source.components[0])
        found = held.layers["empty"].shape if "empty" in held.layers else held.specs["empty.weight"].shape
    assert found == shape


def test_text_of_a_gguf_file_that_is_no_utf8_is_named(tmp_path):
    """Fields are taken over by the package gguf, whose error says neither file nor field."""
    path, whole = tmp_path / "in.safetensors", tmp_path / "whole.gguf"
    save_file({"a.weight": torch.ones(64, 64)}, path)
    export(path, whole, metadata={"general.description": "a plain description"})
    whole.write_bytes(whole.read_bytes().replace(b"plain description", b"pl\xffin description"))

    with pytest.raises(CheckpointError, match=r"whole\.gguf: the text of field 'general\.description' is not UTF-8"):
        export(whole, tmp_path / "out.gguf", "keep")
    assert not (tmp_path / "out.gguf").exists()
