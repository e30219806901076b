"""What a user asked for, as far as it decides what becomes of a weight: formats, patterns of names, the dialect."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass, field, replace

from lowbit.errors import PlanError
from lowbit.formats.base import Format
from lowbit.numerics.int4_matmul import GELU_SHIFT
from lowbit.solvers import AUTO, fraction_problem, parse_pipeline, pick_solver

from .dialects import Dialect, StoredLayer
from .eligibility import axes_of
from .folder_configs import changed_dtype
from .full_precision import OPTION, lacks_option, refuses_option
from .input_scales import InputScales
from .layer_statistics import LayerStatistics, knowledge
from .plan_data import ComponentPlan, TensorPlan
from .stored_format import StoredFormat
from .weight_shape import BANK_AXES, KERNEL_AXES, TURNED_BANK_AXES, WeightShape, refusal

TURNED_BANKS = "bank-transposed"
FULL_PRECISION = "full-precision-matrix-mult"
INPUT_PERCENTILE = "input-percentile"
ROTATED = "; rotated by auto"


def rotation_note(name: str) -> str:
    """What to know of a plan in which `auto` rotated layers of the format of that name."""
    return (
        f"{name}: rotated by auto where K allows (ConvRot), which spreads what stands out in the input; lowbit and "
        f"ComfyUI run it. For programs that do not, ask for {name}(rotation=0)"
    )


def other_when_converted(stored: StoredFormat, k: int) -> str:
    """What to know who asks about the linear of a format with K columns that `auto` would rotate; "" for all others."""
    rotated = stored.format.rotated_for(k) if stored.is_name else None
    if rotated is None:
        return ""
    return f"convert rotates {stored.format.name} by default; ask with --format '{rotated.spec}'"


@dataclass
class Pattern:
    """A regular expression that a user gave, and whether any layer matched it."""

    option: str
    text: str
    used: bool = False

    def __post_init__(self) -> None:
        try:
            self._expression = re.compile(self.text)
        except re.error as error:
            raise PlanError(f"--{self.option} {self.text!r} is no regular expression: {error}; correct it") from error

    def matches(self, name: str) -> bool:
        """Whether it is found in a layer's name; remembers that it was."""
        found = self._expression.search(name) is not None
        self.used |= found
        return found


def patterns(option: str, texts: Iterable[str]) -> list[Pattern]:
    """What an option that may be repeated was given. Raises `PlanError` for what is no regular expression."""
    return [Pattern(option, text) for text in texts]


def _in_basis_of(was: Format, fmt: Format) -> Format:
    """A format of the same name with the other's rotation."""
    return replace(fmt, rotation=was.config()["rotation"])  # type: ignore[call-arg]  # those that can rotate have it


