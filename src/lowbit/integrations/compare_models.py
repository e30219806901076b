"""Running a model with the weights of several checkpoints, and comparing what it says with what a reference says.

Hugging Face folders run on a text: language models are compared token by token, all others as embeddings. Any other
module, such as a diffusion model, comes from a factory with inputs of its own.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lowbit.calibration.batches import as_batch
from lowbit.checkpoint.load import load
from lowbit.errors import CheckpointError, StatisticsError
from lowbit.integrations.compare_blocks import Arguments, Pair
from lowbit.integrations.factories import call_factory, find_factory
from lowbit.integrations.text_batches import read_text, text_batches
from lowbit.integrations.text_models import load_text_model
from lowbit.report.end_to_end import EmbeddingMeter, EndToEnd, LanguageMeter, PredictionMeter, psnr

SAMPLES = 64  # lines or windows of a text
SEEDS = (0, 1, 2, 3)  # of the images that are sampled for a PSNR
_BATCH = 16  # sentences at a time
_TIMES = ("t", "timestep", "timesteps")  # what diffusion models call the argument
_SAMPLE = ("compare_sample", "sample")  # functions of a factory's module, called with a model and a seed
_STEPS = 1000.0  # of the timesteps of models that count them
_UNUSED = "pooler."  # a part of encoders that hidden states do not pass through, and that files may lack
_SHOWN = 5
Step = Callable[[str, int, int], None]
"""Called with the candidate in work, how many are done and how many there are."""


def evaluate_folder(
    folder: Path,
    text: Path,
    reference: Path,
    candidates: Sequence[Path],
    *,
    samples: int = SAMPLES,
    step: Step | None = None,
    device: str = "cpu",
) -> list[EndToEnd]:
    """Run the model of a Hugging Face folder with the weights of each checkpoint, on at most `samples` of a text.

    A sample is a line of the text for a model of embeddings (mean over the tokens), and for a language model a window
    of 512 tokens. The reference's weights replace those in the folder. `device`: where it runs; on a CPU in
    float32, elsewhere in what the folder holds, and twice, for the reference and a candidate.

    Raises:
        PlanError: transformers is not installed, or the device is wrong.
        CheckpointError: the folder or a checkpoint cannot be read, or does not fit the model.
        StatisticsError: the text cannot be read, or is none.
    """
    written = read_text(text)
    made = load_text_model(folder, device=device)
    model = made.model.eval().requires_grad_(False)
    batches = text_batches(made, written, samples=samples, batch_size=1 if made.causal else _BATCH)
    _load(model, reference)
    more = {"use_cache": False} if made.causal else {"output_hidden_states": True}

    def evaluate(other: nn.Module) -> EndToEnd:
        pair = Pair(model, other)
        meter: LanguageMeter | EmbeddingMeter = LanguageMeter() if made.causal else EmbeddingMeter()
        for tokens in batches:
            mask = tokens["attention_mask"].bool()
            one, two = pair.run(((), {**tokens, **more}), mask)
            if made.causal:
                meter.add(*(output.logits[:, :-1][mask[:, 1:]] for output in (one, two)))
            else:
                meter.add(_pooled(one, mask), _pooled(two, mask))
        measures, count = meter.result()
        return EndToEnd(meter.kind, measures, count, pair.blocks())

    return _for_each(model, candidates, evaluate, step)


def evaluate_module(
    spec: str,
    reference: Path,
    candidates: Sequence[Path],
    *,
    factory: Callable[[], Any] | None = None,
    step: Step | None = None,
) -> list[EndToEnd]:
    """Run the model that a factory `package:function` returns, with each checkpoint's weights, on the inputs it gives.

    The factory gives (model, iterable of inputs); an input is a dict of keyword arguments, a tuple of arguments or a
    tensor. Where a keyword is named t, timestep or timesteps, errors are also told by time. Where the factory's module
    has a function `compare_sample(model, seed)`, or `sample(model, seed)`, images are sampled and compared; a number
    DATA_RANGE beside it is the range of their values. `factory`: the function, where it has been found already.

    Raises:
        PlanError: there is no such factory.
        StatisticsError: it raises, or what it returns is something else.
        CheckpointError: a checkpoint cannot be read or does not fit the model.
    """
    made = _call_factory(spec, factory or find_factory(spec))
    model = made.model
    _load(model, reference)
    images = [made.sample(model, seed) for seed in SEEDS] if made.sample is not None else []
    extent = made.data_range or (max(map(_high, images)) - min(map(_low, images)) if images else 0.0)

    def evaluate(other: nn.Module) -> EndToEnd:
        pair, meter = Pair(model, other), PredictionMeter()
        for arguments, times in made.inputs:
            one, two = (_first_tensor(output, spec) for output in pair.run(arguments))
            meter.add(one, two, times)
        measures, count = meter.result()
        if made.sample is not None:
            found = [psnr(image, made.sample(other, seed), extent) for image, seed in zip(images, SEEDS, strict=True)]
            measures["mean PSNR, dB"] = sum(found) / len(found)
        return EndToEnd(meter.kind, measures, count, pair.blocks())

    return _for_each(model, candidates, evaluate, step)


def _for_each(
    model: nn.Module, candidates: Sequence[Path], evaluate: Callable[[nn.Module], EndToEnd], step: Step | None
) -> list[EndToEnd]:
    found = []
    for index, path in enumerate(candidates):
        if step is not None:
            step(str(path), index, len(candidates))
        other = copy.deepcopy(model)
        _load(other, path)
        found.append(evaluate(other))
    return found


def _load(model: nn.Module, path: Path) -> None:
    """Put a checkpoint's weights into the model; every weight that is used must be there."""
    report = load(model, path, strict=False)
    missing = [name for name in report.missing if not name.startswith(_UNUSED)]
    if missing or not (report.quantized or report.plain):
        more = f" and {len(missing) - _SHOWN} more" if len(missing) > _SHOWN else ""
        raise CheckpointError(
            f"{path}: lacks {', '.join(missing[:_SHOWN])}{more} of the model that is to be run; name the folder or the "
            "factory of the model that the checkpoints are of"
        )


