"""`LowbitConfig`: what becomes of a model's layers, as Python arguments and as `quantization_config` in config.json."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from transformers.utils.quantization_config import QuantizationConfigMixin

from lowbit.checkpoint.stored_format import StoredFormat
from lowbit.errors import PlanError
from lowbit.formats import Format
from lowbit.integrations.hf_layers import KEEP, LayerRules
from lowbit.solvers import AUTO, parse_pipeline, pick_solver

METHOD = "lowbit"
LayersByPattern = Mapping[str, "str | Format"] | Iterable[Sequence[Any]]
_DEFAULTS: dict[str, Any] = {
    "format": None,
    "layers": [],
    "modules_to_not_convert": [],
    "solver": AUTO,
    "preset": "auto",
    "dequantize": False,
}


class LowbitConfig(QuantizationConfigMixin):
    """How transformers should quantize a model while it loads it, and what a saved model's config.json says.

    format: the format or spec of every layer that nothing below excepts, such as "awq_w4a16(group_size=128)".
    layers: pattern -> spec, or "keep" to leave a layer alone; as a mapping or as pairs. The patterns are regular
        expressions searched for in a layer's name; the first match wins.
    modules_to_not_convert: names of modules to leave alone, whole or from a dot to a dot ("lm_head", "layers.0").
    solver: how codes and scales are chosen; one that needs no statistics, such as "rtn" or "scale_search".
    preset: the family that says which layers stay (embeddings, heads, norms ...): "auto" by the names of the layers,
        "none" for no exceptions, or a family's name, as in `lowbit convert --preset`.
    dequantize: turn a quantized model into a plain one while it is loaded.

    A quantized folder needs none of them: its weight files describe its layers.

    Raises `FormatError`, `PlanError` or `SolverError` for a value that is none, or a field that does not exist.
    """

    def __init__(
        self,
        format: str | Format | None = None,
        layers: LayersByPattern = (),
        modules_to_not_convert: Sequence[str] | None = None,
        solver: str = AUTO,
        preset: str = "auto",
        dequantize: bool = False,
        **others: Any,
    ) -> None:
        method = others.pop("quant_method", METHOD)
        if method != METHOD:
            raise PlanError(f"quantization_config: quant_method is {method!r}, expected {METHOD!r}")
        if others:
            raise PlanError(
                f"quantization_config: unknown field {', '.join(map(repr, sorted(others)))}; the fields are "
                f"{', '.join(_DEFAULTS)}"
            )
        self.quant_method = METHOD
        self.format = None if format is None else StoredFormat.parse(format).spec
        self.layers = [[pattern, _spec(pattern, value)] for pattern, value in _pairs(layers)]
        self.modules_to_not_convert = _names(modules_to_not_convert)
        self.solver, self.preset, self.dequantize = solver, preset, bool(dequantize)
        if solver != AUTO:
            parse_pipeline(solver)

    def rules(self) -> LayerRules:
        """What this config asks of a model that is quantized while it loads.

        Raises `PlanError` or `SolverError` for what cannot be done without statistics or a file.
        """
        if self.format is None:
            raise PlanError('LowbitConfig names no format; give one, such as LowbitConfig("awq_w4a16")')
        rules = tuple((pattern, None if spec == KEEP else _plain(spec)) for pattern, spec in self.layers)
        made = LayerRules(_plain(self.format), rules, tuple(self.modules_to_not_convert), self.preset)
        for fmt in (made.format, *(fmt for _, fmt in rules if fmt is not None)):
            if fmt.plain != fmt:
                raise PlanError(
                    f"{fmt}: has a pre_quant_scale or input_scale, which needs calibration; calibrate (lowbit "
                    "calibrate), convert the folder with the statistics (lowbit convert --stats) and load the result"
                )
            fmt.check_encodable("quantization_config")
            pick_solver(self.solver, fmt)
        if self.solver != AUTO and parse_pipeline(self.solver).steps:
            raise PlanError(
                f"{self.solver}: needs second moments of the layers' inputs, which nobody knows while a model loads; "
                "use rtn, scale_search or auto, or convert the folder with statistics (lowbit convert --stats)"
            )
        return made

    def to_dict(self) -> dict[str, Any]:
        """The fields as JSON values, those with default values left out."""
        fields = {name: getattr(self, name) for name in _DEFAULTS}
        return {"quant_method": METHOD, **{name: v for name, v in fields.items() if v != _DEFAULTS[name]}}


def _pairs(layers: LayersByPattern) -> list[tuple[str, Any]]:
    pairs = list(layers.items()) if isinstance(layers, Mapping) else [tuple(pair) for pair in layers]
    for pair in pairs:
        if len(pair) != 2 or not isinstance(pair[0], str):
            raise PlanError(f'quantization_config: layers holds {pair!r}, expected (pattern, spec or "keep")')
    return pairs


def _spec(pattern: str, value: Any) -> str:
    if value is None or value == KEEP:
        return KEEP
    if not isinstance(value, str | Format):
        raise PlanError(f'quantization_config: the rule {pattern!r} says {value!r}, expected a spec or "keep"')
    return StoredFormat.parse(value).spec


def _names(names: Sequence[str] | None) -> list[str]:
    if isinstance(names, str) or not all(isinstance(name, str) for name in names or ()):
        raise PlanError(f"quantization_config: modules_to_not_convert is {names!r}, expected a list of names")
    return list(names or ())


def _plain(spec: str) -> Format:
    stored = StoredFormat.parse(spec)
    if stored.layout:
        raise PlanError(
            f"{spec}: names a layout, which is a matter of files; give the format alone, or use lowbit convert"
        )
    return stored.format
