"""Loading models into ComfyUI, and the nodes: against the stand-in, and for real where COMFYUI_PATH names a tree."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
import types
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

pytest.importorskip("comfy_kitchen", reason="comfy-kitchen is not installed")
from lowbit.errors import CheckpointError, DependencyError, WriteError
from lowbit.integrations.comfyui import convert_file, inspect_text, is_lowbit, load_clip, load_diffusion_model
from tests.support.comfy_tree import STAND_IN, install, same_tensors, stored_linear

ROOT = Path(__file__).resolve().parents[2]
NODES = ROOT / "comfyui" / "lowbit_nodes"
PREFIX = "model.diffusion_model."


@pytest.fixture
def stand_in(monkeypatch):
    """The stand-in for ComfyUI."""
    return install(STAND_IN, monkeypatch)


@pytest.fixture
def nodes(stand_in, monkeypatch, tmp_path):
    """The folder of nodes as ComfyUI imports it, with `tmp_path` as the only folder of models."""
    folders = types.ModuleType("folder_paths")
    folders.get_filename_list = lambda _: sorted(path.name for path in tmp_path.glob("*.safetensors"))
    folders.get_full_path_or_raise = lambda _, name: str(tmp_path / name)
    folders.get_folder_paths = lambda _: [str(tmp_path)]
    monkeypatch.setitem(sys.modules, "folder_paths", folders)
    spec = importlib.util.spec_from_file_location("lowbit_nodes", NODES / "__init__.py")
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "lowbit_nodes", module)
    spec.loader.exec_module(module)
    yield module
    sys.modules.pop("lowbit_nodes.nodes", None)


def _save(path, spec="svdquant_w4a4(rank=16)"):
    """A model of the stand-in: one linear behind the prefix of whole checkpoints."""
    tensors, *_ = stored_linear(spec)
    held = {f"{PREFIX}{key}": tensor for key, tensor in tensors.items()} | {"in_out": torch.tensor([256, 128])}
    save_file(held, path)
    return tensors


def test_a_model_loads_with_a_dtype_and_operations_of_its_own(stand_in, tmp_path):
    """The compute dtype is what ComfyUI takes for the model, the operations are lowbit's, errors name the file."""
    tensors = _save(tmp_path / "m.safetensors")
    loaded = load_diffusion_model(tmp_path / "m.safetensors")

    assert is_lowbit(loaded.model.lin.weight)
    assert loaded.model.lin.weight.dtype == loaded.options["dtype"] == torch.bfloat16
    assert loaded.model.lin.lowbit_reading.where == str(tmp_path / "m.safetensors")
    assert same_tensors(loaded.model.state_dict(), tensors)
    again, arguments = loaded.cached_patcher_init
    assert torch.equal(again(*arguments).model.lin.weight._qdata, loaded.model.lin.weight._qdata)


def test_a_chosen_dtype_and_options_are_kept(stand_in, tmp_path):
    """What the caller says of dtype and ComfyUI's options goes through."""
    _save(tmp_path / "m.safetensors")
    loaded = load_diffusion_model(
        tmp_path / "m.safetensors", compute_dtype=torch.float16, model_options={"load_device": torch.device("cpu")}
    )

    assert loaded.model.lin.weight.dtype == torch.float16
    assert loaded.options["load_device"] == torch.device("cpu")


def test_a_model_that_comfyui_does_not_know_is_an_error(stand_in, tmp_path):
    """ComfyUI says nothing for one; the message names the file and what may help."""
    save_file({"other.weight": torch.ones(2, 2)}, tmp_path / "m.safetensors")
    with pytest.raises(CheckpointError, match=r"m\.safetensors: ComfyUI does not know this model"):
        load_diffusion_model(tmp_path / "m.safetensors")


def test_text_encoders_are_not_given_rounded_activations(stand_in, tmp_path):
    """A CLIP's operations run in full precision, in the dtype that ComfyUI has for text encoders."""
    _save(tmp_path / "te.safetensors")
    loaded, others = load_clip([tmp_path / "te.safetensors"], stand_in.sd.CLIPType.QWEN_IMAGE)

    assert loaded.model.lin._full_precision_mm
    assert loaded.model.lin.weight.dtype == torch.float16
    assert others["clip_type"] is stand_in.sd.CLIPType.QWEN_IMAGE


def test_outside_of_comfyui_the_message_says_so(monkeypatch):
    """Without the package comfy, loading is a DependencyError that is an ImportError."""
    for name in [name for name in sys.modules if name == "comfy" or name.startswith("comfy.")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "comfy", None)
    with pytest.raises(DependencyError, match="inside ComfyUI only"):
        load_diffusion_model("m.safetensors")


# ---- nodes ----------------------------------------------------------------------------------------------------------


