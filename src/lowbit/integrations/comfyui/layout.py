"""lowbit's formats as layouts of comfy_kitchen: one layout class for each format, made when it is first needed.

Inside ComfyUI a quantized weight is a `comfy_kitchen.QuantizedTensor`: offloading, pinning and LoRA look for that very
class. So the container stays theirs and the layout is ours: `Lowbit[<spec>]`, whose parameters are the format's parts.
Every product goes through `lowbit.ops`, so whatever kernel lowbit has on the device serves it.

A format that `folds_bias` (svdquant_w4a4 with act_unsigned) needs two vectors more. `own_share` is what its codes take
from the bias, `folded_share` what was taken from the bias that lies beside it. They are the same until a LoRA is baked
in; from then on a product adds their difference. ComfyUI puts weights back without telling the layer, so nothing that
belongs to a weight may be kept in the bias.
"""

# ruff: noqa: SLF001  (`_qdata` and `_params` are comfy_kitchen's protocol)

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from lowbit.checkpoint.dialects.comfy import stored_keys
from lowbit.checkpoint.dialects.comfy_formats import storage_of
from lowbit.errors import DependencyError, UnsupportedError
from lowbit.formats import Format, Parts
from lowbit.layouts.base import get_layout
from lowbit.ops import generic
from lowbit.solvers.added_delta import add_delta

aten = torch.ops.aten
_SHARES = ("own_share", "folded_share")


def kitchen() -> ModuleType:
    """comfy_kitchen's tensors. Raises `DependencyError` without it."""
    try:
        import comfy_kitchen.tensor
    except ImportError as error:
        raise DependencyError(
            "lowbit's weights inside ComfyUI need the package comfy-kitchen, which ComfyUI installs: update ComfyUI, "
            f"or pip install comfy-kitchen ({error})"
        ) from error
    return comfy_kitchen.tensor


