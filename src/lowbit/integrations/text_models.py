"""Text models of Hugging Face folders, and text files as batches for them; needs the extra `calibrate`."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from importlib import util
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lowbit.calibration.names import checkpoint_names, layer_shapes
from lowbit.checkpoint.source import open_source
from lowbit.errors import CheckpointError, PlanError, StatisticsError

_log = logging.getLogger("lowbit")

NEEDED = ("transformers", "tokenizers")
SAMPLES = 256
MAX_TOKENS = 512
BATCH_SIZE = 16
_HUGE = 10**6  # tokenizers without a limit say 10^30


@dataclass
class TextModel:
    """A model in memory with its tokenizer. `causal`: it predicts the next token, so long text is cut into windows."""

    folder: Path
    model: nn.Module
    tokenizer: Any
    causal: bool

    def names(self) -> dict[str, str | None]:
        """The name of each linear in the folder's safetensors files, where it is another; None where it has none."""
        with open_source(self.folder) as source:
            return checkpoint_names(self.model, layer_shapes(source))


def load_text_model(folder: str | Path, *, device: str = "cpu", dtype: torch.dtype | None = None) -> TextModel:
    """Load the model of a folder as the class that its config.json names, in `dtype` (by default float32 on a CPU).

    Raises:
        PlanError: transformers is not installed, or the device is wrong.
        CheckpointError: no model folder, or one that transformers cannot load.
    """
    folder = Path(folder)
    if missing := [name for name in NEEDED if util.find_spec(name) is None]:
        raise PlanError(f"calibrating on text needs {' and '.join(missing)}: pip install 'lowbit[calibrate]'")
    _check_device(device)
    architecture = _architecture(folder)
    import transformers

    transformers.utils.logging.disable_progress_bar()
    transformers.utils.logging.set_verbosity_error()  # a report of unused weights, table and all
    wanted: torch.dtype | str = dtype or (torch.float32 if device == "cpu" else "auto")
    maker = getattr(transformers, architecture, None) or transformers.AutoModel
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(folder, local_files_only=True)
        model = maker.from_pretrained(folder, local_files_only=True, dtype=wanted).eval()
        model = model.to(device)
    except (OSError, ValueError, KeyError, ImportError, RuntimeError) as error:
        said = str(error).strip().splitlines() or [type(error).__name__]
        raise CheckpointError(
            f"{folder}: transformers cannot load it as {architecture}: {said[0]}; see that the folder has config.json, "
            "the tokenizer's files and the weights"
        ) from error
    if getattr(model.config, "use_cache", False):
        model.config.use_cache = False
    return TextModel(folder, model, tokenizer, architecture.endswith(("ForCausalLM", "LMHeadModel")))


def _check_device(device: str) -> None:
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        said = str(error).strip().splitlines()[0]
        raise PlanError(f"device {device!r}: cannot be used: {said}; name another, such as cpu or cuda") from error


def _architecture(folder: Path) -> str:
    path = folder / "config.json"
    if not path.is_file():
        raise CheckpointError(
            f"{folder}: has no config.json, so it is no model folder of transformers; name such a folder, or use "
            "--module for other models"
        )
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
        return str(config["architectures"][0])
    except (OSError, ValueError, KeyError, TypeError, IndexError) as error:
        raise CheckpointError(f"{path}: does not name the model's class (architectures): {error!r}") from error


def read_text(path: str | Path) -> str:
    """The text of a UTF-8 file. Raises `StatisticsError` for a file that is missing, empty, or not text."""
    path = Path(path)
    try:
        raw = path.read_bytes()
    except OSError as error:
        raise StatisticsError(f"{path}: cannot be read: {error.strerror}; name a text file") from error
    try:
        text = raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise StatisticsError(f"{path}: is no UTF-8 text (byte {error.start}); save it as UTF-8") from error
    if "\0" in text:
        raise StatisticsError(f"{path}: is a binary file, it has NUL bytes; name a text file")
    if not text.strip():
        raise StatisticsError(f"{path}: has no text; give some hundred lines like those that the model will see")
    return text


def text_batches(
    text_model: TextModel,
    text: str,
    *,
    samples: int = SAMPLES,
    max_tokens: int = MAX_TOKENS,
    batch_size: int = BATCH_SIZE,
) -> list[dict[str, Tensor]]:
    """Batches of token ids and their attention masks, each int64 [samples, tokens], on the model's device.

    A sample is a line of the text, cut at `max_tokens`; for a causal model a window of `max_tokens` of all the text.
    Of more than `samples`, that many are taken at even distances. Samples of like length share a batch.

    Raises `StatisticsError` when no token comes of it.
    """
    limit = _limit(text_model, max_tokens)
    rows = _windows(text_model, text, limit) if text_model.causal else _lines(text_model, text, limit)
    rows = sorted(_spread([row for row in rows if row], samples), key=len)
    if not rows:
        raise StatisticsError(f"{text_model.folder}: its tokenizer makes no tokens of the text; give other text")
    device = next(text_model.model.parameters()).device
    pad = text_model.tokenizer.pad_token_id or 0
    return [
        {name: tensor.to(device) for name, tensor in _padded(rows[start : start + batch_size], pad).items()}
        for start in range(0, len(rows), batch_size)
    ]


def _limit(text_model: TextModel, max_tokens: int) -> int:
    known = [
        getattr(text_model.tokenizer, "model_max_length", None),
        getattr(text_model.model.config, "max_position_embeddings", None),
    ]
    limits = [value for value in known if isinstance(value, int) and 0 < value < _HUGE]
    limit = min([max_tokens, *limits])
    if limit < max_tokens:
        _log.warning("%s: takes no more than %d tokens at once", text_model.folder, limit)
    return limit


def _lines(text_model: TextModel, text: str, limit: int) -> list[list[int]]:
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return list(text_model.tokenizer(lines, truncation=True, max_length=limit)["input_ids"])


def _windows(text_model: TextModel, text: str, limit: int) -> list[list[int]]:
    lines = text_model.tokenizer(text.splitlines(keepends=True), add_special_tokens=False)["input_ids"]
    start = text_model.tokenizer.bos_token_id
    ids = [token for line in lines for token in line]
    size = limit if start is None else limit - 1
    windows = [ids[begin : begin + size] for begin in range(0, len(ids), size)]
    return windows if start is None else [[start, *window] for window in windows]


def _spread(rows: list[list[int]], count: int) -> list[list[int]]:
    """`count` of the rows at even distances."""
    if len(rows) <= count:
        return rows
    return [rows[index * len(rows) // count] for index in range(count)]


def _padded(rows: Iterable[list[int]], pad: int) -> Mapping[str, Tensor]:
    rows = list(rows)
    width = max(map(len, rows))
    ids = torch.tensor([row + [pad] * (width - len(row)) for row in rows])
    mask = torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in rows])
    return {"input_ids": ids, "attention_mask": mask}
