"""Names of tensors in GGUF files: prefixes are left out, models get llama.cpp's, comparisons find the source's."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from lowbit.checkpoint.compare import compare
from lowbit.checkpoint.convert import convert
from lowbit.checkpoint.export_gguf import export_gguf
from lowbit.checkpoint.layer_statistics import InMemory
from lowbit.checkpoint.plan import make_plan
from lowbit.checkpoint.source import open_source
from lowbit.checkpoint.verify import verify
from lowbit.errors import CheckpointError
from tests.checkpoint.gguf_files import blocks, export, read_file, write_file
from tests.support import outlier_weight
from tests.support.checkpoints import flux_tensors
from tests.support.layers import Layer, power_law


def test_names_lose_the_prefix_of_a_checkpoint(tmp_path):
    """Those of an image model are what ComfyUI-GGUF looks for, and compare with the source; beside others they stay."""
    prefix = "model.diffusion_model."
    save_file(flux_tensors(prefix), tmp_path / "in.safetensors")
    report = export(tmp_path / "in.safetensors", tmp_path / "out.gguf", "Q4_K", architecture="flux")

    assert set(report.types) == set(flux_tensors())
    assert report.notes == (f"names are written without {prefix!r}, as ComfyUI-GGUF looks for them",)
    with open_source(tmp_path / "in.safetensors") as source, open_source(tmp_path / "out.gguf") as output:
        result = verify(source, output)
        assert (len(result.layers), result.identical, result.problems, result.unmatched) == (2, 3, (), 0)
        assert all(layer.name.startswith(prefix) and layer.passes(20) for layer in result.layers)

    several = {**flux_tensors(prefix), "vae.encoder.weight": torch.rand(8, 64), f"{prefix}{'x' * 50}": torch.rand(4)}
    save_file(several, tmp_path / "several.safetensors")
    with pytest.raises(CheckpointError, match=r"63 bytes.*'vae\.encoder\.weight'.*without them, or give a plan"):
        export(tmp_path / "several.safetensors", tmp_path / "no.gguf", "Q4_K")
    with open_source(tmp_path / "several.safetensors") as source:
        plan = make_plan(source, "gguf(type=Q4_K)")
        (part,) = plan.components
        tensors = tuple(replace(t, action="drop") if t.key.startswith("vae.") else t for t in part.tensors)
        plan = replace(plan, components=(replace(part, tensors=tensors),))
        report = export_gguf(source, tmp_path / "several.gguf", plan)
    assert set(report.types) == {*flux_tensors(), "x" * 50}


def test_names_of_llama_cpp(tmp_path):
    """Of a transformers model, tensors get llama.cpp's names, and llama's queries and keys the order of its rotary."""
    q, k = torch.arange(16.0).unsqueeze(1).expand(16, 32), torch.arange(8.0).unsqueeze(1).expand(8, 32)
    prefix = "model.layers.1.self_attn"
    tensors = {f"{prefix}.q_proj.weight": q, f"{prefix}.k_proj.weight": k, "model.norm.weight": torch.ones(32)}
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"no config\.json tells num_attention_heads"):
        export(tmp_path, tmp_path.parent / "no.gguf", "F32", architecture="llama")
    config = {"num_attention_heads": 2, "num_key_value_heads": 1}
    (tmp_path / "config.json").write_text(json.dumps(config))

    export(tmp_path, tmp_path.parent / "llama.gguf", "F32", architecture="llama")
    export(tmp_path, tmp_path.parent / "qwen.gguf", "F32", architecture="qwen2")
    llama, qwen = read_file(tmp_path.parent / "llama.gguf"), read_file(tmp_path.parent / "qwen.gguf")

    assert set(llama) == set(qwen) == {"blk.1.attn_q.weight", "blk.1.attn_k.weight", "output_norm.weight"}
    assert qwen["blk.1.attn_q.weight"][1][:, 0].tolist() == list(range(16))
    assert llama["blk.1.attn_q.weight"][1][:, 0].tolist() == [0, 4, 1, 5, 2, 6, 3, 7, 8, 12, 9, 13, 10, 14, 11, 15]
    assert llama["blk.1.attn_k.weight"][1][:, 0].tolist() == [0, 4, 1, 5, 2, 6, 3, 7]
    save_file({"strange.weight": q.contiguous()}, tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match="have no name in the architecture 'qwen2'"):
        export(tmp_path, tmp_path.parent / "no.gguf", "F32", architecture="qwen2")


def test_reordered_rows_are_solved_in_the_order_of_their_gradients(tmp_path):
    """A llama query solved with gradients has the blocks that it has under another name, in the rotary's order."""
    layer, root = Layer.make(128, 64), power_law(128, 2.0, seed=4)
    known = replace(layer.exact(), output_hessian=(root @ root.t()).float())
    (tmp_path / "config.json").write_text(json.dumps({"num_attention_heads": 2, "num_key_value_heads": 1}))
    name = "model.layers.1.self_attn.q_proj"
    save_file({f"{name}.weight": layer.weight}, tmp_path / "model.safetensors")

    found = {}
    with open_source(tmp_path) as source:
        plan = make_plan(
            source, "gguf(type=Q4_0)", preset="none", solver="rtn+gptq", statistics=InMemory({name: known})
        )
        for kind in ("llama", "qwen2"):
            target = tmp_path.parent / f"{kind}.gguf"
            export_gguf(source, target, plan, statistics=InMemory({name: known}), architecture=kind)
            found[kind] = read_file(target)["blk.1.attn_q.weight"][1]

    order = torch.arange(128).reshape(2, 2, 32).transpose(1, 2).flatten()
    assert np.array_equal(found["llama"], found["qwen2"][order])