class LowbitLayout:
    """The base of all layouts made here; never instantiated. `FORMAT`, `NAME` and `Params` are a layout's own.

    `KERNEL_LAYOUT`: the arrangement for lowbit's kernels that its parts are in, "" for the plain ones. `SPEC`: both.
    """

    FORMAT: Format
    KERNEL_LAYOUT: str
    SPEC: str
    NAME: str
    Params: Any
    MIN_SM_VERSION: tuple[int, int] | None = None
    QUANTIZES_INPUT = False  # a kernel that wants few-bit activations rounds them itself

    @classmethod
    def wrap(cls, parts: Mapping[str, Tensor], dtype: torch.dtype, shape: tuple[int, int], **more: Any) -> Any:
        """A comfy_kitchen QuantizedTensor of canonical parts, of logical `shape` and `dtype`.

        The bias beside it is the stored one, with the share of these parts taken from it.
        """
        qdata, params = cls._described(parts, dtype, shape, **more)
        return kitchen().QuantizedTensor(qdata, cls.NAME, params)

    @classmethod
    def _described(
        cls,
        parts: Mapping[str, Tensor],
        dtype: torch.dtype,
        shape: tuple[int, ...],
        folded: Tensor | None = None,
        *,
        baked: bool = False,
    ) -> tuple[Tensor, Any]:
        share = cls.FORMAT.bias_share(parts)
        parts = get_layout(cls.KERNEL_LAYOUT, cls.FORMAT).packed(cls.FORMAT, parts) if cls.KERNEL_LAYOUT else parts
        others = {"scale": None, **{name: part for name, part in parts.items() if name != "qdata"}}
        shares = {"own_share": share, "folded_share": share if folded is None else folded}
        params = cls.Params(orig_dtype=dtype, orig_shape=tuple(shape), baked=baked, **others, **shares)
        return parts["qdata"], params

    @classmethod
    def quantize(
        cls,
        tensor: Tensor,
        scale: Any = None,
        stochastic_rounding: int | None = 0,
        inplace_ops: bool = False,
        like: Any = None,
        **others: Any,
    ) -> tuple[Tensor, Any]:
        """The codes and parameters of a float weight [N, K].

        like: the quantized weight that `tensor` is a changed version of, which is how ComfyUI bakes a LoRA. Its scales
        stay where the change fits, and only the change is rounded: by chance with a seed (`stochastic_rounding` > 0),
        so that one smaller than half a level survives on average. Without `like`, the bias beside the new weight is
        taken for a true one. `scale` is not used: a format finds its own.

        Raises `FormatError` for a format that can only be read.
        """
        fmt, seed = cls.FORMAT, int(stochastic_rounding or 0)
        if like is not None:
            old = {name: part.to(tensor.device) for name, part in parts_of(like).items()}
            was = generic.dequantize(list(old.values()), fmt.spec, list(tensor.shape), tensor.dtype)
            change = tensor.float().sub_(was)  # in the dtype of `tensor` both are rounded alike
            rounding = "stochastic" if seed > 0 else "nearest"
            parts = add_delta(fmt, old, change, rounding=rounding, seed=seed, where=cls.NAME).parts
            folded = like._params.folded_share
            folded = None if folded is None else folded.to(tensor.device)
            return cls._described(parts, tensor.dtype, tuple(tensor.shape), folded, baked=True)
        if fmt.plain != fmt:
            raise UnsupportedError(f"{cls.NAME}: its input scales come from calibration; quantize with lowbit convert")
        made = fmt.quantize(tensor, seed=seed if seed > 0 and fmt.stochastic else None, where=cls.NAME)
        zeros = torch.zeros(tensor.shape[0], device=tensor.device) if fmt.folds_bias else None
        return cls._described(made, tensor.dtype, tuple(tensor.shape), zeros, baked=fmt.folds_bias)

    @classmethod
    def dequantize(cls, qdata: Tensor, params: Any) -> Tensor:
        """The weight [N, K] in its logical dtype; of a transposed one, what it is the transpose of."""
        shape = params.orig_shape[::-1] if params.transposed else params.orig_shape
        return generic.dequantize(cls._part_list(qdata, params), cls.SPEC, list(shape), params.orig_dtype)

    @classmethod
    def get_plain_tensors(cls, qtensor: Any) -> tuple[Tensor, ...]:
        """The parts as they are stored, in the format's order, the codes first."""
        return tuple(cls._part_list(qtensor._qdata, qtensor._params))

    @classmethod
    def state_dict_tensors(cls, qdata: Tensor, params: Any) -> dict[str, Tensor]:
        """What is saved, by what its key has behind `weight`: as ComfyUI files hold it."""
        fmt = cls.FORMAT
        stored = storage_of(fmt).write(fmt, cls._canonical(cls._part_list(qdata, params)), "")
        return {_suffix(key): stored[name] for name, key in stored_keys("", fmt).items()}

    @classmethod
    def requantize_kwargs(cls, qtensor: Any) -> dict[str, Any]:
        """The options of `quantize` that make a changed version of a weight."""
        return {"like": qtensor}

    @classmethod
    def supports_fast_matmul(cls) -> bool:
        """False: it is asked before activations are quantized outside of a product, which is not done here."""
        return False

    @classmethod
    def _canonical(cls, stored: Sequence[Tensor]) -> Parts:
        """The canonical parts, unpacked if they are packed."""
        parts = dict(zip(cls.FORMAT.part_names, stored, strict=True))
        return get_layout(cls.KERNEL_LAYOUT, cls.FORMAT).unpack(cls.FORMAT, parts) if cls.KERNEL_LAYOUT else parts

    @classmethod
    def _part_list(cls, qdata: Tensor, params: Any) -> list[Tensor]:
        return [qdata if name == "qdata" else getattr(params, name) for name in cls.FORMAT.part_names]


def layout_for(fmt: Format, kernel_layout: str = "") -> Any:
    """The layout class of a format in a kernel's layout, registered with comfy_kitchen under its `NAME`."""
    return _make_layout(fmt, kernel_layout, kitchen())


@functools.cache
def _make_layout(fmt: Format, kernel_layout: str, kit: ModuleType) -> Any:
    _register_handlers(kit)
    spec = generic.join_spec(fmt, kernel_layout)
    name = f"Lowbit[{spec}]"
    members = {"FORMAT": fmt, "KERNEL_LAYOUT": kernel_layout, "SPEC": spec, "NAME": name, "__module__": __name__}
    members["Params"] = _make_params(fmt, kit)
    made = type(f"Lowbit_{fmt.name}", (LowbitLayout, kit.QuantizedLayout), members)
    kit.register_layout_class(name, made)
    return made


def _make_params(fmt: Format, kit: ModuleType) -> Any:
    """A frozen dataclass of the parts of a format; comfy_kitchen's own three fields come first."""
    names = [name for name in fmt.part_names if name not in ("qdata", "scale")]
    fields: list[Any] = [(name, Any, None) for name in (*names, *_SHARES)]
    fields += [("transposed", bool, False), ("baked", bool, False)]
    return dataclasses.make_dataclass(
        f"Lowbit_{fmt.name}_Params",
        fields,
        bases=(kit.BaseLayoutParams,),
        frozen=True,
        namespace={"_tensor_fields": _tensor_fields},
    )