def _pooled(output: Any, mask: Tensor) -> Tensor:
    """Embeddings [B, features]: the mean of the last hidden states over the tokens that are no padding."""
    hidden = output.hidden_states[-1].float()
    weights = mask.unsqueeze(-1).to(hidden.dtype)
    return (hidden * weights).sum(1) / weights.sum(1)


# ---- factories ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Made:
    """What a factory gave: a model, its inputs with their times, and what else its module offers."""

    model: nn.Module
    inputs: list[tuple[Arguments, Tensor | None]]
    sample: Callable[[nn.Module, int], Tensor] | None
    data_range: float | None


def _call_factory(spec: str, factory: Callable[[], Any]) -> _Made:
    model, inputs = call_factory(spec, factory)
    try:
        items = list(inputs)
    except Exception as error:  # whatever the user's code raises
        raise StatisticsError(f"{spec}: its inputs raised {type(error).__name__}: {error}") from error
    if not items:
        raise StatisticsError(f"{spec}: returned no inputs; return some that are unlike those of calibration")
    batches = [as_batch(item, index, None) for index, item in enumerate(items)]
    times = _scaled([_time_of(batch.kwargs) for batch in batches])
    arguments = [(batch.args, batch.kwargs) for batch in batches]
    names = getattr(factory, "__globals__", {})
    sample = next((names[name] for name in _SAMPLE if _takes_seed(names.get(name))), None)
    extent = names.get("DATA_RANGE")
    return _Made(
        model.eval().requires_grad_(False),
        list(zip(arguments, times, strict=True)),
        sample,
        float(extent) if isinstance(extent, int | float) else None,
    )


def _takes_seed(function: Any) -> bool:
    """Whether it can be called as function(model, seed) where the second parameter is a seed."""
    if not callable(function):
        return False
    names = list(inspect.signature(function).parameters.values())
    required = [p for p in names if p.default is p.empty and p.kind in {p.POSITIONAL_OR_KEYWORD, p.POSITIONAL_ONLY}]
    return len(names) >= 2 and len(required) <= 2 and names[1].name == "seed"


def _time_of(kwargs: dict[str, Any]) -> Tensor | None:
    """The timesteps of a batch as float32 [B], or None."""
    given = next((kwargs[name] for name in _TIMES if name in kwargs), None)
    if given is None:
        return None
    return torch.as_tensor(given, dtype=torch.float32, device="cpu").reshape(-1)


def _scaled(times: list[Tensor | None]) -> list[Tensor | None]:
    """Times in [0, 1]: those of models that count steps up to 1000 are divided."""
    largest = max((float(t.max()) for t in times if t is not None and len(t)), default=0.0)
    return times if largest <= 1 else [None if t is None else t / _STEPS for t in times]


def _first_tensor(output: Any, spec: str) -> Tensor:
    """The prediction: the output, or the first tensor in it."""
    for item in _flat(output):
        if item.is_floating_point():
            return item
    raise StatisticsError(f"{spec}: the model returns a {type(output).__name__} without a floating-point tensor")


def _flat(output: Any) -> Iterator[Tensor]:
    if isinstance(output, Tensor):
        yield output
    elif isinstance(output, dict):
        yield from (item for value in output.values() for item in _flat(value))
    elif isinstance(output, tuple | list):
        yield from (item for value in output for item in _flat(value))


def _high(image: Tensor) -> float:
    return float(image.max())


def _low(image: Tensor) -> float:
    return float(image.min())
