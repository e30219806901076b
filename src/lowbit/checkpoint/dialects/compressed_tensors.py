"""The convention of compressed-tensors (llm-compressor, vLLM, SGLang, transformers): `config_groups` in config.json.

Which tensors a layer has depends on its scheme (`compressed_tensors_schemes`, `compressed_tensors_storage`). A layer
belongs to the group that names it: by its full name first, then by an expression, then by its class. `ignore` wins.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from lowbit.checkpoint.dialects.base import (
    Container,
    FoundLayers,
    Read,
    StoredLayer,
    TensorSpec,
    join_key,
    name_place,
    refuse_unwritable,
    register_dialect,
)
from lowbit.checkpoint.dialects.compressed_tensors_schemes import Scheme, meaning_of, scheme_of
from lowbit.checkpoint.dialects.compressed_tensors_storage import ALL_SUFFIXES, Storage, storage_of
from lowbit.checkpoint.dialects.described import (
    FIELD,
    LayerTensors,
    collect,
    logical_dtype,
    matches,
    means_zeros,
    plain_layers,
    quantization_config,
    tensors_by_layer,
)
from lowbit.errors import CheckpointError, PartsError
from lowbit.formats import Format, Parts

METHOD = "compressed-tensors"
_ACTIVATIONS = ("input_scale", "input_zero_point", "input_global_scale")
_DECODED_TO_BFLOAT16 = ("nvfp4", "mxfp4", "mxfp8")
_SCHEME = "compressed_tensors"  # the option in which a layer keeps its scheme


class CompressedTensors:
    """Reads and writes the convention of this module's docstring; see `Dialect` for the contracts."""

    name = "compressed_tensors"
    summary = "compressed-tensors folders: llm-compressor, vLLM, SGLang, transformers"
    writes = True
    needs_folder = True
    owned_metadata: tuple[str, ...] = ()
    owned_configs: Mapping[str, tuple[str, ...]] = {"config.json": (FIELD, "compression_config")}
    methods: tuple[str, ...] = (METHOD,)

    def detect(self, held: Container) -> bool:
        """Whether config.json says so, and there are scales."""
        return quantization_config(held, METHOD) is not None and any(
            key.rpartition(".")[2] in ("weight_scale", "weight_packed") for key in held.tensors
        )

    def find_layers(
        self, held: Container, read: Read, *, infer_act_unsigned: bool = True, strict: bool = True
    ) -> FoundLayers:
        """See `Dialect.find_layers`."""
        config = quantization_config(held, METHOD) or {}
        groups, ignore = _groups(config, held.where), _strings(config.get("ignore"))
        dtype = logical_dtype(held)

        def make(tensors: LayerTensors) -> StoredLayer | None:
            if not tensors.keys.keys() & {"weight_scale", "weight_packed"}:
                return None
            scheme = _scheme_for(tensors, groups, ignore)
            storage = storage_of(scheme, tensors.place)
            tensors.need(storage.codes, "weight_scale", *storage.also_needs(scheme))
            static = next((name for name in _ACTIVATIONS if name in tensors.keys), "")
            meaning = meaning_of(
                scheme, tensors.place, act_order="weight_g_idx" in tensors.keys, input_scale=bool(static)
            )
            keys = {part: tensors.keys[name] for name, part in storage.roles.items() if name in tensors.keys}
            if static:
                keys["input_scale"] = tensors.keys[static]
            if strange := sorted(tensors.keys.keys() - storage.roles.keys() - {static, "weight"}):
                raise tensors.error(f"has {strange[0]}, which {scheme.name} does not know")
            if "global_scale" in keys:
                _check_divisor(tensors, keys, read)
            shape = storage.shape_of(tensors, scheme, read)
            return StoredLayer(
                layer=tensors.layer,
                format=meaning.format,
                shape=shape,
                dtype=dtype,
                keys=keys,
                options={_SCHEME: scheme.to_json()},
                notes=meaning.notes,
                where=held.where,
                dtypes={"scale": tensors.specs["weight_scale"].dtype},
            )

        found = tensors_by_layer(held, ALL_SUFFIXES | {*_ACTIVATIONS})
        return collect(held, found.values(), make, strict=strict)

    def load_parts(self, layer: StoredLayer, read: Read) -> Parts:
        """See `Dialect.load_parts`."""
        storage = _storage(layer)
        stored = {role: read(key) for role, key in layer.keys.items()}
        for role, tensor in stored.items():
            wanted = storage.specs(layer)[role]
            if (tuple(tensor.shape), tensor.dtype) != (wanted.shape, wanted.dtype):
                raise PartsError(
                    f"{layer.place}: {layer.keys[role]!r} is {TensorSpec.of(tensor)}, expected {wanted} for a weight "
                    f"{list(layer.shape)} as {layer.format}; download the file again"
                )
        parts = storage.read(layer, stored)
        layer.format.check(parts, layer.shape, layer.place)
        return parts

    def refuses(self, stored: StoredLayer) -> str | None:
        """See `Dialect.refuses`."""
        scheme = _scheme(stored)
        if isinstance(scheme, str):
            return scheme
        order, static = "g_idx" in stored.format.part_names, stored.format.input_scale
        back = meaning_of(scheme, stored.place, act_order=order, input_scale=static).format
        if back != stored.format:
            return f"the same weights would be read back as {back}; use that"
        return storage_of(scheme, stored.place).refuses(stored)

    def stored_specs(self, stored: StoredLayer) -> dict[str, TensorSpec]:
        """See `Dialect.stored_specs`."""
        refuse_unwritable(self, stored)
        storage = _storage(stored)
        names = _names(storage)
        return {join_key(stored.layer, names[part]): spec for part, spec in storage.specs(stored).items()}

    def store_parts(self, stored: StoredLayer, parts: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """See `Dialect.store_parts`."""
        refuse_unwritable(self, stored)
        stored.format.check(parts, stored.shape, stored.place)
        storage = _storage(stored)
        names = _names(storage)
        tensors = storage.write(stored, parts)
        return {join_key(stored.layer, names[part]): tensor.contiguous() for part, tensor in tensors.items()}

    def header_metadata(self, layers: Iterable[StoredLayer], plain: Mapping[str, TensorSpec]) -> dict[str, str]:
        """Nothing: config.json says it all."""
        return {}

    def model_dtype(self, formats: Iterable[Format]) -> torch.dtype | None:
        """bfloat16 for the formats that compressed-tensors decodes to it, whatever the model's other tensors are."""
        return torch.bfloat16 if any(fmt.name in _DECODED_TO_BFLOAT16 for fmt in formats) else None

    def config_fields(
        self, layers: Iterable[StoredLayer], plain: Mapping[str, TensorSpec]
    ) -> dict[str, dict[str, Any]]:
        """`quantization_config`: a group a scheme.

        One scheme for all is said of the class Linear, as engines that fuse projections expect it, with everything
        else in `ignore`; several name their layers.
        """
        by_scheme: dict[str, tuple[Scheme, list[str]]] = {}
        for layer in layers:
            scheme = _known_scheme(layer)
            by_scheme.setdefault(repr(scheme.to_json()), (scheme, []))[1].append(layer.layer)
        quantized = {name for _, names in by_scheme.values() for name in names}
        ignore = [name for name in plain_layers(plain) if name not in quantized]
        if "lm_head" not in quantized:
            ignore = sorted({*ignore, "lm_head"})  # tied to the embedding it is in no file, but a module all the same
        several = len(by_scheme) > 1
        groups = {
            f"group_{index}": _group(scheme, names if several else ["Linear"])
            for index, (scheme, names) in enumerate(by_scheme.values())
        }
        names = {scheme.name for scheme, _ in by_scheme.values()}
        config = {
            "quant_method": METHOD,
            "format": names.pop() if len(names) == 1 else "mixed-precision",
            "quantization_status": "compressed",
            "global_compression_ratio": None,
            "kv_cache_scheme": None,
            "ignore": ignore,
            "config_groups": groups,
        }
        return {"config.json": {FIELD: config}} if by_scheme else {}


COMPRESSED_TENSORS = CompressedTensors()
register_dialect(COMPRESSED_TENSORS)


def _group(scheme: Scheme, targets: list[str]) -> dict[str, Any]:
    activations = None if scheme.input_activations is None else dict(scheme.input_activations)
    return {
        "targets": targets,
        "format": scheme.name,
        "weights": dict(scheme.weights),
        "input_activations": activations,
        "output_activations": None,
    }


def _groups(config: Mapping[str, Any], where: str) -> list[tuple[list[str], Scheme]]:
    """The targets and the scheme of each group. Raises `CheckpointError` for what cannot be understood."""
    groups, overall = config.get("config_groups"), str(config.get("format"))
    if not isinstance(groups, Mapping) or not groups:
        raise CheckpointError(f"{where}: config.json has no config_groups; download it again")
    found = []
    for name, group in groups.items():
        if not isinstance(group, Mapping) or not isinstance(group.get("weights"), Mapping):
            preset = " (a preset's name)" if isinstance(group, list) else ""
            raise CheckpointError(
                f"{where}: {name} of config_groups{preset} does not say how weights are stored; load the model with "
                "llm-compressor and save it again"
            )
        for size, least in (("num_bits", 1), ("group_size", -1)):
            given = group["weights"].get(size)
            if given is not None and not (type(given) is int and given >= least):
                raise CheckpointError(
                    f"{where}: {name} of config_groups says {size} {given!r}, expected a whole number; correct "
                    "config.json"
                )
        own = group.get("format") or overall
        if own == "mixed-precision":
            raise CheckpointError(
                f"{where}: {name} of config_groups has no format, and the whole is mixed-precision; correct config.json"
            )
        activations = group.get("input_activations")
        activations = activations if isinstance(activations, Mapping) else None
        found.append((_strings(group.get("targets")), Scheme(str(own), group["weights"], activations)))
    return found


def _strings(value: Any) -> list[str]:
    return [item for item in value if isinstance(item, str)] if isinstance(value, Sequence) else []


def _scheme_for(tensors: LayerTensors, groups: Sequence[tuple[list[str], Scheme]], ignore: Sequence[str]) -> Scheme:
    """The scheme of a layer that has codes and scales."""
    name = tensors.layer
    if any(matches(name, entry) for entry in ignore):
        raise tensors.error(
            "is in the ignore list of config.json, yet it has scales; the two contradict each other. Correct "
            "config.json, or download the model again"
        )
    for names in (_by_name, _by_expression, _by_class):
        for targets, scheme in groups:
            if any(names(target, name) for target in targets):
                return scheme
    raise tensors.error(
        "has scales, but no group of config.json names it; correct config.json, or download the model again"
    )


def _check_divisor(tensors: LayerTensors, keys: Mapping[str, str], read: Read) -> None:
    """Raise `CheckpointError` for a global scale that cannot be what this convention stores: 2688 / amax."""
    value = float(next(iter(read(keys["global_scale"]).flatten()), math.nan))
    if not math.isfinite(value) or value <= 0:
        raise tensors.error(f"its weight_global_scale is {value}; it was never set. Download the model again")
    if value <= 1 and not means_zeros(keys, read):
        raise tensors.error(
            f"its weight_global_scale is {value}: as a divisor, weights would reach {2688 / value:.3g}; as a factor "
            f"(what ModelOpt and ComfyUI store) {2688 * value:.3g}. It mixes two conventions: convert the original"
        )


def _by_name(target: str, name: str) -> bool:
    return target == name


def _by_expression(target: str, name: str) -> bool:
    return target.startswith("re:") and matches(name, target)


def _by_class(target: str, name: str) -> bool:
    """Whether a target is a class such as Linear: the layers of a file do not tell theirs."""
    return "." not in target and target[:1].isupper()


def _scheme(stored: StoredLayer) -> Scheme | str:
    """The scheme that a layer came with, or that its format is written in; in words why there is none."""
    kept = stored.options.get(_SCHEME)
    if isinstance(kept, Mapping):
        return Scheme(kept["name"], kept["weights"], kept["input_activations"])
    return scheme_of(stored.format)


def _known_scheme(stored: StoredLayer) -> Scheme:
    scheme = _scheme(stored)
    if isinstance(scheme, str):
        raise PartsError(f"{name_place(stored.where, stored.layer)}: is {stored.format}: {scheme}")
    return scheme


def _storage(stored: StoredLayer) -> Storage:
    return storage_of(_known_scheme(stored), stored.place)


def _names(storage: Storage) -> dict[str, str]:
    """Part -> the name that it is stored under."""
    return {part: name for name, part in storage.roles.items()} | {"input_scale": storage.activations}
