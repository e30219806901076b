"""The real ComfyUI, where COMFYUI_PATH names its source tree: its own tests of quantization, and a tiny Flux."""

from __future__ import annotations

import importlib
import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

pytest.importorskip("comfy_kitchen", reason="comfy-kitchen is not installed")
from lowbit.integrations.comfyui import convert_file, is_lowbit, load_diffusion_model, lowbit_ops
from tests.support.comfy_tree import REAL, TREE, install, loaded, same_tensors, stored_linear

ROOT = Path(__file__).resolve().parents[2]
pytestmark = pytest.mark.skipif(not TREE, reason="COMFYUI_PATH does not name a ComfyUI source tree")
WIDTH = 128  # one head of Flux


@pytest.fixture
def comfy(monkeypatch):
    """The real ComfyUI with its models."""
    package = install(REAL, monkeypatch)
    if "comfy.sd" not in sys.modules:
        pytest.skip("comfy.sd of the tree does not import: a package that ComfyUI needs is not installed")
    return package


def test_comfyuis_own_tests_pass_with_lowbits_operations(tmp_path):
    """Every test of tests-unit/comfy_quant passes with lowbit's operations in the place of ComfyUI's."""
    paths = [str(ROOT), str(ROOT / "src"), str(ROOT / "tests" / "support"), *filter(None, sys.path)]
    command = [sys.executable, "-m", "pytest", "-q", "-p", "comfy_lowbit_ops", "-p", "no:cacheprovider"]
    run = subprocess.run(
        [*command, str(Path(TREE) / "tests-unit" / "comfy_quant" / "test_mixed_precision.py")],
        capture_output=True,
        text=True,
        check=False,
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(paths)},
    )
    assert run.returncode == 0, run.stdout + run.stderr
    assert int(re.search(r"(\d+) passed", run.stdout)[1]) >= 6
    assert int(re.search(r"lowbit operations made: (\d+)", run.stdout)[1]) >= 5


def _linear(name, n, k):
    weight = torch.randn(n, k) / k**0.5
    return {f"{name}.weight": weight.bfloat16(), f"{name}.bias": 0.02 * torch.randn(n).bfloat16()}


def _flux():
    """The tensors of a Flux of one double and one single block."""
    w, tensors = WIDTH, {}
    for name, k in (("time_in", 256), ("vector_in", 64), ("guidance_in", 256)):
        tensors |= _linear(f"{name}.in_layer", w, k) | _linear(f"{name}.out_layer", w, w)
    tensors |= _linear("img_in", w, 64) | _linear("txt_in", w, 64)
    for side in ("img", "txt"):
        block = f"double_blocks.0.{side}"
        tensors |= _linear(f"{block}_mod.lin", 6 * w, w) | _linear(f"{block}_attn.qkv", 3 * w, w)
        tensors |= _linear(f"{block}_attn.proj", w, w)
        tensors |= _linear(f"{block}_mlp.0", 4 * w, w) | _linear(f"{block}_mlp.2", w, 4 * w)
        tensors |= {f"{block}_attn.norm.{one}_norm.scale": torch.ones(w).bfloat16() for one in ("query", "key")}
    tensors |= _linear("single_blocks.0.modulation.lin", 3 * w, w)
    tensors |= _linear("single_blocks.0.linear1", 7 * w, w) | _linear("single_blocks.0.linear2", w, 5 * w)
    tensors |= {f"single_blocks.0.norm.{one}_norm.scale": torch.ones(w).bfloat16() for one in ("query", "key")}
    return tensors | _linear("final_layer.linear", 64, w) | _linear("final_layer.adaLN_modulation.1", 2 * w, w)


def _run(model):
    torch.manual_seed(3)
    inputs = torch.randn(1, 16, 8, 8), torch.tensor([0.5]), torch.randn(1, 6, 64), torch.randn(1, 64)
    dtype = model.model.diffusion_model.img_in.bias.dtype
    x, t, context, y = (each.to(dtype) for each in inputs)
    with torch.inference_mode():
        return model.model.diffusion_model(x, t, context, y, guidance=torch.tensor([3.5]).to(dtype)).float()


@pytest.fixture
def flux(comfy, tmp_path):
    """A tiny Flux in bf16 as a whole checkpoint holds it, and its path."""
    path = tmp_path / "flux.safetensors"
    save_file({f"model.diffusion_model.{key}": tensor for key, tensor in _flux().items()}, path)
    return path


@pytest.mark.parametrize(
    ("spec", "most"),
    [("awq_w4a16", 0.2), ("svdquant_w4a4(rank=16)", 0.25), ("int8(granularity=row)", 0.05), ("nvfp4", 0.25)],
)
def test_a_tiny_flux_loads_runs_and_is_saved_as_it_was(flux, tmp_path, spec, most):
    """Converted and loaded by lowbit, its output is near that of the plain model, and its state dict is the file."""
    target = tmp_path / "small.safetensors"
    convert_file(flux, target, spec, solver="rtn", preset="flux")
    plain, small = load_diffusion_model(flux), load_diffusion_model(target, kernels="lowbit")
    expected, made = _run(plain), _run(small)

    layers = [name for name, m in small.model.named_modules() if is_lowbit(getattr(m, "weight", None))]
    assert len(layers) >= 8
    assert float((made - expected).norm() / expected.norm()) < most
    file = {key.removeprefix("model.diffusion_model."): tensor for key, tensor in load_file(target).items()}
    saved = {
        key.replace("_norm.weight", "_norm.scale"): t for key, t in small.model.diffusion_model.state_dict().items()
    }
    kept = {key for key in file if any(f"diffusion_model.{key}".startswith(f"{name}.") for name in layers)}
    assert set(saved) == set(file)
    assert same_tensors({key: saved[key] for key in kept}, {key: file[key] for key in kept})


