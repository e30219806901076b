"""Quantized layers whose markers are to say something else about products in full precision, their codes untouched."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from lowbit.errors import PlanError

from .dialects import Dialect, StoredLayer
from .full_precision import OPTION, lacks_option, refuses_option
from .plan_rules import FULL_PRECISION, Pattern, patterns
from .quantized_source import QuantizedComponent

NO_FULL_PRECISION = f"no-{FULL_PRECISION}"


@dataclass
class Marked:
    """Patterns of layers whose markers say full_precision_matrix_mult, and of those whose markers must not.

    Where both match, it is not said. `notes`: formats of which it would say nothing.
    """

    said: list[Pattern]
    unsaid: list[Pattern]
    notes: list[str] = field(default_factory=list)

    @classmethod
    def by(cls, said: Sequence[str], unsaid: Sequence[str], dialect: Dialect | None) -> Marked:
        """Those of these texts, for files that a dialect is written in.

        Raises `PlanError` for what is no regular expression, and where the dialect has no place for the field.
        """
        made = cls(patterns(FULL_PRECISION, said), patterns(NO_FULL_PRECISION, unsaid))
        if (said or unsaid) and dialect is not None and (why := lacks_option(dialect)):
            raise PlanError(f"--{(made.said or made.unsaid)[0].option}: {why}")
        return made

    def applied(self, held: QuantizedComponent) -> QuantizedComponent:
        """The same layers with what their markers are to say. Raises `PlanError` for formats that contradict it."""
        if not self.said and not self.unsaid:
            return held
        layers = {name: self._applied(held.full_name(name), layer) for name, layer in held.layers.items()}
        return replace(held, found=replace(held.found, layers=layers))

    def refuse_unused(self, layers: Sequence[str]) -> None:
        """A pattern that matches no layer is a typing error until shown otherwise."""
        for pattern in (*self.said, *self.unsaid):
            if not pattern.used:
                example = f"; a layer's name is, for example, {layers[len(layers) // 2]!r}" if layers else ""
                raise PlanError(f"--{pattern.option} {pattern.text!r} matches no layer{example}; correct the pattern")

    def _applied(self, name: str, layer: StoredLayer) -> StoredLayer:
        said = [pattern for pattern in self.said if pattern.matches(name)]
        if [pattern for pattern in self.unsaid if pattern.matches(name)]:
            return replace(layer, options={key: value for key, value in layer.options.items() if key != OPTION})
        if not said:
            return layer
        why = refuses_option(layer.format)
        if why is None:
            return replace(layer, options={**layer.options, OPTION: True})
        if layer.format.rounds_input:
            raise PlanError(f"--{FULL_PRECISION}: layer {name!r}: {why}")
        if why not in self.notes:
            self.notes.append(why)
        return layer
