"""all-MiniLM-L6-v2 for the benchmarks: the model, texts as batches of tokens, embeddings and their error.

The error of a quantized model is `embedding_error`: the mean over test sentences of 1 - cosine between its embedding
and that of the float32 model. Calibration takes the first 256 lines of one file in `texts/`, or the 512 of the text
that comes with lowbit (`BUILTIN`); the test takes all lines of another file.
"""

from __future__ import annotations

import copy
import os
import platform
import subprocess
from collections.abc import Mapping, Sequence
from importlib import metadata
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lowbit.integrations.minilm_demo import model_folder
from lowbit.integrations.text_batches import VARIED, builtin_text, text_batches
from lowbit.integrations.text_models import TextModel

TEXTS = Path(__file__).with_name("texts")
CALIBRATION_SENTENCES = 256  # of a genre
BUILTIN = "built-in"  # the text that comes with lowbit, as a genre to calibrate on
BUILTIN_HALF = "built-in, 256"  # every second passage of it, as many as of a genre
MIXED = (BUILTIN, BUILTIN_HALF)  # of several kinds of text
DIRECTIONS = (  # calibrate on the first, test on the second
    ("everyday", "reference"),
    ("reference", "everyday"),
    (BUILTIN, "reference"),
    (BUILTIN, "everyday"),
    (BUILTIN, "novel"),
)
Batch = dict[str, Tensor]


def sentences(genre: str) -> list[str]:
    """All sentences of `texts/<genre>.txt`."""
    return (TEXTS / f"{genre}.txt").read_text(encoding="utf-8").splitlines()


def load_model() -> tuple[nn.Module, object]:
    """The float32 model in evaluation mode and its tokenizer; nothing is fetched."""
    import transformers

    transformers.utils.logging.disable_progress_bar()
    folder = model_folder()
    model = transformers.AutoModel.from_pretrained(folder, local_files_only=True, dtype=torch.float32).eval()
    return model.requires_grad_(False), transformers.AutoTokenizer.from_pretrained(folder, local_files_only=True)


def calibration_sentences(genre: str) -> list[str]:
    """What a calibration on a genre has: the first 256 lines; of the built-in text all, or every second."""
    if genre in MIXED:
        return builtin_text().splitlines()[:: 1 if genre == BUILTIN else 2]
    return sentences(genre)[:CALIBRATION_SENTENCES]


def lowbit_batches(model: nn.Module, tokenizer, genre: str, vary: float | None = None) -> list[Batch]:
    """The batches that `lowbit calibrate` makes of them. `vary`: None for the command's default, 0 without variants."""
    text_model, lines = TextModel(Path(model_folder()), model, tokenizer, causal=False), calibration_sentences(genre)
    share = (0.0 if genre == BUILTIN else VARIED) if vary is None else vary
    return text_batches(text_model, "\n".join(lines), samples=len(lines), vary=share)


def calibration_batches(tokenizer, genre: str, size: int = 32) -> list[Batch]:
    """The calibration's sentences in batches [B, T] of one length each: for tools that would see padding."""
    by_length: dict[int, list[list[int]]] = {}
    for ids in tokenizer(calibration_sentences(genre), truncation=True)["input_ids"]:
        by_length.setdefault(len(ids), []).append(ids)
    batches = []
    for _, group in sorted(by_length.items()):
        for start in range(0, len(group), size):
            ids = torch.tensor(group[start : start + size])
            batches.append({"input_ids": ids, "attention_mask": torch.ones_like(ids)})
    return batches


def tokens_in(batches: Sequence[Batch]) -> int:
    """How many tokens the batches hold, padding not counted."""
    return sum(int(batch["attention_mask"].sum()) for batch in batches)


def unseen_batches(tokenizer, genre: str, size: int = 32, skip: int = 0) -> list[Batch]:
    """The sentences of a genre to test on, in padded batches, the shortest first (which saves most of the padding).

    `skip`: leave out so many at the beginning, those that a calibration on the same genre has seen.
    """
    ids = sorted(tokenizer(sentences(genre)[skip:], truncation=True)["input_ids"], key=len)
    parts = [{"input_ids": ids[start : start + size]} for start in range(0, len(ids), size)]
    return [dict(tokenizer.pad(part, return_tensors="pt")) for part in parts]


def embeddings(model: nn.Module, batches: Sequence[Batch]) -> Tensor:
    """Embeddings [sentences, 384], float32: the mean over the tokens, of length 1."""
    found = []
    with torch.inference_mode():
        for batch in batches:
            hidden = model(**batch).last_hidden_state.float()
            mask = batch["attention_mask"].unsqueeze(-1).to(hidden.dtype)
            found.append(F.normalize((hidden * mask).sum(1) / mask.sum(1), dim=1))
    return torch.cat(found)


def embedding_error(reference: Tensor, candidate: Tensor) -> float:
    """The mean over sentences of 1 - cosine, in float64: half the squared distance of two vectors of length 1."""
    one, other = F.normalize(reference.double(), dim=1), F.normalize(candidate.double(), dim=1)
    return float((one - other).square().sum(1).mean() / 2)


def linears(model: nn.Module) -> dict[str, nn.Linear]:
    """The 36 linears of the encoder by name; embeddings and the pooler are left alone."""
    found = {
        name: module
        for name, module in model.named_modules()
        if name.startswith("encoder.layer.") and isinstance(module, nn.Linear)
    }
    assert len(found) == 36, f"{len(found)} linears: another model"
    return found


def with_weights(model: nn.Module, weights: Mapping[str, Tensor]) -> nn.Module:
    """A copy of the model with other weights in the linears named; everything else stays float32."""
    changed = copy.deepcopy(model)
    modules = linears(changed)
    for name, weight in weights.items():
        modules[name].weight = nn.Parameter(weight, requires_grad=False)
    return changed


def machine(*packages: str) -> dict[str, object]:
    """What a result depends on: processor, threads, commit and versions."""
    cpu = next((line.split(":")[1].strip() for line in _cpu_lines() if line.startswith("model name")), "unknown")
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False)
    return {
        "cpu": cpu,
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "commit": commit.stdout.strip(),
        "versions": {name: metadata.version(name) for name in ("torch", "transformers", *packages)},
    }


def _cpu_lines() -> list[str]:
    path = Path("/proc/cpuinfo")
    return path.read_text(encoding="utf-8").splitlines() if path.exists() else []
