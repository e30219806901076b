"""Statistics of modulation layers without data, where their input depends on nothing but the timestep.

Such a model turns the timestep into sines and cosines, these by a small MLP into one vector a step, and that by a
linear in every block into shifts, scales and gates. The MLP is in the checkpoint, so the input x = SiLU(MLP(waves(t)))
of these linears can be computed for every t there is, and with it E[x xᵀ] over a grid of t.

Waves, as all families here have them (diffusers `Timesteps(256, flip_sin_to_cos=True, downscale_freq_shift=0)`, BFL
`timestep_embedding`, Wan `sinusoidal_embedding_1d`): cos(t f_i) then sin(t f_i), f_i = 10000^(-i / half), t from 0 to
1000. A model whose modulation also sees something else (pooled text) is refused; guidance and classes are taken along.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn import functional as F

from lowbit.checkpoint.source import Component, Source
from lowbit.errors import StatisticsError
from lowbit.solvers.base import Statistics

from .accumulate import Accumulator
from .collected import Collected
from .collection import Contents, InputFacts, LayerInput
from .source_weights import source_marks

STEPS = 1000
GUIDANCE = 4.0  # FLUX.2's default
WORTH = 8  # tokens a channel that are stated at least; as if every timestep had come in that many more samples
_TOP = 1000.0  # the largest t
_MOST_ROWS = 200_000


@dataclass(frozen=True)
class TimeFamily:
    """How a family names its time MLP and what reads it. Names are without the checkpoint's prefix.

    `first`, `second`: the linears of the MLP. `reads`: patterns of the linears that see SiLU(MLP(...)), and `plain` of
    those that see it without SiLU. `guidance`: the linears of a second MLP, of the guidance, whose result is added.
    `classes`: an embedding of which a row is added. `also`: patterns of weights by which modulation depends on more.
    """

    title: str
    first: str
    second: str
    reads: str
    plain: str = r"(?!)"
    guidance: tuple[str, str] | None = None
    classes: str | None = None
    also: Mapping[str, str] | None = None


_POOLED = "the pooled text"
FAMILIES = (
    TimeFamily(
        "Qwen-Image",
        "time_text_embed.timestep_embedder.linear_1",
        "time_text_embed.timestep_embedder.linear_2",
        r"transformer_blocks\.\d+\.(?:img|txt)_mod\.1|norm_out\.linear",
        classes="time_text_embed.addition_t_embedding",
        also={r"time_text_embed\.text_embedder\.": _POOLED, r"time_text_embed\.guidance_embedder\.": "the guidance"},
    ),
    TimeFamily(
        "FLUX",
        "time_in.in_layer",
        "time_in.out_layer",
        r"(?:double_stream_modulation_(?:img|txt)|single_stream_modulation)\.lin|final_layer\.adaLN_modulation\.1",
        guidance=("guidance_in.in_layer", "guidance_in.out_layer"),
        also={r"vector_in\.": _POOLED},
    ),
    TimeFamily(
        "FLUX.2",
        "time_guidance_embed.timestep_embedder.linear_1",
        "time_guidance_embed.timestep_embedder.linear_2",
        r"(?:double_stream_modulation_(?:img|txt)|single_stream_modulation)\.linear|norm_out\.linear",
        guidance=(
            "time_guidance_embed.guidance_embedder.linear_1",
            "time_guidance_embed.guidance_embedder.linear_2",
        ),
    ),
    TimeFamily("Wan", "time_embedding.0", "time_embedding.2", r"time_projection\.1"),
    TimeFamily(
        "Wan (diffusers)",
        "condition_embedder.time_embedder.linear_1",
        "condition_embedder.time_embedder.linear_2",
        r"condition_embedder\.time_proj",
    ),
    TimeFamily(
        "PixArt or Z-Image",
        "t_embedder.mlp.0",
        "t_embedder.mlp.2",
        r"t_block\.1|(?:all_)?final_layer(?:\.\d+-\d+)?\.adaLN_modulation\.1",
        plain=r"(?:layers|noise_refiner)\.\d+\.adaLN_modulation\.0",
        also={
            r"y_embedder\.(?:mlp|embedding_table)": "the pooled text or the class",
            r"csize_embedder\.|ar_embedder\.": "the size of the image",
            r"(?:layers|blocks)\.\d+\.adaLN_modulation\.1": "things that lowbit does not know of",
        },
    ),
    TimeFamily(
        "PixArt or LTX (diffusers)",
        "adaln_single.emb.timestep_embedder.linear_1",
        "adaln_single.emb.timestep_embedder.linear_2",
        r"adaln_single\.linear",
        also={r"adaln_single\.emb\.(?:resolution|aspect_ratio)_embedder\.": "the size of the image"},
    ),
)


def modulation_statistics(source: Source, *, steps: int = STEPS, guidance: float = GUIDANCE) -> Collected:
    """The statistics of a diffusion checkpoint's modulation layers, over `steps` + 1 timesteps from 0 to 1000.

    Every second timestep is held out. `tokens` is at least `WORTH` times K: what is known of the input is everything,
    however wide it is, so no solver should distrust it as it would a small sample. The layers of the time MLP itself
    are among those that have statistics. `guidance` is what models see that embed it; with classes every pair of
    timestep and class counts. Computed in float32, whatever the weights are.

    Raises `StatisticsError` when the checkpoint has no time MLP of a known family, or one whose result is mixed with
    other things before the modulation layers see it.
    """
    component, prefix, family = _find(source)
    names = {
        key.removeprefix(prefix).removesuffix(".weight"): key.removesuffix(".weight")
        for key in component.tensors
        if key.startswith(prefix) and key.endswith(".weight")
    }
    _refuse_more(source, family, names)
    waves, hidden, embedded = _embed(source, component, prefix, family, names, steps, guidance)
    inputs = {"waves": waves, "hidden": hidden, "activated": F.silu(embedded), "embedded": embedded}
    wanted = {family.first: "waves", family.second: "hidden"}
    wanted |= {name: "activated" for name in names if re.fullmatch(family.reads, name)}
    wanted |= {name: "embedded" for name in names if re.fullmatch(family.plain, name)}
    if len(wanted) == 2:
        raise StatisticsError(
            f"{source.place}: has the time MLP of {family.title}, but no modulation layer known there"
        )
    layers: dict[str, LayerInput] = {}
    for name, key in wanted.items():
        shape = component.tensors[f"{names[name]}.weight"].shape
        if len(shape) != 2 or shape[1] != inputs[key].shape[1]:
            raise StatisticsError(
                f"{source.place}: {names[name]} has shape {list(shape)}, but its input would have "
                f"{inputs[key].shape[1]} channels; the model is not built as {family.title} is"
            )
        layers[names[name]] = LayerInput(key, (shape[0], shape[1]))
    return _collect(source, family, layers, inputs, {"steps": steps, "guidance": guidance, "family": family.title})


def _collect(
    source: Source,
    family: TimeFamily,
    layers: dict[str, LayerInput],
    inputs: Mapping[str, Tensor],
    options: dict[str, object],
) -> Collected:
    found: dict[str, Statistics] = {}
    facts: dict[str, InputFacts] = {}
    for key in dict.fromkeys(layer.input for layer in layers.values()):
        x = inputs[key]
        made = Accumulator(x.shape[1], full=True, device=x.device)
        for half in range(2):
            made.add(x[half::2], half)
        found[key] = _counted(made.finish())
        facts[key] = InputFacts(x.shape[1], found[key].tokens, found[key].held_out_tokens, "full")
    model = f"{source.place.name}, modulation over all timesteps"
    marks = source_marks(source, {name: layer.shape for name, layer in layers.items()})
    return Collected(Contents(model, layers, facts, (), options).marked(marks), found)


def _counted(statistics: Statistics) -> Statistics:
    """With the tokens that H is worth: it is of all timesteps, not of some, so it needs no more of them than it has."""
    assert statistics.absmax is not None
    times = -(-WORTH * len(statistics.absmax) // max(statistics.held_out_tokens, 1))
    if times <= 1:
        return statistics
    return replace(statistics, tokens=times * statistics.tokens, held_out_tokens=times * statistics.held_out_tokens)


def _find(source: Source) -> tuple[Component, str, TimeFamily]:
    for family in FAMILIES:
        end = f"{family.first}.weight"
        for component in source.components:
            for key in component.tensors:
                prefix = key.removesuffix(end)
                if (
                    prefix != key
                    and (not prefix or prefix.endswith("."))
                    and f"{prefix}{family.second}.weight" in (component.tensors)
                ):
                    return component, prefix, family
    raise StatisticsError(
        f"{source.place}: has no time MLP that lowbit knows ({', '.join(family.title for family in FAMILIES)}); run "
        "the model on data, by --module"
    )


def _refuse_more(source: Source, family: TimeFamily, names: Mapping[str, str]) -> None:
    for pattern, what in (family.also or {}).items():
        for name in names:
            if re.match(pattern, name):
                raise StatisticsError(
                    f"{source.place}: modulation depends not only on the timestep but also on {what} ({names[name]}), "
                    "so its inputs cannot be computed without data; run the model on data, by --module"
                )


def _embed(
    source: Source,
    component: Component,
    prefix: str,
    family: TimeFamily,
    names: Mapping[str, str],
    steps: int,
    guidance: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """The waves [T, 256], the hidden layer [T, D] and the embedding [T * classes, D] of every timestep."""

    def linear(name: str, x: Tensor) -> Tensor:
        weight = source.read(component, f"{prefix}{name}.weight").float()
        bias = f"{prefix}{name}.bias"
        return F.linear(x, weight, source.read(component, bias).float() if bias in component.tensors else None)

    width = component.tensors[f"{prefix}{family.first}.weight"].shape[1]
    waves = timestep_waves(torch.linspace(0, _TOP, steps + 1), width)
    hidden = F.silu(linear(family.first, waves))
    embedded = linear(family.second, hidden)
    if family.guidance is not None and family.guidance[0] in names:
        other = timestep_waves(torch.tensor([1000 * guidance]), width)
        embedded = embedded + linear(family.guidance[1], F.silu(linear(family.guidance[0], other)))
    if family.classes is not None and family.classes in names:
        table = source.read(component, f"{prefix}{family.classes}.weight").float()
        if len(table) * len(embedded) > _MOST_ROWS:
            raise StatisticsError(f"{source.place}: has {len(table)} classes, too many to try; run it on data")
        embedded = (embedded[None] + table[:, None]).flatten(0, 1)
    return waves, hidden, embedded


def timestep_waves(t: Tensor, width: int) -> Tensor:
    """Cosines, then sines, of t [T] at width / 2 frequencies from 1 to 1/10000: float32 [T, width]."""
    half = width // 2
    frequency = torch.exp(torch.arange(half, dtype=torch.float64) * (-math.log(10_000.0) / half))
    angle = t.double()[:, None] * frequency
    return torch.cat((angle.cos(), angle.sin()), dim=1).float()