@pytest.mark.parametrize(("architecture", "kind"), [("llama", "Q8_0"), ("qwen2", "Q8_0"), ("llama", "BF16")])
def test_translated_names_are_compared_with_the_source(tmp_path, architecture, kind):
    """`verify` and `compare` find each layer under its name in the source, queries and keys in the source's order."""
    folder, prefix = tmp_path / "model", "model.layers.0.self_attn"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({"num_attention_heads": 4, "num_key_value_heads": 2}))
    weights = {f"{prefix}.q_proj": (64, 64), f"{prefix}.k_proj": (32, 64), "model.layers.0.mlp.down_proj": (64, 128)}
    tensors = {f"{name}.weight": outlier_weight(*shape).bfloat16() for name, shape in weights.items()}
    tensors |= {f"{prefix}.q_proj.bias": torch.rand(64).bfloat16(), "model.norm.weight": torch.rand(64).bfloat16()}
    save_file(tensors, folder / "model.safetensors")
    export(folder, tmp_path / "out.gguf", kind, architecture=architecture)

    with open_source(folder) as source, open_source(tmp_path / "out.gguf") as output:
        result, (candidate,) = verify(source, output), compare(source, [output]).candidates
    coded = kind == "Q8_0"
    assert (result.problems, result.unmatched, result.identical) == ((), 0, 2 if coded else 5)
    assert {layer.name for layer in result.layers} == (set(weights) if coded else set())
    assert all(layer.passes(40) for layer in result.layers)
    assert {layer.name for layer in candidate.layers} == set(weights)
    assert (candidate.changed, candidate.biases) == ((), ())
    assert all(layer.sqnr > 40 for layer in candidate.layers)
    (folder / "config.json").write_text(json.dumps({"num_attention_heads": 48, "num_key_value_heads": 24}))
    with open_source(folder) as source, open_source(tmp_path / "out.gguf") as output:
        assert len(verify(source, output).layers) == len(result.layers)  # heads of another model are no crash


def test_tables_of_tokens_are_quantized_for_llama_cpp(tmp_path):
    """llama.cpp's own tools quantize the embedding and the head, which `convert` keeps."""
    names = ("model.embed_tokens", "lm_head", "model.layers.0.self_attn.q_proj", "model.layers.0.self_attn.k_proj")
    save_file({f"{name}.weight": outlier_weight(64, 64) for name in names}, tmp_path / "in.safetensors")

    report = export(tmp_path / "in.safetensors", tmp_path / "out.gguf", "Q8_0", architecture="qwen2")

    assert (report.preset, report.kept) == ("llama", {})
    assert set(report.types.values()) == {"Q8_0"}
    assert {"token_embd.weight", "output.weight"} < set(report.types)
    bare = export(tmp_path / "in.safetensors", tmp_path / "bare.gguf", "Q8_0")
    assert set(bare.kept) == {"model.embed_tokens", "lm_head"}  # under these names llama.cpp does not look for them


def test_four_bit_floats_have_their_scales_under_translated_names(tmp_path):
    """The scale beside NVFP4 blocks goes with its layer."""
    name = "model.layers.0.mlp.up_proj"
    save_file({f"{name}.weight": outlier_weight(64, 64)}, tmp_path / "in.safetensors")
    with open_source(tmp_path / "in.safetensors") as source:
        convert(source, tmp_path / "q.safetensors", make_plan(source, "nvfp4", preset="none", solver="rtn"))
    export(tmp_path / "q.safetensors", tmp_path / "out.gguf", "keep", architecture="qwen2")
    with open_source(tmp_path / "in.safetensors") as source, open_source(tmp_path / "out.gguf") as output:
        result = verify(source, output)
    assert [(layer.name, layer.passes(15)) for layer in result.layers] == [(name, True)]
    assert result.problems == ()


def test_names_that_nobody_knows_are_one_problem(tmp_path):
    """A file of which no name is the source's is not said to hold nothing quantized."""
    write_file(tmp_path / "other.gguf", {f"blk.{i}.ffn_up.weight": ("Q8_0", blocks("Q8_0", 4, 64)) for i in (0, 1)})
    save_file({"a.weight": outlier_weight(8, 64)}, tmp_path / "in.safetensors")
    with open_source(tmp_path / "in.safetensors") as source, open_source(tmp_path / "other.gguf") as output:
        result = verify(source, output)
        with pytest.raises(CheckpointError, match=r"has no layer of .* by its name"):
            compare(source, [output])
    assert (len(result.problems), result.unmatched, result.layers) == (1, 2, ())
    assert "no tensor has the name of one of the source ('blk.0.ffn_up.weight' here" in result.problems[0]
