"""Text as batches of tokens for a text model: files, the built-in text, and samples varied at random."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping, Sequence
from importlib import resources
from pathlib import Path

import torch
from torch import Tensor

from lowbit.errors import StatisticsError

from .text_models import TextModel
from .varied_tokens import varied, word_tokens

_log = logging.getLogger("lowbit")

SAMPLES = 256
MAX_TOKENS = 512
BATCH_SIZE = 16
VARIED = 0.4  # of the tokens, in the copy of each sample that is run beside it
_FIRST = 1 << 20  # bytes of a text that are looked at before the rest is read
_BUILTIN = "calibration_text.txt"
_HUGE = 10**6  # tokenizers without a limit say 10^30


def builtin_text() -> str:
    """The text that comes with lowbit: passages of 32 kinds, from chat to law and from code to poetry, one a line."""
    return resources.files(__package__).joinpath(_BUILTIN).read_text(encoding="utf-8")


def read_text(path: str | Path) -> str:
    """The text of a UTF-8 file. Raises `StatisticsError` for a file that is missing, empty, or not text."""
    path = Path(path)
    try:
        with path.open("rb") as file:
            raw = file.read(_FIRST)
            if b"\0" not in raw:  # of a binary file, or a device without an end, this is enough
                raw += file.read()
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
    text: str | Sequence[str],
    *,
    samples: int = SAMPLES,
    max_tokens: int = MAX_TOKENS,
    batch_size: int = BATCH_SIZE,
    vary: float = 0.0,
) -> list[dict[str, Tensor]]:
    """Batches of token ids and their attention masks, each int64 [samples, tokens], on the model's device.

    text: one text, or several that count the same. A sample is a line of it, cut at `max_tokens`; for a causal model a
    window of `max_tokens` of all the text. Of more than `samples`, that many are taken at even distances. Samples of
    like length share a batch. With `vary`, each sample comes a second time with that share of its tokens replaced
    (`varied_tokens`), in the same half of the statistics: samples go to the halves in turn. A sample of which nothing
    was replaced comes once. Of more texts than `samples`, that many give one each, with a warning.

    Raises `StatisticsError` when no token comes of it.
    """
    limit = _limit(text_model, max_tokens)
    texts = [text] if isinstance(text, str) else list(text)
    make = _windows if text_model.causal else _lines
    cut = [[row for row in make(text_model, one, limit) if row] for one in texts]
    rows = [row for part, share in zip(cut, _shares(cut, samples), strict=True) for row in _spread(part, share)]
    rows.sort(key=len)
    if not rows:
        raise StatisticsError(f"{text_model.folder}: its tokenizer makes no tokens of the text; give other text")
    if vary:
        variants = varied(rows, word_tokens(text_model.tokenizer), vary)
        if variants == rows:
            _log.warning("%s: no token of the text can be replaced by a word: nothing is varied", text_model.folder)
        rows = _with_variants(rows, variants)
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


def _shares(parts: Sequence[Sequence[object]], count: int) -> list[int]:
    """How many of `count` samples each part gives: the same of all, and more of the others where one has too few.

    Of more parts than samples, those at even distances give one each.
    """
    filled = [index for index, part in enumerate(parts) if part]
    shares = [0] * len(parts)
    if len(filled) > count:
        _log.warning(
            "%d of %d texts give no sample, for only %d are taken; --samples %d takes one of each",
            len(filled) - count, len(filled), count, len(filled),
        )  # fmt: skip
        filled = [filled[index * len(filled) // count] for index in range(count)]
    for place, index in enumerate(sorted(filled, key=lambda index: len(parts[index]))):
        shares[index] = min(len(parts[index]), (count - sum(shares)) // (len(filled) - place))
    return shares


def _spread(rows: list[list[int]], count: int) -> list[list[int]]:
    """`count` of the rows at even distances."""
    if len(rows) <= count:
        return rows
    return [rows[index * len(rows) // count] for index in range(count)]


def _with_variants(rows: Sequence[list[int]], variants: Sequence[list[int]]) -> list[list[int]]:
    """Two rows, their variants, the next two, ...: in places of the same parity. One left over stays alone.

    Rows that are their own variants come first, once: a second time they would only count double.
    """
    found = [row for row, variant in zip(rows, variants, strict=True) if row == variant]
    pairs = [(row, variant) for row, variant in zip(rows, variants, strict=True) if row != variant]
    for start in range(0, len(pairs) - 1, 2):
        found += [row for kind in zip(*pairs[start : start + 2], strict=True) for row in kind]
    return found + [row for row, _ in pairs[len(pairs) // 2 * 2 :]]


def _padded(rows: Iterable[list[int]], pad: int) -> Mapping[str, Tensor]:
    rows = list(rows)
    width = max(map(len, rows))
    ids = torch.tensor([row + [pad] * (width - len(row)) for row in rows])
    mask = torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in rows])
    return {"input_ids": ids, "attention_mask": mask}
