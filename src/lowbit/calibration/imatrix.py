"""Importance matrices of llama.cpp as statistics: the mean of x² of each channel, which is the diagonal of H.

Two containers (https://github.com/ggml-org/llama.cpp, tools/imatrix): GGUF with `general.type` "imatrix", in which
`<weight>.in_sum2` [experts, K] holds sums of x² and `<weight>.counts` [experts, 1] how many rows they are of; and the
older binary one: int32 entries, then for each int32 length, the name, int32 calls, int32 values, and as many float32,
which are the means times the calls; all little-endian. What follows the last entry (chunks, dataset) is not needed.
"""

from __future__ import annotations

import re
import struct
from collections.abc import Mapping
from importlib import util
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lowbit.errors import PlanError, StatisticsError
from lowbit.solvers.base import Statistics

from .collected import Collected
from .collection import Contents, InputFacts, LayerInput, some

_MAX_NAME = 4096
_MAX_ENTRIES = 1_000_000
# llama.cpp's names of the weights of a block, by their names in the models of transformers.
_NAMES = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.qkv_proj": "attn_qkv",
    "self_attn.o_proj": "attn_output",
    "self_attn.dense": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "mlp.gate_up_proj": "ffn_up",
    "mlp.fc1": "ffn_up",
    "mlp.fc2": "ffn_down",
    "mlp.gate": "ffn_gate_inp",
    "block_sparse_moe.gate": "ffn_gate_inp",
    "mlp.shared_expert.gate_proj": "ffn_gate_shexp",
    "mlp.shared_expert.up_proj": "ffn_up_shexp",
    "mlp.shared_expert.down_proj": "ffn_down_shexp",
    "mlp.shared_experts.gate_proj": "ffn_gate_shexp",
    "mlp.shared_experts.up_proj": "ffn_up_shexp",
    "mlp.shared_experts.down_proj": "ffn_down_shexp",
}
_EXPERTS = {"gate_proj": "gate", "up_proj": "up", "down_proj": "down", "w1": "gate", "w3": "up", "w2": "down"}
_BLOCK = re.compile(r"(?:^|.*\.)(?:layers|h|blocks)\.(\d+)\.(.+)$")
_EXPERT = re.compile(r"(?:mlp|block_sparse_moe)\.experts\.(\d+)\.(\w+)$")


def import_imatrix(path: str | Path, shapes: Mapping[str, tuple[int, int]], model: str) -> Collected:
    """The statistics of the layers of a checkpoint from an importance matrix.

    `shapes`: (N, K) of the checkpoint's layers by name, as transformers names them; `model`: what to call it. In the
    older container, `tokens` counts calls of the model (chunks of text), since that does not say how long they were.

    Raises `StatisticsError` for a file that is no importance matrix, one of another model (no layer matches, or K
    differs), `PlanError` where the package gguf is needed and missing.
    """
    matrix = read_imatrix(path)
    layers: dict[str, LayerInput] = {}
    inputs: dict[str, InputFacts] = {}
    found: dict[str, Statistics] = {}
    for name, (n, k) in shapes.items():
        weight, expert = gguf_name(name)
        if weight not in matrix:
            continue
        means, counts = matrix[weight]
        if _EXPERT.search(name):
            means, counts = _by_expert(means, counts, k)
        if means.shape[-1] != k or expert >= len(means):
            raise StatisticsError(
                f"{path}: {weight} has the shape {list(means.shape)}, the model's {name} has K = {k}; "
                "it is of another model"
            )
        tokens = int(counts[expert])
        if not tokens:
            continue  # an expert that no token reached
        key = f"{weight}.{expert}" if len(means) > 1 else weight
        layers[name] = LayerInput(key, (n, k))
        inputs[key] = InputFacts(k, tokens, 0, "diagonal")
        found[key] = Statistics(hessian=means[expert].clone(), tokens=tokens)
    if not layers:
        raise StatisticsError(
            f"{path}: none of its {len(matrix)} weights ({some(matrix)}) is one of the model's; it is of another "
            "model, or of one whose names lowbit cannot translate"
        )
    never = tuple(name for name in shapes if name not in layers)
    return Collected(Contents(model, layers, inputs, never, {"imatrix": Path(path).name}), found)