def test_a_lora_is_baked_by_comfyuis_patcher_and_taken_out_again(flux, comfy, tmp_path):
    """ComfyUI's patcher bakes a LoRA into quantized layers, which do what the plain ones do; unpatched, all is back."""
    target = tmp_path / "small.safetensors"
    convert_file(flux, target, "awq_w4a16", solver="rtn", preset="flux")
    names = ["diffusion_model.double_blocks.0.img_mlp.2.weight", "diffusion_model.single_blocks.0.linear1.weight"]
    changes = {}
    for name, (n, k) in zip(names, ((WIDTH, 4 * WIDTH), (7 * WIDTH, WIDTH)), strict=True):
        changes[name] = (0.01 * torch.randn(n, 2) @ torch.randn(2, k),)
    small = load_diffusion_model(target)
    before = _run(small)
    linear = small.model.diffusion_model.single_blocks[0].linear1
    old = linear.weight.to(torch.float32).dequantize()

    patched = small.clone()
    assert set(patched.add_patches(changes, 1.0)) == set(names)
    patched.patch_model(device_to=torch.device("cpu"))
    gained = linear.weight.to(torch.float32).dequantize() - old
    baked = _run(patched)

    assert is_lowbit(linear.weight)
    change = changes[names[1]][0]
    assert float((gained * change).sum() / change.square().sum()) == pytest.approx(1.0, abs=0.1)
    plain = load_diffusion_model(flux)
    untouched = _run(plain)
    plain.add_patches(changes, 1.0)
    plain.patch_model(device_to=torch.device("cpu"))
    wanted = _run(plain) - untouched
    moved = baked - before
    assert float((moved * wanted).sum() / (moved.norm() * wanted.norm())) > 0.7
    patched.unpatch_model(device_to=torch.device("cpu"))
    assert torch.equal(_run(small), before)


@pytest.mark.parametrize("spec", ["svdquant_w4a4(rank=16,act_unsigned=true)", "awq_w4a16", "w4a8_codebook"])
def test_comfyuis_streaming_takes_every_part_along(comfy, spec):
    """A weight packed into one buffer of bytes, as ComfyUI streams it to a device, gives the same product there."""
    tensors, *_ = stored_linear(spec)
    linear, x = loaded(lowbit_ops(kernels="lowbit"), tensors).lin, torch.randn(3, 256).bfloat16()
    pair = [linear.weight, linear.bias]
    memory = comfy.memory_management
    buffer = torch.empty(memory.vram_aligned_size(pair), dtype=torch.uint8)

    weight, bias = memory.interpret_gathered_like(pair, buffer)
    weight.copy_(linear.weight)
    bias.copy_(linear.bias)

    assert is_lowbit(weight)
    assert torch.equal(torch.nn.functional.linear(x, weight, bias), linear(x))
    assert torch.equal(memory.tensors_to_geometries(pair)[0].dequantize(), linear.weight.dequantize())


def test_the_nodes_run_in_comfyui(flux, monkeypatch):
    """With ComfyUI's own folders, progress bar and types: convert a file, look into it, load it by the nodes."""
    folders = importlib.import_module("folder_paths")
    monkeypatch.setitem(folders.folder_names_and_paths, "diffusion_models", ([str(flux.parent)], {".safetensors"}))
    monkeypatch.setattr(folders, "filename_list_cache", {})
    spec = importlib.util.spec_from_file_location("lowbit_nodes", ROOT / "comfyui" / "lowbit_nodes" / "__init__.py")
    package = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "lowbit_nodes", package)
    spec.loader.exec_module(package)
    nodes = package.NODE_CLASS_MAPPINGS
    monkeypatch.delitem(sys.modules, "lowbit_nodes.nodes")

    assert "diffusion_models/flux.safetensors" in nodes["LowbitConvert"].INPUT_TYPES()["required"]["model"][0]
    assert "qwen_image" in nodes["LowbitLoadCLIP"].INPUT_TYPES()["required"]["type"][0]
    nodes["LowbitConvert"]().convert("diffusion_models/flux.safetensors", "awq_w4a16", "rtn", "auto", "small")
    (text,) = nodes["LowbitInspect"]().inspect("diffusion_models/small.safetensors")["result"]
    (model,) = nodes["LowbitLoadDiffusionModel"]().load("small.safetensors", "bf16", "auto", False)

    assert "awq_w4a16" in text
    assert model.model.diffusion_model.single_blocks[0].linear1.weight.dtype == torch.bfloat16
    assert bool(_run(model).isfinite().all())
