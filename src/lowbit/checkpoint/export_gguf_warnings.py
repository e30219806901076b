"""What a GGUF file lacks that a program needs to load it: said, because the file looks complete."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from .gguf_file import GgufFile
from .gguf_names import ARCHITECTURES
from .weight_file import WeightFile

_ARCHITECTURE = "general.architecture"
_TOKENIZER = ("tokenizer.ggml.model", "tokenizer.ggml.tokens")
_HYPERPARAMETERS = (
    "context_length",
    "embedding_length",
    "block_count",
    "feed_forward_length",
    "attention.head_count",
    "attention.layer_norm_rms_epsilon",
)
_REMEDY = (
    "lowbit writes weights. Let llama.cpp's convert_hf_to_gguf.py make an F16 file with them, and export that: "
    "lowbit export model-f16.gguf -o OUT.gguf"
)


def lacking(file: WeightFile, architecture: str, fields: Mapping[str, Any], place: str) -> Iterator[str]:
    """Why programs may not load the file at `place`, one warning each.

    `file`: one of the source's; a GGUF file's fields go along. `fields`: those that are written besides.
    """
    there = {*fields}
    known = str(fields.get(_ARCHITECTURE, ""))
    if isinstance(file, GgufFile):
        there |= {*file.metadata, *file.arrays}
        known = known or file.metadata.get(_ARCHITECTURE, "")
    architecture = architecture or known
    if not architecture:
        yield (
            f"{place}: no general.architecture is written and names stay those of the source (Hugging Face's, of a "
            "transformers model): llama.cpp loads no such file. Give the architecture (--architecture NAME)"
        )
        return
    hyperparameters = [f"{architecture}.{name}" for name in _HYPERPARAMETERS]
    if architecture in ARCHITECTURES:
        missing = [name for name in (*hyperparameters, *_TOKENIZER) if name not in there]
        if missing:
            kinds = [
                kind
                for kind, names in (("hyperparameters", hyperparameters), ("tokenizer", _TOKENIZER))
                if set(names) & set(missing)
            ]
            yield (
                f"{place}: llama.cpp cannot load it: the {' and the '.join(kinds)} are missing ({', '.join(missing)}). "
                f"{_REMEDY}"
            )
    elif _is_of_llama_cpp(architecture) and not isinstance(file, GgufFile):
        yield (
            f"{place}: llama.cpp cannot load it: names stay those of the source, because lowbit knows llama.cpp's for "
            f"{', '.join(ARCHITECTURES)} alone, and hyperparameters and the tokenizer are missing; {_REMEDY}"
        )


def _is_of_llama_cpp(architecture: str) -> bool:
    import gguf

    return architecture in gguf.MODEL_ARCH_NAMES.values()
