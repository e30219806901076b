"""Which layers of a model can hand a scale to which others, by the names of its parameters.

Blocks are named as Llama's: norms before q, k, v and before gate, up; up before down; v before o; each pair also as
Phi-3 joins them. A block that holds anything whose place in the graph its name does not tell gets no group there.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

_BLOCK = re.compile(r"^((?:.*\.)?)(?:self_attn|mlp)\.[^.]+\.weight$")
_INSIDE = {
    "self_attn": frozenset({"q_proj", "k_proj", "v_proj", "o_proj", "qkv_proj", "q_norm", "k_norm", "rotary_emb"}),
    "mlp": frozenset({"gate_proj", "up_proj", "down_proj", "gate_up_proj"}),
}
_BEFORE_MLP = ("pre_feedforward_layernorm", "post_attention_layernorm")
_NORMS = frozenset(
    {"input_layernorm", *_BEFORE_MLP, "post_feedforward_layernorm", "post_self_attn_layernorm", "post_mlp_layernorm"}
)


@dataclass(frozen=True)
class FoldGroup:
    """A norm, or a linear, and the linears [N, K] that take its output, which nothing else takes.

    `before`: its name; of a linear its last K rows count, as v stands last in a joined q, k, v, and up behind gate.
    `why_not`: what keeps a scale from being folded in, or "".
    """

    before: str
    linears: tuple[str, ...]
    norm: bool
    why_not: str = ""


def find_groups(shapes: Mapping[str, tuple[int, ...]]) -> Iterator[FoldGroup]:
    """The groups of a model, from the shapes of its parameters by name ("...weight", "...bias")."""
    starts = {match[1] for key in shapes if (match := _BLOCK.match(key))}
    blocks: dict[str, dict[str, tuple[int, ...]]] = {start: {} for start in sorted(starts)}
    for key, shape in shapes.items():
        for start in _starts_of(key):
            if start in blocks:
                blocks[start][key[len(start) :]] = shape
                break
    for start, inside in blocks.items():
        yield from _Block(start, inside).groups()


def _starts_of(key: str) -> Iterator[str]:
    """What a key may begin with up to a dot, the longest first."""
    end = key.rfind(".")
    while end >= 0:
        yield key[: end + 1]
        end = key.rfind(".", 0, end)
    yield ""


@dataclass(frozen=True)
class _Block:
    """One block: what its names begin with, and its parameters by the rest of their names."""

    start: str
    inside: Mapping[str, tuple[int, ...]]

    def groups(self) -> Iterator[FoldGroup]:
        strange = self._strange()
        attention = self._first(("q_proj", "k_proj", "v_proj"), ("qkv_proj",), "self_attn")
        gated = self._first(("gate_proj", "up_proj"), ("gate_up_proj",), "mlp")
        before_mlp = self._before_mlp()
        if attention and self._has("input_layernorm"):
            alone = "" if before_mlp else "no other norm stands before the MLP, which may take its output, too"
            yield self._group("input_layernorm", attention, strange["self_attn"] or alone)
        if attention and self._has("self_attn.o_proj"):
            yield self._group(attention[-1], ["self_attn.o_proj"], strange["self_attn"], len(attention) == 1)
        if gated and before_mlp:
            yield self._group(before_mlp, gated, strange["mlp"])
        if gated and self._has("mlp.down_proj"):
            yield self._group(gated[-1], ["mlp.down_proj"], strange["mlp"], len(gated) == 1)

    def _has(self, name: str) -> bool:
        return f"{name}.weight" in self.inside

    def _first(self, apart: tuple[str, ...], joined: tuple[str, ...], folder: str) -> list[str]:
        """Of two spellings of the same linears the one that is there."""
        for names in (apart, joined):
            if all(self._has(f"{folder}.{name}") for name in names):
                return [f"{folder}.{name}" for name in names]
        return []

    def _before_mlp(self) -> str:
        """The norm before the MLP: the one after the attention only where none stands behind the MLP, as in OLMo 2."""
        before, after = _BEFORE_MLP
        if self._has(before):
            return before
        return after if self._has(after) and not self._has("post_feedforward_layernorm") else ""

    def _strange(self) -> dict[str, str]:
        """What in the block is not known here, in words, for groups of the attention and of the MLP."""
        found = dict.fromkeys(_INSIDE, "")
        for name in self.inside:
            folder, _, rest = name.partition(".")
            hit = [folder] if folder in _INSIDE and rest.partition(".")[0] not in _INSIDE[folder] else []
            if folder not in _INSIDE and folder not in _NORMS:
                hit = list(_INSIDE)
            for each in hit:
                found[each] = found[each] or f"what {name} takes is not known"
        return found

    def _group(self, before: str, linears: list[str], why_not: str, joined: bool = False) -> FoldGroup:
        """`joined`: the linear before is several in one, of which the last counts."""
        shape, norm = self.inside[f"{before}.weight"], before in _NORMS
        found = [self.inside[f"{name}.weight"] for name in linears]
        group = FoldGroup(self.start + before, tuple(self.start + name for name in linears), norm, why_not)
        if why_not:
            return group
        wide = {shape[1] if len(shape) == 2 else -1 for shape in found}
        k = wide.pop()
        rows = k * (1 if not joined else 3 if "qkv" in before else 2)
        if wide or len(shape) != (1 if norm else 2) or shape[0] != rows:
            why_not = f"{before} {list(shape)} does not give the {k} channels of {linears[0]} one by one"
        return FoldGroup(group.before, group.linears, norm, why_not)