def test_every_node_has_what_comfyui_asks_for(nodes, tmp_path):
    """Names, inputs with defaults among their choices, a function that takes them, types of the results."""
    _save(tmp_path / "m.safetensors")

    assert set(nodes.NODE_CLASS_MAPPINGS) == set(nodes.NODE_DISPLAY_NAME_MAPPINGS)
    for node in nodes.NODE_CLASS_MAPPINGS.values():
        inputs = node.INPUT_TYPES()
        names = [name for group in inputs.values() for name in group]
        function = getattr(node, node.FUNCTION)
        assert set(names) == set(function.__code__.co_varnames[1 : function.__code__.co_argcount])
        assert node.RETURN_TYPES
        assert node.DESCRIPTION
        for kind, *more in (value for group in inputs.values() for value in group.values()):
            assert not more or not isinstance(kind, list) or more[0]["default"] in kind


def test_the_loader_nodes_load(nodes, tmp_path):
    """Model and text encoders through the nodes' own functions, with the choices that they offer."""
    _save(tmp_path / "m.safetensors")
    (model,) = nodes.NODE_CLASS_MAPPINGS["LowbitLoadDiffusionModel"]().load("m.safetensors", "fp32", "auto", False)
    (clip,) = nodes.NODE_CLASS_MAPPINGS["LowbitLoadCLIP"]().load("m.safetensors", "qwen_image", "auto")

    assert model.model.lin.weight.dtype == torch.float32
    assert is_lowbit(clip[0].model.lin.weight)


def _plain(path):
    save_file({"lin.weight": torch.randn(128, 256).bfloat16(), "lin.bias": torch.zeros(128).bfloat16()}, path)


def test_the_convert_node_writes_beside_and_never_over(nodes, stand_in, tmp_path):
    """A new file with progress shown; a second time it is refused and the file stays; names cannot leave the folder."""
    _plain(tmp_path / "m.safetensors")
    convert = nodes.NODE_CLASS_MAPPINGS["LowbitConvert"]().convert
    stand_in.utils.ProgressBar.seen.clear()

    done = convert("diffusion_models/m.safetensors", "awq_w4a16", "rtn", "none", "")

    target = tmp_path / "m-awq_w4a16.safetensors"
    assert done["result"] == (str(target),)
    assert "lin.comfy_quant" in load_file(target)
    done_bytes, total = stand_in.utils.ProgressBar.seen[-1]
    assert done_bytes == total > 0
    before = target.read_bytes()
    with pytest.raises(WriteError, match="exists already"):
        convert("diffusion_models/m.safetensors", "awq_w4a16", "rtn", "none", "")
    assert target.read_bytes() == before
    for name in ("../x", "a/b", "..", "c\\d", "/abs"):
        with pytest.raises(ValueError, match="without folders"):
            convert("diffusion_models/m.safetensors", "awq_w4a16", "rtn", "none", name)


def test_the_convert_node_shows_the_notes_of_the_plan(nodes, tmp_path):
    """What the command says of the solver and of rotated int8 stands above the result, in the same text."""
    _plain(tmp_path / "m.safetensors")

    done = nodes.NODE_CLASS_MAPPINGS["LowbitConvert"]().convert("checkpoints/m.safetensors", "int8", "auto", "none", "")

    (text,) = done["ui"]["text"]
    *notes, last = text.splitlines()
    assert any("solver rtn (auto" in note for note in notes)
    assert any("rotated by auto" in note for note in notes)
    assert last.startswith(f"{tmp_path / 'm-int8.safetensors'}: 1 layers in int8")


def test_the_inspect_node_shows_a_table(nodes, tmp_path):
    """One line a group of layers with format, size and bits; problems are named."""
    _save(tmp_path / "m.safetensors")
    done = nodes.NODE_CLASS_MAPPINGS["LowbitInspect"]().inspect("checkpoints/m.safetensors")
    (text,) = done["result"]

    assert done["ui"]["text"] == [text]
    assert f"{PREFIX}lin" in text
    assert "svdquant_w4a4(rank=16)" in text
    assert "128x256" in text
    assert text.endswith("no problems")


def test_inspecting_a_broken_file_says_what_is_wrong(tmp_path):
    """A layer that lacks a tensor is a line of the table's foot, not an error."""
    tensors, *_ = stored_linear("awq_w4a16")
    del tensors["lin.weight_zero"]
    save_file(tensors, tmp_path / "m.safetensors")

    assert "problem: " in inspect_text(tmp_path / "m.safetensors")


def test_nodes_without_lowbit_say_how_to_install_it(tmp_path):
    """Copied into a Python that has no lowbit, the folder's import names the package and the remedy."""
    code = (
        "import sys; sys.modules['lowbit'] = None\n"
        "import importlib.util as u\n"
        f"s = u.spec_from_file_location('lowbit_nodes', {str(NODES / '__init__.py')!r})\n"
        "s.loader.exec_module(u.module_from_spec(s))\n"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, cwd=tmp_path)

    assert run.returncode == 1
    assert "need the package lowbit" in run.stderr
    assert f"{sys.executable} -m pip install ." in run.stderr


def test_convert_file_refuses_a_missing_folder(tmp_path):
    """A target in a folder that does not exist is refused before anything is read."""
    _plain(tmp_path / "m.safetensors")
    with pytest.raises(WriteError, match="no folder that exists"):
        convert_file(tmp_path / "m.safetensors", tmp_path / "no" / "x.safetensors", "awq_w4a16")
