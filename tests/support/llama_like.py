"""A decoder as Llama's, tiny and with random weights, that decodes a token a step into caches of fixed size."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

VOCABULARY, HIDDEN, WIDE, HEADS, KV_HEADS, LAYERS, LONGEST = 96, 128, 256, 4, 2, 2, 16
HEAD = HIDDEN // HEADS
LINEARS = "query|keys|values|out|gate|up|down|logits"


class Attention(nn.Module):
    """Grouped queries with rotary positions, over all tokens so far."""

    def __init__(self, batch: int) -> None:
        super().__init__()
        self.query = nn.Linear(HIDDEN, HIDDEN, bias=False)
        self.keys = nn.Linear(HIDDEN, KV_HEADS * HEAD, bias=False)
        self.values = nn.Linear(HIDDEN, KV_HEADS * HEAD, bias=False)
        self.out = nn.Linear(HIDDEN, HIDDEN, bias=False)
        for name in ("cached_keys", "cached_values"):
            self.register_buffer(name, torch.zeros(batch, KV_HEADS, LONGEST, HEAD), persistent=False)

    def forward(self, x: Tensor, position: Tensor) -> Tensor:
        """x [B, HIDDEN] at a position [1] -> [B, HIDDEN]; the token's keys and values go into the caches."""
        batch = x.shape[0]
        query = rotated(self.query(x).view(batch, HEADS, 1, HEAD), position)
        keys = rotated(self.keys(x).view(batch, KV_HEADS, 1, HEAD), position)
        self.cached_keys.index_copy_(2, position, keys)
        self.cached_values.index_copy_(2, position, self.values(x).view(batch, KV_HEADS, 1, HEAD))
        seen = (torch.arange(LONGEST, device=x.device) <= position).view(1, 1, 1, LONGEST)
        each = HEADS // KV_HEADS
        keys, values = (cache.repeat_interleave(each, dim=1) for cache in (self.cached_keys, self.cached_values))
        scores = (query @ keys.transpose(-1, -2)).float().div(HEAD**0.5).masked_fill(~seen, float("-inf"))
        return self.out((scores.softmax(-1).to(x.dtype) @ values).reshape(batch, HIDDEN))


class Layer(nn.Module):
    """Attention and a gated feed-forward network, each behind a norm."""

    def __init__(self, batch: int) -> None:
        super().__init__()
        self.attention, self.first, self.second = Attention(batch), nn.RMSNorm(HIDDEN), nn.RMSNorm(HIDDEN)
        self.gate, self.up = nn.Linear(HIDDEN, WIDE, bias=False), nn.Linear(HIDDEN, WIDE, bias=False)
        self.down = nn.Linear(WIDE, HIDDEN, bias=False)

    def forward(self, x: Tensor, position: Tensor) -> Tensor:
        """x [B, HIDDEN] -> [B, HIDDEN]."""
        x = x + self.attention(self.first(x), position)
        inner = self.second(x)
        return x + self.down(F.silu(self.gate(inner)) * self.up(inner))


class LlamaLike(nn.Module):
    """15 linears, all of K a multiple of 32."""

    def __init__(self, batch: int = 1) -> None:
        super().__init__()
        self.table = nn.Embedding(VOCABULARY, HIDDEN)
        self.layers = nn.ModuleList(Layer(batch) for _ in range(LAYERS))
        self.norm, self.logits = nn.RMSNorm(HIDDEN), nn.Linear(HIDDEN, VOCABULARY, bias=False)

    def forward(self, tokens: Tensor, position: Tensor) -> Tensor:
        """tokens int64 [B] at a position int64 [1] -> logits [B, VOCABULARY]."""
        x = self.table(tokens)
        for layer in self.layers:
            x = layer(x, position)
        return self.logits(self.norm(x))

    def forget(self) -> None:
        """Empty the caches."""
        for layer in self.layers:
            layer.attention.cached_keys.zero_()
            layer.attention.cached_values.zero_()


def rotated(x: Tensor, position: Tensor) -> Tensor:
    """x [.., HEAD] turned by its position, in pairs of channels half a head apart."""
    speed = 10000.0 ** (-torch.arange(0, HEAD, 2, device=x.device) / HEAD)
    angle = position * speed
    first, second = x.float().chunk(2, dim=-1)
    cos, sin = angle.cos(), angle.sin()
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1).to(x.dtype)


def tokens_of(batch: int, count: int = 4) -> Tensor:
    """Tokens [count, B] to decode one after another."""
    return torch.randint(0, VOCABULARY, (count, batch), generator=torch.Generator().manual_seed(4))


def decoded(model: LlamaLike, tokens: Tensor) -> Tensor:
    """The logits [count, B, VOCABULARY] of all steps, from empty caches."""
    model.forget()
    steps = [model(one, torch.tensor([at], device=one.device)) for at, one in enumerate(tokens)]
    return torch.stack(steps)
