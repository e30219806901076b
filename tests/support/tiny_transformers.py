"""Models of transformers so small that a test can make, save and load them in a moment, and what they answer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

TOKENS = torch.arange(10).unsqueeze(0)


def llama(*, tied: bool = False, layers: int = 2) -> Any:
    """A causal language model with 7 linears of at least 128 x 64 in each of its blocks, and a head."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=320,
        max_position_embeddings=64,
        tie_word_embeddings=tied,
    )
    return LlamaForCausalLM(config).eval()


def bert() -> Any:
    """An encoder like MiniLM's: 6 linears with biases in each of 2 blocks, three tables of embeddings, a pooler."""
    from transformers import BertConfig, BertModel

    config = BertConfig(
        vocab_size=320,
        hidden_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=256,
        max_position_embeddings=64,
    )
    return BertModel(config).eval()


def t5() -> Any:
    """T5's encoder with gated feed-forward layers; its table of tokens has two names."""
    from transformers import T5Config, T5EncoderModel

    config = T5Config(
        vocab_size=320, d_model=128, d_kv=32, d_ff=256, num_layers=2, num_heads=4, feed_forward_proj="gated-gelu"
    )
    return T5EncoderModel(config).eval()


def gpt2() -> Any:
    """A causal language model of one block, whose linears are `Conv1D`s: their weights are [K, N]."""
    from transformers import GPT2Config, GPT2LMHeadModel

    return GPT2LMHeadModel(GPT2Config(vocab_size=320, n_embd=128, n_layer=1, n_head=4, n_positions=64)).eval()


MAKERS = {"llama": llama, "bert": bert, "t5": t5}


def saved(model: Any, folder: Path) -> Path:
    """The folder, with a model saved in it."""
    model.save_pretrained(folder)
    return folder


@torch.no_grad()
def answer(model: Any) -> Tensor:
    """What a model says to `TOKENS`: logits, or the last hidden state."""
    out = model(TOKENS)
    return out.logits if hasattr(out, "logits") else out.last_hidden_state