def _by_expert(means: Tensor, counts: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The rows of the experts apart: the older container has them one after the other, with one count for all."""
    if len(means) == 1 and means.shape[1] > k and means.shape[1] % k == 0:
        rows = means.reshape(-1, k)
        return rows, counts.expand(len(rows))
    return means, counts


def gguf_name(layer: str) -> tuple[str, int]:
    """llama.cpp's name of the weight of a layer, and the expert in it (0 for a plain layer)."""
    if layer.endswith("lm_head"):
        return "output.weight", 0
    block = _BLOCK.match(layer)
    if block is None:
        return f"{layer}.weight", 0
    expert = _EXPERT.match(block[2])
    if expert is not None and expert[2] in _EXPERTS:
        return f"blk.{block[1]}.ffn_{_EXPERTS[expert[2]]}_exps.weight", int(expert[1])
    return f"blk.{block[1]}.{_NAMES.get(block[2], block[2])}.weight", 0


def read_imatrix(path: str | Path) -> dict[str, tuple[Tensor, Tensor]]:
    """The means of x² as float32 [experts, K] and the counts as float32 [experts], by llama.cpp's name of the weight.

    Raises as `import_imatrix`.
    """
    path = Path(path)
    try:
        with path.open("rb") as file:
            start = file.read(4)
            rest = b"" if start == b"GGUF" else file.read()
    except OSError as error:
        raise StatisticsError(f"{path}: cannot be read: {error.strerror}; name an importance matrix") from error
    found = _read_gguf(path) if start == b"GGUF" else _read_binary(path, start + rest)
    for name, (means, _) in found.items():
        if not bool(means.isfinite().all() & (means >= 0).all()):
            raise StatisticsError(f"{path}: {name} has values that are negative or not finite; make the file again")
    return found


def _read_binary(path: Path, raw: bytes) -> dict[str, tuple[Tensor, Tensor]]:
    problem = StatisticsError(
        f"{path}: is no importance matrix of llama.cpp (GGUF or the older binary form), or it is cut off"
    )
    position = 0

    def take(size: int) -> bytes:
        nonlocal position
        if size < 0 or position + size > len(raw):
            raise problem
        position += size
        return raw[position - size : position]

    def number() -> int:
        return int(struct.unpack("<i", take(4))[0])

    found = {}
    count = number()
    if not 0 < count <= _MAX_ENTRIES:
        raise problem
    for _ in range(count):
        length = number()
        if not 0 < length <= _MAX_NAME:
            raise problem
        try:
            name = take(length).decode("utf-8")
        except UnicodeDecodeError:
            raise problem from None
        calls, values = number(), number()
        if values < 1 or calls < 0:
            raise problem
        sums = torch.frombuffer(bytearray(take(4 * values)), dtype=torch.float32)
        found[name] = (sums / max(calls, 1))[None], torch.tensor([float(calls)])
    return found


def _read_gguf(path: Path) -> dict[str, tuple[Tensor, Tensor]]:
    if util.find_spec("gguf") is None:
        raise PlanError(f"{path}: reading a GGUF file needs the package gguf: pip install gguf")
    import gguf

    try:
        tensors: dict[str, Any] = {tensor.name: tensor for tensor in gguf.GGUFReader(path).tensors}
    except (ValueError, IndexError, KeyError, OSError) as error:
        raise StatisticsError(f"{path}: is no sound GGUF file: {error}; download it again") from error
    found = {}
    for name, tensor in tensors.items():
        weight = name.removesuffix(".in_sum2")
        if weight == name or f"{weight}.counts" not in tensors:
            continue
        sums = torch.from_numpy(tensor.data.copy()).float().reshape(-1, int(tensor.shape[0]))
        counts = torch.from_numpy(tensors[f"{weight}.counts"].data.copy()).float().flatten()
        if len(counts) != len(sums):
            raise StatisticsError(f"{path}: {weight} has {len(sums)} rows of sums and {len(counts)} counts")
        found[weight] = sums / counts.clamp(min=1)[:, None], counts
    if not found:
        raise StatisticsError(f"{path}: is a GGUF file without importance matrices (tensors named *.in_sum2)")
    return found
