"""Converted folders of models with banks of experts, loaded by transformers."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import lowbit
from lowbit.checkpoint.convert import convert
from lowbit.checkpoint.dequantize import dequantize
from lowbit.checkpoint.plan import make_plan
from lowbit.checkpoint.source import open_source
from lowbit.errors import CheckpointError
from lowbit.experts import QuantizedBank
from lowbit.formats.parts import raw_bytes

transformers = pytest.importorskip("transformers", "5.21", reason="needs transformers 5.21")
integration = pytest.importorskip("lowbit.integrations.transformers")


@pytest.fixture
def folder(tmp_path):
    """GPT-OSS, tiny, converted: its banks are [E, K, N]."""
    config = transformers.GptOssConfig(
        num_hidden_layers=1, num_local_experts=2, hidden_size=64, intermediate_size=64, vocab_size=64, head_dim=16,
        num_attention_heads=4, num_key_value_heads=2, num_experts_per_tok=1, pad_token_id=0,
    )  # fmt: skip
    torch.manual_seed(0)
    transformers.GptOssForCausalLM(config).bfloat16().save_pretrained(tmp_path / "in")
    with open_source(tmp_path / "in") as source:
        convert(source, tmp_path / "out", make_plan(source, "int8"))
    return tmp_path / "out"


def test_banks_of_a_converted_folder_stay_in_few_bits(folder):
    """`from_pretrained` gives the very banks that `lowbit.load` gives, and the model computes with them."""
    model = transformers.GptOssForCausalLM.from_pretrained(folder)
    other = transformers.GptOssForCausalLM.from_pretrained(folder.parent / "in")
    lowbit.load(other, folder)

    for name in ("gate_up_proj", "down_proj"):
        mine, theirs = (getattr(each.model.layers[0].mlp.experts, name) for each in (model, other))
        assert isinstance(mine, QuantizedBank)
        assert isinstance(mine, nn.Parameter)
        assert (mine.transposed, mine.spec, mine.shape) == (True, "int8", theirs.shape)
        assert all(
            torch.equal(raw_bytes(a), raw_bytes(b)) for a, b in zip(mine.part_list, theirs.part_list, strict=True)
        )
    x = torch.arange(9)[None]
    assert torch.equal(model(x).logits, other(x).logits)
    assert (
        model.get_memory_footprint()
        < transformers.GptOssForCausalLM.from_pretrained(folder.parent / "in").get_memory_footprint()
    )
    with pytest.raises(CheckpointError, match=r"quantized bank of experts; save the model with lowbit\.save"):
        model.save_pretrained(folder.parent / "again")


def test_banks_are_decoded_where_that_is_asked_for(folder):
    """With dequantize the banks are plain parameters of the model's shape and dtype."""
    banks = transformers.GptOssForCausalLM.from_pretrained(folder).model.layers[0].mlp.experts
    plain = transformers.GptOssForCausalLM.from_pretrained(folder).dequantize().model.layers[0].mlp.experts

    for name in ("gate_up_proj", "down_proj"):
        assert type(getattr(plain, name).data) is torch.Tensor
        assert torch.equal(getattr(plain, name), getattr(banks, name).dequantize())


def test_a_bank_that_does_not_fit_is_refused(folder):
    """A model of other sizes is an error that names the layer and both shapes, before anything is loaded."""
    config = transformers.GptOssConfig.from_pretrained(folder, num_local_experts=3)

    with pytest.raises(CheckpointError, match=r"experts\.\w+': holds a bank of shape \[2, .*the module expects \[3, "):
        transformers.GptOssForCausalLM.from_pretrained(folder, config=config)


def test_a_bank_that_transformers_turns_over_is_decoded(tmp_path):
    """Qwen3-VL-MoE's files hold [E, K, N], its modules [E, N, K]: transformers' own conversion gets decoded weights."""
    text = {"hidden_size": 64, "intermediate_size": 64, "moe_intermediate_size": 64, "num_hidden_layers": 1}
    text |= {"num_attention_heads": 2, "num_key_value_heads": 2, "head_dim": 32, "vocab_size": 64, "num_experts": 2}
    text |= {"num_experts_per_tok": 1, "pad_token_id": 0}
    text |= {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [4, 6, 6]}}
    vision = {"depth": 1, "hidden_size": 32, "intermediate_size": 32, "num_heads": 2, "out_hidden_size": 64}
    vision |= {"deepstack_visual_indexes": [0], "num_position_embeddings": 16}
    kind = transformers.Qwen3VLMoeForConditionalGeneration
    kind(transformers.Qwen3VLMoeConfig(text_config=text, vision_config=vision)).bfloat16().save_pretrained(
        tmp_path / "in"
    )
    with open_source(tmp_path / "in") as source:
        plan = make_plan(source, "int8", bank_transposed=["experts"], only=["experts"], preset="none")
        convert(source, tmp_path / "out", plan)
    assert {t.axes for t in plan.tensors() if t.action == "quantize"} == {"E K N"}
    with open_source(tmp_path / "out") as output:
        dequantize(output, tmp_path / "plain")

    mine, theirs = kind.from_pretrained(tmp_path / "out"), kind.from_pretrained(tmp_path / "plain")
    for name, parameter in mine.named_parameters():
        assert torch.equal(parameter, theirs.get_parameter(name)), name