def _tensor_fields(params: Any) -> list[str]:
    """The names of the fields that hold tensors."""
    return [field.name for field in dataclasses.fields(params) if isinstance(getattr(params, field.name), Tensor)]


def _suffix(key: str) -> str:
    """What comes behind "weight" in the key of a part. Another layer's tensor is spelled as comfy_kitchen does."""
    return key.removeprefix("weight") if key.startswith("weight") else f"_{key}"


def is_lowbit(tensor: object) -> bool:
    """Whether this is a quantized tensor of one of these layouts."""
    return isinstance(tensor, Tensor) and issubclass(getattr(tensor, "layout_cls", object), LowbitLayout)


def parts_of(tensor: Any) -> Parts:
    """The canonical parts of a quantized tensor of one of these layouts."""
    parts: Parts = tensor.layout_cls._canonical(tensor.layout_cls.get_plain_tensors(tensor))
    return parts


def bias_gain(tensor: Any) -> Tensor | None:
    """What the bias beside a weight must gain for a product with its codes ([N] float32), or None."""
    params = tensor._params
    return params.folded_share - params.own_share if params.baked and params.own_share is not None else None


# ---- products -------------------------------------------------------------------------------------------------------


def _linear(x: Tensor, w: Any, bias: Tensor | None) -> Tensor:
    """Multiply x [..., K] with the weight [N, K] transposed, by whatever kernel `lowbit.dispatch` chooses."""
    layout = w.layout_cls
    gain = bias_gain(w)
    if gain is not None:
        bias = gain if bias is None else bias.float() + gain
    if bias is not None and bias.dtype != x.dtype:
        bias = bias.to(x.dtype)
    watched = torch._C._len_torch_dispatch_stack()  # FakeTensorMode and its like must see the op
    run = generic.linear if type(x) is not Tensor or watched else generic.run_linear
    return run(x, layout._part_list(w._qdata, w._params), bias, layout.SPEC)


def _plain(kit: ModuleType, func: Any, args: Any, kwargs: Any) -> Any:
    return func(*kit.dequantize_args(args), **kit.dequantize_args(kwargs))


def _transposed(tensor: Any, args: Any, kwargs: Any) -> Any:
    params = tensor._params
    turned = dataclasses.replace(params, orig_shape=params.orig_shape[::-1], transposed=not params.transposed)
    return type(tensor)(tensor._qdata, tensor._layout_cls, turned)


def _product(a: Tensor, b: Any, bias: Tensor | None = None) -> Tensor:
    """a @ b + bias, where b is a weight as it is or transposed."""
    if b._params.transposed:
        return _linear(a, b, bias)
    layout = b.layout_cls
    parts = layout._part_list(b._qdata, b._params)
    made = generic.linear_input_gradient(a, parts, b._params.orig_shape[1], layout.SPEC)
    return made if bias is None else made + bias


@functools.cache
def _register_handlers(kit: ModuleType) -> None:
    """Handlers for all layouts at once: comfy_kitchen looks them up along a layout's bases.

    `F.linear` arrives as `aten.linear` only in inference mode; elsewhere it is `t` and then `mm` or `addmm`.
    """

    def linear(_: Any, args: Any, kwargs: Any) -> Any:
        x, w, bias = (*args, kwargs.get("bias"))[:3]
        if is_lowbit(x) or not is_lowbit(w) or w._params.transposed:
            return _plain(kit, aten.linear.default, args, kwargs)
        return _linear(x, w, bias)

    def mm(_: Any, args: Any, kwargs: Any) -> Any:
        if is_lowbit(args[0]) or not is_lowbit(args[1]):
            return _plain(kit, aten.mm.default, args, kwargs)
        return _product(args[0], args[1])

    def addmm(_: Any, args: Any, kwargs: Any) -> Any:
        bias, a, b = args
        if is_lowbit(bias) or is_lowbit(a) or not is_lowbit(b):
            return _plain(kit, aten.addmm.default, args, kwargs)
        beta, alpha = kwargs.get("beta", 1), kwargs.get("alpha", 1)
        if beta == alpha == 1 and bias.dim() == 1:
            return _product(a, b, bias)
        return _product(a, b).mul(alpha).add(bias, alpha=beta)

    kit.register_layout_op(aten.linear.default, LowbitLayout)(linear)
    kit.register_layout_op(aten.mm.default, LowbitLayout)(mm)
    kit.register_layout_op(aten.addmm.default, LowbitLayout)(addmm)
    kit.register_layout_op(aten.t.default, LowbitLayout)(_transposed)
