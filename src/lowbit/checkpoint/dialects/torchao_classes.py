"""What torchao's tensor classes have in common: reading their parts, writing them, and what is kept of an entry.

A class turns an entry of the header into a format (`find`), stored tensors into canonical parts and back (`read`,
`write`), and a layer into the attributes of its entry (`attributes`). Attributes that mean nothing to a format (kernel
preferences, how activations are quantized) stay in the layer's options and are written again.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from lowbit.checkpoint.dialects.base import Read, Shape, StoredLayer, TensorSpec
from lowbit.checkpoint.dialects.torchao_description import Described
from lowbit.errors import CheckpointError, PartsError
from lowbit.formats import Format, Parts
from lowbit.formats.granular import Granular

OPTION = "torchao"  # the entry that a layer came with, and the specs of its data
_NO_TILE = (128, 128)  # the block_size of a format that has no blocks
_ROLES = {"per_tensor_scale": "global_scale", "act_pre_scale": "pre_quant_scale"}


class TensorClass:
    """One class of torchao; see the module's docstring."""

    kind: str
    """The name of the class."""
    formats: Sequence[str] = ()
    """The formats that are written as this class; the first class that names one takes it."""
    required: Sequence[str] = ("qdata", "scale")
    config: tuple[str, int] = ("", 0)
    """The name and version of the settings with which torchao makes such tensors."""
    input_scale: str = ""
    """The data that is a static scale for activations, if the class has one."""

    def find(self, found: Described, read: Read) -> StoredLayer:
        """The layer of an entry. Raises `CheckpointError`."""
        raise NotImplementedError

    def why_not(self, stored: StoredLayer) -> str | None:
        """Why a layer of one of `formats` cannot be written, in words that follow its name, or None."""
        raise NotImplementedError

    def read(self, stored: StoredLayer, data: Mapping[str, Tensor]) -> Parts:
        """Canonical parts of the data, by role."""
        raise NotImplementedError

    def write(self, stored: StoredLayer, parts: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The data, by its name in torchao, of parts; on the meta device for specs."""
        raise NotImplementedError

    def attributes(self, stored: StoredLayer) -> dict[str, Any]:
        """The fields of `_data`, in torchao's order; those that a layer came with win over `None` and defaults."""
        raise NotImplementedError

    def config_of(self, stored: StoredLayer) -> tuple[str, int]:
        """`config`, where it depends on the layer."""
        return self.config

    # ---- what follows from that -------------------------------------------------------------------------------------

    def role(self, name: str) -> str:
        """The role of a piece of data in `StoredLayer.keys`."""
        return "input_scale" if name == self.input_scale else _ROLES.get(name, name)

    def layer(
        self,
        found: Described,
        fmt: Format,
        shape: Shape,
        dtype: torch.dtype,
        dtypes: Mapping[str, torch.dtype] | None = None,
        notes: Sequence[str] = (),
    ) -> StoredLayer:
        """A layer as found, checked against the header. Raises `PartsError` for data that is not what it should be."""
        specs = found.tensors.specs
        kept = {
            "_type": found.kind,
            "_data": dict(found.data),
            "_tensor_data_names": list(found.names),
            "tensors": {name: [str(s.dtype).removeprefix("torch."), list(s.shape)] for name, s in specs.items()},
        }
        stored = StoredLayer(
            layer=found.tensors.layer,
            format=fmt,
            shape=shape,
            dtype=dtype,
            keys={self.role(name): key for name, key in found.tensors.keys.items()},
            options={OPTION: kept},
            notes=list(notes),
            where=found.tensors.where,
            dtypes=dict(dtypes or {}),
        )
        if why := fmt.check_shape(*shape) or self.why_not(stored):
            raise CheckpointError(f"{stored.place}: {found.kind} of {list(shape)}: {why}; download the file again")
        wanted = self.specs(stored)
        for name in dict.fromkeys((*wanted, *specs)):
            if name not in wanted or name not in specs or wanted[name] != specs[name]:
                said = str(wanted[name]) if name in wanted else "nothing"
                raise PartsError(
                    f"{stored.place}: {name} is {specs.get(name, 'missing')}, expected {said} for {fmt} of a weight "
                    f"{list(shape)} as {found.kind}; the header and the data contradict each other, download it again"
                )
        return stored

    def specs(self, stored: StoredLayer) -> dict[str, TensorSpec]:
        """Name of data -> what `write` will give."""
        blank = stored.format.empty_parts(stored.shape, torch.device("meta"), stored.dtype)
        typed = {name: part.to(stored.dtypes.get(name, part.dtype)) for name, part in blank.items()}
        return {name: TensorSpec.of(tensor) for name, tensor in self.write(stored, typed).items()}

    def kept(self, stored: StoredLayer) -> Mapping[str, Any]:
        """The entry that a layer came with in this class, or an empty one."""
        entry = stored.options.get(OPTION)
        return entry if isinstance(entry, Mapping) and entry.get("_type") == self.kind else {}

    def attribute(self, stored: StoredLayer, name: str, default: Any) -> Any:
        """An attribute that the layer came with, else the default."""
        return self.kept(stored).get("_data", {}).get(name, default)

    def names(self, stored: StoredLayer) -> list[str]:
        """`_tensor_data_names`, in the order that the layer came with, else optional ones first as torchao has it."""
        written = list(self.specs(stored))
        came = [name for name in self.kept(stored).get("_tensor_data_names", ()) if name in written]
        return came if len(came) == len(written) else sorted(written, key=lambda name: name in self.required)

    def had(self, stored: StoredLayer, name: str) -> bool:
        """Whether a layer came with a piece of data."""
        return name in self.kept(stored).get("tensors", {})

    def as_found(self, stored: StoredLayer, name: str, tensor: Tensor, default: Sequence[int] | None = None) -> Tensor:
        """A tensor in the dtype and shape in which it was found, if it was: each has several spellings.

        Raises `PartsError` where that dtype cannot hold its values.
        """
        dtype, shape = self.kept(stored).get("tensors", {}).get(name, (None, default))
        shape = shape if shape is not None and torch.Size(shape).numel() == tensor.numel() else default
        tensor = tensor if shape is None else tensor.reshape(list(shape))
        if dtype is None or tensor.dtype == getattr(torch, dtype):
            return tensor
        narrow = tensor.to(getattr(torch, dtype))
        if not tensor.is_meta and not torch.equal(narrow.to(tensor.dtype), tensor):
            raise PartsError(f"{stored.place}: its {name} does not fit into {dtype}, in which its source has it")
        return narrow


def matrix(found: Described) -> Shape:
    """The shape of `qdata`. Raises `CheckpointError` for anything but a matrix."""
    spec = found.tensors.specs["qdata"]
    if len(spec.shape) != 2:
        raise found.tensors.error(f"its qdata is {spec}; only matrices are read, take the 16-bit model")
    return spec.shape[0], spec.shape[1]


def vector(found: Described, name: str, k: int) -> bool:
    """Whether there is a vector [K] of that name. Raises `CheckpointError` for one of another length."""
    if name not in found.tensors.specs:
        return False
    if torch.Size(found.tensors.specs[name].shape).numel() != k:
        raise found.tensors.error(f"its {name} is {found.tensors.specs[name]}, expected {k} values; take the original")
    return True


def widened(tensor: Tensor) -> Tensor:
    """A 16-bit scale as float32, exactly."""
    return tensor if tensor.dtype == torch.float32 else tensor.float()


def integers(stored: StoredLayer, values: Tensor, low: int, high: int) -> Tensor:
    """Values that must be integers from `low` to `high`, of any dtype. Raises `PartsError`."""
    if not values.numel():
        return values
    least, most = values.aminmax()
    whole = not values.is_floating_point() or torch.equal(values, values.round())
    if not whole or float(least) < low or float(most) > high:
        raise PartsError(
            f"{stored.place}: has values from {float(least):g} to {float(most):g}, expected integers from {low} to "
            f"{high}; fractional zero points have no format here. Take the 16-bit model"
        )
    return values


def granularity_of(block: tuple[int, int], shape: tuple[int, int]) -> tuple[str, tuple[int, int]]:
    """The granularity that a `block_size` means, and the tile where that counts."""
    if block == (1, shape[1]):
        return "row", _NO_TILE
    return ("tensor", _NO_TILE) if block == shape else ("block", block)


def block_of(granularity: str, tile: tuple[int, int], shape: tuple[int, int]) -> list[int]:
    """The inverse of `granularity_of`."""
    return {"row": [1, shape[1]], "tensor": list(shape)}.get(granularity, list(tile))


def blocks_refused(fmt: Granular, shape: tuple[int, int]) -> str | None:
    """Why a file cannot say in which blocks a weight is, or None."""
    (rows, columns), (n, k) = fmt.block_size, shape
    if fmt.granularity != "block":
        lost = fmt.block_size != _NO_TILE
        return f"torchao has no place for a block_size that granularity={fmt.granularity} ignores" if lost else None
    if granularity_of(fmt.block_size, shape)[0] != "block":
        return f"its one block a row, or in all, is granularity=row or tensor to torchao, for a weight {n} x {k}"
    return f"torchao wants whole blocks of {rows} x {columns}, and it is {n} x {k}" if n % rows or k % columns else None