@dataclass
class Rules:
    """What the user asked for.

    `turned_banks`: patterns of banks [E, K, N]; `convolutions`: kernels are wanted, too; `requantize`: so are weights
    that are quantized already; `full_precision`: of layers whose activations no runtime may quantize. `input_scales`,
    `input_percentile`: where static scales of inputs come from, besides statistics. `doubts`: what to know of single
    layers before the plan is followed.
    """

    stored: StoredFormat
    solver: str
    keep: list[Pattern]
    only: list[Pattern]
    by_layer: list[tuple[Pattern, StoredFormat]]
    dialect: Dialect
    statistics: LayerStatistics | None = None
    turned_banks: list[Pattern] = field(default_factory=list)
    convolutions: bool = False
    requantize: bool = False
    full_precision: list[Pattern] = field(default_factory=list)
    input_scales: InputScales | None = None
    input_percentile: float | None = None
    picked: dict[tuple[str, str], str] = field(default_factory=dict)
    doubts: list[str] = field(default_factory=list)

    def check(self) -> None:
        """Raise for a layout that no file holds, a format that needs calibration, and an unknown solver."""
        if self.full_precision and (why := lacks_option(self.dialect)):
            raise PlanError(f"--{FULL_PRECISION}: {why}")
        if self.input_percentile is not None and (why := fraction_problem(self.input_percentile)):
            raise PlanError(f"--{INPUT_PERCENTILE} {why}")
        for wanted in (self.stored, *(stored for _, stored in self.by_layer)):
            wanted.check_stored()
            fmt = wanted.format
            needs_input = fmt.pre_quant_scale or (fmt.input_scale and self.input_scales is None)
            if needs_input and self.statistics is None:
                raise PlanError(
                    f"{fmt}: has a pre_quant_scale or input_scale, which needs calibration; calibrate (lowbit "
                    "calibrate) and give the file with --stats (of an input_scale alone, --input-scales will do), or "
                    "leave it out"
                )
            pick_solver(self.solver, fmt, "full")

    def match(self, name: str) -> tuple[Pattern | None, Pattern | None, tuple[Pattern, StoredFormat] | None]:
        """The keep and only patterns and the layer rule that hold for a name; all are tried, to learn which match."""
        kept = [pattern for pattern in self.keep if pattern.matches(name)]
        only = [pattern for pattern in self.only if pattern.matches(name)]
        rules = [(pattern, stored) for pattern, stored in self.by_layer if pattern.matches(name)]
        return kept[0] if kept else None, only[0] if only else None, rules[0] if rules else None

    def pick(self, fmt: Format, layer: str, *, has_bias: bool) -> str:
        """The solver for a layer in a format, noted for the plan."""
        known = knowledge(self.statistics, layer)
        given = self.input_scales.by_layer if self.input_scales is not None else {}
        if not known and (fmt.pre_quant_scale or (fmt.input_scale and layer not in given)):
            nor = f", nor a scale in {self.input_scales.where}" if self.input_scales is not None else ""
            raise PlanError(
                f"{layer!r}: {fmt} needs to know the layer's input, and there are no statistics of it{nor}; calibrate "
                "it, or keep it (--keep) or give it another format (--layer)"
            )
        name, why = pick_solver(self.solver, fmt, known, has_bias=has_bias)
        if self.statistics is not None and known != "full" and parse_pipeline(name).steps:
            # A table of embeddings has no input to measure; refusing it would make the solver useless for the rest.
            name, why = pick_solver(AUTO, fmt, known, has_bias=has_bias)
            why = f"{self.solver} needs second moments, which are not known of some layers; {why}"
        self.picked[fmt.spec, name] = f"{fmt}: solver {name} ({why})"
        return name

    def rotated(self, layer: StoredLayer, weight: WeightShape, was: StoredLayer | None) -> tuple[Format, str]:
        """The rotated variant that `auto` takes where the dialect's runtimes run it, and the reason to add.

        `was`: as the source holds the layer quantized. In the format that it had it stays in the basis that it has: in
        another one the codes would be rounded once more.
        """
        same, found = layer.format, layer.format.rotated_for(weight.matrix[1])
        if self.solver != AUTO or found is None or weight.is_bank or weight.axes == KERNEL_AXES:
            return same, ""
        if was is not None and was.format.name == same.name:
            found, why = _in_basis_of(was.format, same), "; in the basis that it has"
            return (same, "") if found == same or refusal(self.dialect, replace(layer, format=found)) else (found, why)
        if refusal(self.dialect, replace(layer, format=found)):
            return same, ""
        if (note := rotation_note(same.name)) not in self.doubts:
            self.doubts.append(note)
        return found, ROTATED

    def fit(self, layer: StoredLayer, name: str, given: frozenset[str], after_gelu: str) -> tuple[Format, str]:
        """The variant of a format that suits a layer's input, and the reason to add where it is another one.

        `given`: the options that were asked for by name, which stay. `after_gelu`: the preset by which that input is
        what a GELU gave, or ""; statistics know better.
        """
        smallest = None if self.statistics is None else self.statistics.smallest(name)
        why = "" if smallest is None else f"; its input is never below {smallest:.3g}"
        if smallest is None and after_gelu:
            smallest, why = -GELU_SHIFT, f"; it reads what a GELU gave, as the preset {after_gelu} says"
        if smallest is None or (fitted := layer.format.fitted_to(smallest)) == layer.format:
            return layer.format, ""
        if any(getattr(fitted, option, None) != getattr(layer.format, option, None) for option in given):
            return layer.format, ""
        if refusal(self.dialect, replace(layer, format=fitted)) and not refusal(self.dialect, layer):
            return layer.format, f"{why}, but the dialect {self.dialect.name} has no place for {fitted}"
        return fitted, why

    def options(self, fmt: Format, name: str, was: StoredLayer | None) -> str:
        """The option that a layer's marker says, or "" (`TensorPlan.options`).

        `was`: as the source holds the layer quantized. What its marker says besides its format still holds, where the
        new one can say it.
        """
        why = refuses_option(fmt)
        if not [pattern for pattern in self.full_precision if pattern.matches(name)]:
            said = was is not None and was.options.get(OPTION) and refuses_option(was.format) is None
            return OPTION if said and why is None and lacks_option(self.dialect) is None else ""
        if why is not None and fmt.rounds_input:
            raise PlanError(f"--{FULL_PRECISION}: layer {name!r}: {why}")
        if why is not None and why not in self.doubts:
            self.doubts.append(why)
        return OPTION if why is None else ""

    def static_scale(self, fmt: Format, layer: str) -> tuple[float | None, float | None]:
        """What a plan says of the static scale of a layer's input: the one given for it, or else the percentile."""
        if not fmt.input_scale:
            return None, None
        given = None if self.input_scales is None else self.input_scales.by_layer.get(layer)
        return given, self.input_percentile if given is None else None

    def refuse_unused_scales(self, components: Iterable[ComponentPlan]) -> None:
        """Refuse scales of unknown layers, and what would be stored nowhere; note how many scales are given."""
        tensors = {full_name(part.name, tensor.layer): tensor for part in components for tensor in part.tensors}
        if self.input_scales is not None:
            stored = [name for name, tensor in tensors.items() if tensor.input_scale is not None]
            self.input_scales.refuse_unknown(tensors, stored)
            self.doubts.append(self.input_scales.note(stored))
        if self.input_percentile is not None and all(t.input_percentile is None for t in tensors.values()):
            raise PlanError(
                f"--{INPUT_PERCENTILE} {self.input_percentile:g}: no layer stores an input scale that calibration "
                "finds; give a format with input_scale=true and --stats, or leave it out"
            )

    def note_dtype(self, stored: StoredLayer) -> None:
        """Say once that the dialect's readers take models with this format in another dtype than the source's."""
        note = changed_dtype(self.dialect, stored)
        if note and note not in self.doubts:
            self.doubts.append(note)

    def oriented(self, weight: WeightShape, name: str, family: str) -> tuple[WeightShape, str]:
        """A weight with the axes that the user says it has, and the reason to add where it is a bank.

        `family`: the preset by which it is [E, K, N], or "".
        """
        if not weight.is_bank:
            return weight, ""
        turned = [pattern for pattern in self.turned_banks if pattern.matches(name)]
        axes = TURNED_BANK_AXES if turned or family else BANK_AXES
        why = f"the preset {family} says" if family else "transformers documents"
        if turned:
            why = f"--{TURNED_BANKS} {turned[0].text!r} says"
        shown = ", ".join(axes.split())
        return WeightShape(weight.shape, axes), f"; {weight.experts} experts, each for itself, [{shown}] as {why}"

    def spelled(self, stored: StoredFormat, layer: StoredLayer) -> StoredFormat:
        """The form of a format that the dialect writes, where it holds the same codes in several."""
        for fmt in (stored.format, *stored.format.equivalents()):
            if refusal(self.dialect, replace(layer, format=fmt)) is None:
                return replace(stored, format=fmt)
        return stored

    def notes(self) -> Iterable[str]:
        """Which solver was taken for which format, and the doubts."""
        return [*self.picked.values(), *self.doubts]

    def refuse_unused(self, components: Iterable[ComponentPlan]) -> None:
        """A pattern that matches nothing is a typing error until shown otherwise."""
        rules = (pattern for pattern, _ in self.by_layer)
        for pattern in (*self.keep, *self.only, *rules, *self.turned_banks, *self.full_precision):
            if not pattern.used:
                banks = pattern.option == TURNED_BANKS
                what, short = ("bank of experts", "bank") if banks else ("layer", "layer")
                what += " that is quantized" if pattern.option == FULL_PRECISION else ""
                names = list(_names(components, banks=banks))
                example = f"; a {short}'s name is, for example, {names[len(names) // 2]!r}" if names else ""
                raise PlanError(f"--{pattern.option} {pattern.text!r} matches no {what}{example}; correct the pattern")


def _names(components: Iterable[ComponentPlan], *, banks: bool) -> Iterable[str]:
    """Names that a pattern could have meant."""
    for part in components:
        for tensor in part.tensors:
            if _is_bank(tensor) if banks else len(tensor.shape) == 2:
                yield full_name(part.name, tensor.layer)


def _is_bank(tensor: TensorPlan) -> bool:
    return WeightShape(tensor.shape, tensor.axes or axes_of(tensor.key, tensor.shape)).is_bank


def full_name(component: str, layer: str) -> str:
    """A layer's name as patterns see it."""
    return f"{component}/{layer}" if component else layer
