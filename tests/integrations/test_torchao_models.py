"""Folders in the torchao dialect, in stock transformers with stock torchao."""

from __future__ import annotations

import warnings

import pytest
import torch
from torch import nn

from lowbit.checkpoint.convert import convert
from lowbit.checkpoint.inspection import inspect
from lowbit.checkpoint.load import load
from lowbit.checkpoint.migrate import migrate
from lowbit.checkpoint.plan import make_plan
from lowbit.checkpoint.source import open_source
from lowbit.tensor import QuantizedTensor
from tests.support.tiny_transformers import TOKENS, llama

transformers = pytest.importorskip("transformers")
with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    pytest.importorskip("torchao")

pytestmark = pytest.mark.filterwarnings("ignore")  # those of stock transformers and torchao
SPECS = ("int8(activations=none)", "int8", "wna16(group_size=32)", "fp8_e4m3(granularity=row)", "nvfp4", "mxfp8")


@pytest.fixture(scope="module", autouse=True)
def quiet():
    """No progress bars."""
    transformers.utils.logging.disable_progress_bar()


def tiny() -> nn.Module:
    """A tiny Llama, always the same."""
    torch.manual_seed(0)
    return llama(layers=1).to(torch.bfloat16)


def converted(folder, spec: str):
    """The folder of a converted tiny Llama."""
    tiny().save_pretrained(folder / "plain")
    with open_source(folder / "plain") as source:
        plan = make_plan(source, spec, dialect="torchao", keep=["embed_tokens", "lm_head"])
        convert(source, folder / "out", plan)
    return folder / "out"


def stock(folder) -> nn.Module:
    """The model as stock transformers loads it."""
    return transformers.AutoModelForCausalLM.from_pretrained(folder).eval()


@pytest.mark.parametrize("spec", SPECS)
def test_stock_transformers_sees_the_same_model(tmp_path, spec):
    """Every weight is one of torchao's, and decodes to the same bits."""
    folder, mine = converted(tmp_path, spec), tiny()
    theirs = stock(folder)
    load(mine, folder)
    quantized = [name for name, p in mine.named_parameters() if isinstance(p, QuantizedTensor)]
    assert len(quantized) == 7
    for name in quantized:
        weight = theirs.get_parameter(name)
        assert type(weight).__module__.startswith("torchao."), name
        assert torch.equal(weight.dequantize(), mine.get_parameter(name).dequantize()), name


def test_stock_transformers_answers_alike(tmp_path):
    """A weight-only model gives the logits of its decoded weights, to the rounding of bfloat16."""
    folder, mine = converted(tmp_path, "int8(activations=none)"), tiny()
    load(mine, folder)
    with torch.no_grad():
        assert (stock(folder)(TOKENS).logits - mine(TOKENS).logits).abs().max() < 0.02


def test_a_folder_of_stock_transformers_is_read(tmp_path):
    """What transformers saves with torchao is found, loaded and translated, all of it with the same bits."""
    from torchao.quantization import Int8WeightOnlyConfig

    tiny().save_pretrained(tmp_path / "plain")
    config = transformers.TorchAoConfig(Int8WeightOnlyConfig(version=2))
    made = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "plain", quantization_config=config)
    made.save_pretrained(tmp_path / "theirs", max_shard_size="100KB")
    assert len(list((tmp_path / "theirs").glob("*.safetensors"))) > 1
    with open_source(tmp_path / "theirs") as source:
        found = inspect(source)
        assert (found.dialects, found.problems) == ({"": "torchao"}, ())
        migrate(source, tmp_path / "comfy", to="comfy")
    for folder in ("theirs", "comfy"):
        mine = tiny()
        load(mine, tmp_path / folder)
        for name, weight in mine.named_parameters():
            if isinstance(weight, QuantizedTensor):
                assert torch.equal(made.get_parameter(name).dequantize(), weight.dequantize()), name
