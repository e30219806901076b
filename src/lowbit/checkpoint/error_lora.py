"""A LoRA file that makes up for what a conversion lost: one low-rank correction a quantized layer.

    <prefix><layer>.lora_A.weight [r, K]    <prefix><layer>.lora_B.weight [N, r]    <prefix><layer>.alpha = r

These are the names of PEFT and diffusers, with alpha = r so that a strength of 1 is the whole correction. ComfyUI reads
them when the layer's name starts with "diffusion_model." (give that as `prefix` where the checkpoint leaves it out).
diffusers reads them with the model's place in the pipeline in front ("transformer."), which is there for a pipeline
folder. PEFT wants "base_model.model." and an adapter_config.json with the rank.

Tables of embeddings are left out (`embedding_tables`): PEFT holds their LoRA under other names, lora_embedding_A [r, V]
and lora_embedding_B [K, r] without ".weight", diffusers loads none, and lora_A and lora_B on an nn.Embedding are
refused or lost by both.

It is made from the source and the converted checkpoint, as a loader gets it, so that any conversion can have one.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from lowbit.devices import enough_memory, usable_device
from lowbit.errors import PlanError, WriteError
from lowbit.formats.parts import HALVES
from lowbit.solvers import Statistics
from lowbit.solvers.curvature import energy
from lowbit.solvers.error_lora import error_lora

from .dialects import StoredLayer
from .dialects.base import join_key, name_place
from .layer_statistics import LayerStatistics
from .pipeline import MEMORY_BUDGET, Progress, Unit, budget_for, run_units
from .plan_data import Plan
from .plan_rules import full_name, patterns
from .presets import GENERIC, detect_preset
from .quantized_source import QuantizedComponent, look_for_layers
from .source import Source
from .target import check_file_target
from .weight_shape import weight_shape
from .writer import CheckpointWriter

ONLY = "lora-layers"


@dataclass(frozen=True)
class LoraLayer:
    """One correction: its layer and rank; the relative squared error of the output without it and with it."""

    layer: str
    rank: int
    error_before: float
    error_after: float


def check_error_lora(source: Source, target: str | Path, rank: int) -> None:
    """Raise `WriteError` or `PlanError` if no LoRA of this rank can be written to `target`."""
    path = Path(target)
    if rank < 1:
        raise PlanError(f"the rank of a correction is {rank}; give 1 or more, such as 32")
    if path.suffix != ".safetensors":
        raise WriteError(f"{path}: a LoRA is a safetensors file; give it a name that ends in .safetensors")
    check_file_target(target, "error-lora.safetensors")
    for file in source.files.values():
        if path.exists() and path.samefile(file.path):
            raise WriteError(f"{path}: is the input {file.path} itself; choose another file for the LoRA")


def check_lora_layers(plan: Plan, only: Sequence[str]) -> None:
    """Raise `PlanError` for a pattern that is none, or that no layer matches which the plan quantizes."""
    names = [
        full_name(part.name, tensor.layer)
        for part in plan.components
        for tensor in part.tensors
        if tensor.action == "quantize"
    ]
    for pattern in patterns(ONLY, only):
        if not any(pattern.matches(name) for name in names):
            example = f"; a layer's name is, for example, {names[len(names) // 2]!r}" if names else ""
            raise PlanError(
                f"--{ONLY} {pattern.text!r} matches no layer that is quantized{example}; correct the pattern"
            )


def write_error_lora(
    source: Source,
    converted: Source,
    target: str | Path,
    rank: int,
    *,
    statistics: LayerStatistics | None = None,
    bias_corrected: Collection[str] = (),
    only: Sequence[str] = (),
    prefix: str = "",
    jobs: int | None = None,
    progress: Progress | None = None,
    device: str | torch.device = "cpu",
) -> list[LoraLayer]:
    """Write the corrections of all layers that `converted` holds in fewer bits than `source`; it appears when complete.

    Tables of embeddings get none: see `embedding_tables`. `only`: patterns of the names of layers; no others get one.

    `bias_corrected`: names of layers whose bias makes up for their mean error already. One layer a thread is in memory.
    `device`: where they are found.

    Raises:
        PlanError: a rank below 1, no layer that was quantized, or no such device.
        SolverError: statistics of another model, or too little memory on the device.
        CheckpointError: reading or writing failed.
    """
    check_error_lora(source, target, rank)
    device = usable_device(device)
    found = _all_layers(source, converted, only)
    layers = [layer for layer in found if not layer.is_table]
    if not layers:
        tables = " but tables of embeddings, which LoRAs do not correct" if found else ""
        raise PlanError(
            f"{converted.place}: holds no layer that {source.place} holds in more bits{tables}; nothing to correct"
        )
    entries = [entry for layer in layers for entry in layer.entries(rank, prefix)]
    writer = CheckpointWriter(target, entries, {"format": "pt"}, fingerprint="error_lora", resume=False)
    made: dict[str, LoraLayer] = {}

    def run(layer: _Layer) -> None:
        known = None if statistics is None else statistics.get_input(layer.name)
        corrected = layer.name in bias_corrected
        tensors, made[layer.name] = layer.make(rank, prefix, known, device, mean_is_corrected=corrected)
        for key, tensor in tensors.items():
            writer.write(key, tensor)
        writer.commit(layer.name, {"tensors": list(tensors)})

    try:
        units = [Unit(layer.name, layer.size, layer.memory, partial(run, layer)) for layer in layers]
        run_units(
            units,
            jobs=jobs,
            budget=budget_for((unit.memory for unit in units), MEMORY_BUDGET, jobs, device),
            progress=progress,
        )
        writer.finish()
    except BaseException:
        writer.abort(keep=False)
        raise
    return [made[layer.name] for layer in layers]


def embedding_tables(source: Source, converted: Source, only: Sequence[str] = ()) -> list[str]:
    """The layers that `write_error_lora` leaves out because their weight is a table whose rows are looked up."""
    return [layer.name for layer in _all_layers(source, converted, only) if layer.is_table]


@dataclass(frozen=True)
class _Layer:
    """A layer that one checkpoint holds in full and the other one in few bits."""

    component: str
    plain: QuantizedComponent
    held: QuantizedComponent
    stored: StoredLayer
    is_table: bool

    @property
    def name(self) -> str:
        return self.held.full_name(self.stored.layer)

    @property
    def size(self) -> int:
        return self.stored.shape[0] * self.stored.shape[1] * self.stored.dtype.itemsize

    @property
    def memory(self) -> int:
        n, k = self.stored.shape
        return 4 * (4 * n * k + 4 * k * k)

    def entries(self, rank: int, prefix: str) -> list[tuple[str, torch.dtype, tuple[int, ...]]]:
        """Names, dtypes and shapes of its tensors in the file."""
        (n, k), r = self.stored.shape, min(rank, *self.stored.shape)
        dtype = self.stored.dtype if self.stored.dtype in HALVES else torch.bfloat16
        down, up, alpha = self._keys(prefix)
        return [(down, dtype, (r, k)), (up, dtype, (n, r)), (alpha, torch.float32, ())]

    def _keys(self, prefix: str) -> tuple[str, str, str]:
        base = prefix + ".".join(part for part in (self.component.replace("/", "."), self.stored.layer) if part)
        return join_key(base, "lora_A.weight"), join_key(base, "lora_B.weight"), join_key(base, "alpha")

    def make(
        self, rank: int, prefix: str, known: Statistics | None, device: torch.device, *, mean_is_corrected: bool
    ) -> tuple[dict[str, Tensor], LoraLayer]:
        """Its tensors by key, in main memory, and what they are worth."""
        (down_key, dtype, _), (up_key, _, _), (alpha_key, _, _) = self.entries(rank, prefix)
        lost, _ = self.held.dequantized(self.stored, torch.float32)
        place = name_place(self.held.where, self.stored.layer)
        with enough_memory(device, place):
            w = self._source_weight().to(device, torch.float32)
            error = lost.to(device).neg_().add_(w)
            known = None if known is None else known.on(device)
            down, up = error_lora(error, rank, known, mean_is_corrected=mean_is_corrected, where=place)
            down, up = down.to(dtype), up.to(dtype)
            before, after = _errors(w, error, down.float(), up.float(), known, mean_is_corrected=mean_is_corrected)
        tensors = {down_key: down.cpu().contiguous(), up_key: up.cpu().contiguous()}
        tensors[alpha_key] = torch.tensor(float(down.shape[0]))
        return tensors, LoraLayer(self.name, down.shape[0], before, after)

    def _source_weight(self) -> Tensor:
        was = self.plain.layers.get(self.stored.layer)
        if was is not None:
            return self.plain.dequantized(was, torch.float32)[0]
        return self.plain.read(join_key(self.stored.layer, "weight"))


def _errors(
    w: Tensor, error: Tensor, down: Tensor, up: Tensor, known: Statistics | None, *, mean_is_corrected: bool
) -> tuple[float, float]:
    """The relative squared error of the output without and with a correction; `error` [N, K] is overwritten.

    Where the bias took the mean error away, what the correction does at the mean is an error too.
    """
    hessian, mean = (None, None) if known is None else (known.combined, known.sure_mean)
    again = 0.0
    if mean_is_corrected and mean is not None and hessian is not None:
        hessian = hessian - (torch.outer(mean, mean) if hessian.dim() == 2 else mean.square())
        again = energy((up @ (down @ mean)).unsqueeze(0), None)
    signal = energy(w, hessian) or 1.0
    before = energy(error, hessian)
    after = energy(error.addmm_(up, down, alpha=-1), hessian) + again
    return before / signal, after / signal


def _all_layers(source: Source, converted: Source, only: Sequence[str]) -> list[_Layer]:
    """The matrices of all models that were quantized, and whose names match."""
    wanted = patterns(ONLY, only)
    found = [layer for component in converted.components for layer in _layers(source, converted, component.name)]
    return [layer for layer in found if not wanted or any(pattern.matches(layer.name) for pattern in wanted)]


def _layers(source: Source, converted: Source, name: str) -> list[_Layer]:
    """The matrices of one model that were quantized, by the names and formats in both checkpoints."""
    plain = look_for_layers(source, source.component(name))
    held = look_for_layers(converted, converted.component(name))
    keys, found = list(plain.specs), []
    names = (detect_preset(keys) or GENERIC).bind(keys)
    for layer, stored in held.layers.items():
        if weight_shape(stored).axes:
            continue  # a kernel or a bank of experts, for which such a LoRA has no place
        was, key = plain.layers.get(layer), join_key(layer, "weight")
        if was is not None and was.format == stored.format:
            continue
        shape = was.shape if was is not None else plain.specs[key].shape if key in plain.specs else ()
        if tuple(shape) != stored.shape:
            raise PlanError(
                f"{stored.place}: is {list(stored.shape)}, in {source.place} it is {list(shape) or 'missing'}; these "
                "are two models"
            )
        found.append(_Layer(name, plain, held, stored, names.is_embedding(layer)))
    return found
