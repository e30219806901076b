"""Baking adapters into files: what changes, and that nothing else does."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from lowbit.checkpoint.convert import convert
from lowbit.checkpoint.plan import make_plan
from lowbit.checkpoint.quantized_source import look_for_layers
from lowbit.checkpoint.source import open_source
from lowbit.errors import CheckpointError, FormatError, WeightError, WriteError
from lowbit.formats.parts import raw_bytes
from lowbit.lora import Adapter, DoraDelta, LoraDelta, bake_checkpoint
from lowbit.lora.adapter_delta import LohaDelta, RowsDelta
from lowbit.lora.bake_checkpoint import adapter_digest
from lowbit.lora.summed import SumDelta
from tests.support.checkpoints import files_below, model_tensors, save_model, save_shards

CHANGED = ("blocks.0.up", "blocks.1.down")


def quantized(folder, spec: str, source=None):
    """A conversion of the small model in a format, with a header entry of another program."""
    path = source or save_model(folder / "in.safetensors")
    target = folder / ("out.safetensors" if path.suffix == ".safetensors" else "out")
    with open_source(path) as opened:
        convert(opened, target, make_plan(opened, spec, preset="none", only=["blocks"], solver="rtn"))
    return target


def decoded(path) -> dict[str, tuple]:
    """Each quantized layer as a loader gets it: format, weight, stored bias plus its share."""
    found = {}
    with open_source(path) as source:
        for component in source.components:
            held = look_for_layers(source, component)
            for name, stored in held.layers.items():
                w, share = held.dequantized(stored, torch.float32)
                bias = held.bias_key(name)
                true = None if bias is None else held.read(bias).float() + (0 if share is None else share)
                found[held.full_name(name)] = stored.format, w, true
    return found


def lora(path, size: float = 0.1, names=CHANGED, prefix: str = "diffusion_model."):
    """An adapter file for some layers; returns its path and the changes by layer."""
    tensors, dense, generator = {}, {}, torch.Generator().manual_seed(5)
    for name in names:
        weight = model_tensors()[f"{name}.weight"].float()
        down = torch.randn((4, weight.shape[1]), generator=generator)
        up = torch.randn((weight.shape[0], 4), generator=generator)
        up *= size * weight.norm() / (up @ down).norm()
        tensors |= {f"{prefix}{name}.lora_A.weight": down, f"{prefix}{name}.lora_B.weight": up}
        dense[name] = up @ down
    save_file(tensors, path)
    return path, dense


@pytest.mark.parametrize(
    "spec", ["int8", "fp8_e4m3", "nvfp4", "mxfp8", "awq_w4a16", "svdquant_w4a4(rank=16,act_unsigned=true)"]
)
def test_changed_layers_have_the_change_and_all_else_is_the_same_bytes(spec, tmp_path):
    """The weights move by the adapter's change; other tensors and the header of others come through untouched."""
    path = quantized(tmp_path, spec)
    adapter, dense = lora(tmp_path / "lora.safetensors")

    report = bake_checkpoint(path, tmp_path / "baked.safetensors", adapter, strength=0.5)

    before, after = decoded(path), decoded(tmp_path / "baked.safetensors")
    old, new = load_file(path), load_file(tmp_path / "baked.safetensors")
    assert set(report.layers) == set(CHANGED)
    for name, change in dense.items():
        gained = after[name][1] - before[name][1]
        share = float((gained * change).sum() / (0.5 * change.square().sum()))
        assert 0.9 < share < 1.1
        assert share == pytest.approx(report.layers[name].recovered, abs=2e-2)
        if before[name][2] is not None:
            torch.testing.assert_close(after[name][2], before[name][2], atol=2e-2, rtol=1e-2)
    assert old.keys() == new.keys()
    for key in old.keys() - {key for key in old if key.startswith(CHANGED)}:
        assert new[key].dtype == old[key].dtype
        assert torch.equal(raw_bytes(new[key]), raw_bytes(old[key])), key
    assert {key: tensor.dtype for key, tensor in old.items()} == {key: tensor.dtype for key, tensor in new.items()}


def test_the_header_keeps_what_others_wrote_and_says_what_was_baked(tmp_path):
    """Header entries survive, the description of the layers is up to date, and each bake is noted."""
    path = quantized(tmp_path, "svdquant_w4a4(rank=16)")
    adapter, _ = lora(tmp_path / "lora.safetensors")
    bake_checkpoint(path, tmp_path / "once.safetensors", adapter, strength=0.5)
    bake_checkpoint(tmp_path / "once.safetensors", tmp_path / "twice.safetensors", adapter, strength=-0.25)
    with safe_open(tmp_path / "twice.safetensors", "pt") as file:
        metadata = file.metadata()

    assert (metadata["format"], metadata["author"]) == ("pt", "test")
    assert [entry["strength"] for entry in json.loads(metadata["baked_lora"])] == [0.5, -0.25]
    assert json.loads(metadata["baked_lora"])[0]["file"] == "lora.safetensors"
    formats = {name: layer[0].rank for name, layer in decoded(tmp_path / "twice.safetensors").items()}
    assert {name for name, rank in formats.items() if rank == 48} == set(CHANGED)
    assert set(formats.values()) == {16, 48}


def test_layers_that_are_not_quantized_are_baked_in_their_dtype(tmp_path):
    """A plain checkpoint, and the plain layers of a quantized one, get the change rounded to their own dtype."""
    path = save_model(tmp_path / "in.safetensors")
    adapter, dense = lora(tmp_path / "lora.safetensors")

    report = bake_checkpoint(path, tmp_path / "baked.safetensors", adapter)

    old, new = load_file(path), load_file(tmp_path / "baked.safetensors")
    assert {layer.method for layer in report.layers.values()} == {"plain"}
    for name, change in dense.items():
        expected = (old[f"{name}.weight"].float() + change).bfloat16()
        torch.testing.assert_close(new[f"{name}.weight"], expected, atol=1e-3, rtol=1e-2)
    assert torch.equal(new["steps"], old["steps"])


def test_shards_keep_their_layout(tmp_path):
    """A sharded source becomes shards with the same files and an index of the new tensors."""
    index = save_shards(tmp_path / "model")
    with open_source(index) as source:
        convert(source, tmp_path / "out", make_plan(source, "int8", preset="none", only=["blocks"], solver="rtn"))
    adapter, dense = lora(tmp_path / "lora.safetensors")
    folder = tmp_path / "out"

    bake_checkpoint(folder, tmp_path / "baked", adapter)

    before, after = decoded(folder), decoded(tmp_path / "baked")
    assert files_below(folder).keys() == files_below(tmp_path / "baked").keys()
    for name, change in dense.items():
        assert float((after[name][1] - before[name][1] - change).norm() / change.norm()) < 0.5


@pytest.mark.parametrize(
    ("dialect", "spec"),
    [
        ("compressed_tensors", "wna16(group_size=64)"),
        ("gptq", "wna16(group_size=64)"),
        ("modelopt", "nvfp4"),
    ],
)
def test_folders_of_other_dialects_stay_what_they_are(dialect, spec, tmp_path):
    """A folder for another program is baked in its own convention, described by the same configuration."""
    save_shards(tmp_path / "model")
    (tmp_path / "model" / "config.json").write_text('{"model_type": "x"}')
    with open_source(tmp_path / "model") as source:
        plan = make_plan(source, spec, preset="none", only=["blocks"], solver="rtn", dialect=dialect)
        convert(source, tmp_path / "out", plan)
    adapter, dense = lora(tmp_path / "lora.safetensors")

    report = bake_checkpoint(tmp_path / "out", tmp_path / "baked", adapter)

    before, after = decoded(tmp_path / "out"), decoded(tmp_path / "baked")
    assert (tmp_path / "out/config.json").read_text() == (tmp_path / "baked/config.json").read_text()
    assert all(layer.recovered > 0.9 for layer in report.layers.values())
    for name in before.keys() - dense.keys():
        assert torch.equal(after[name][1], before[name][1])


def test_the_result_does_not_depend_on_jobs_or_order(tmp_path):
    """The same file comes out bit for bit with one worker and with several, for both kinds of chance."""
    path = quantized(tmp_path, "awq_w4a16")
    adapter, _ = lora(tmp_path / "lora.safetensors")
    for rounding in ("stochastic", "error_feedback"):
        made = []
        for jobs in (1, 3):
            target = tmp_path / f"{rounding}{jobs}.safetensors"
            bake_checkpoint(path, target, adapter, rounding=rounding, seed=7, jobs=jobs)
            made.append(target.read_bytes())

        assert made[0] == made[1]


def test_older_spellings_are_written_anew(tmp_path):
    """A `scaled_fp8` file of ComfyUI is baked, too; its untouched layers keep codes and scales."""
    w = {name: model_tensors()[f"{name}.weight"].float() for name in ("blocks.0.up", "blocks.0.down")}
    tensors = {"scaled_fp8": torch.empty(0, dtype=torch.float8_e4m3fn)}
    for name, weight in w.items():
        scale = weight.abs().max() / 448
        tensors |= {f"{name}.weight": (weight / scale).to(torch.float8_e4m3fn), f"{name}.scale_weight": scale}
    save_file(tensors, tmp_path / "old.safetensors")
    adapter, dense = lora(tmp_path / "lora.safetensors", names=("blocks.0.up",))

    bake_checkpoint(tmp_path / "old.safetensors", tmp_path / "baked.safetensors", adapter)

    before, after = decoded(tmp_path / "old.safetensors"), decoded(tmp_path / "baked.safetensors")
    assert torch.equal(after["blocks.0.down"][1], before["blocks.0.down"][1])
    gained = after["blocks.0.up"][1] - before["blocks.0.up"][1]
    assert float((gained * dense["blocks.0.up"]).sum() / dense["blocks.0.up"].square().sum()) > 0.9


def test_what_cannot_work_is_refused_and_writes_nothing(tmp_path):
    """The input as target, another model's adapter, a wrong rounding, a strength that is no number."""
    path = quantized(tmp_path, "int8")
    adapter, _ = lora(tmp_path / "lora.safetensors")
    stray = {"nobody": LoraDelta(torch.ones(1, 4), torch.ones(4, 1))}
    before = files_below(tmp_path)
    target = tmp_path / "baked.safetensors"
    for to, what, options, kind, complaint in [
        (path, adapter, {}, WriteError, "is the input"),
        (target, stray, {}, CheckpointError, "none of its 1 layers"),
        (target, adapter, {"rounding": "low_rank"}, FormatError, "int8 has no low-rank branch"),
        (target, adapter, {"strength": float("inf")}, CheckpointError, "no finite number"),
        (target, tmp_path / "missing.safetensors", {}, CheckpointError, "missing.safetensors"),
    ]:
        with pytest.raises(kind, match=complaint):
            bake_checkpoint(path, to, what, **options)

    assert files_below(tmp_path) == before


@pytest.mark.parametrize("layer", ["blocks.0.up", "blocks.1.down"])
def test_a_change_that_is_not_finite_is_named_with_its_file(tmp_path, layer):
    """The adapter's file before the layer, quantized or not; changes that come from no file are told apart."""
    with open_source(save_model(tmp_path / "in.safetensors")) as opened:
        convert(opened, tmp_path / "q.safetensors", make_plan(opened, "int8", preset="none", only=["blocks.0"]))
    path, _ = lora(tmp_path / "lora.safetensors", names=[layer])
    tensors = load_file(path)
    tensors[f"diffusion_model.{layer}.lora_A.weight"][0, 0] = float("nan")
    save_file(tensors, path)
    broken = LoraDelta(*(tensors[f"diffusion_model.{layer}.lora_{part}.weight"] for part in "AB"))

    with pytest.raises(WeightError, match=rf"/lora\.safetensors: {layer}[.a-z]*: the change holds NaN"):
        bake_checkpoint(tmp_path / "q.safetensors", tmp_path / "baked.safetensors", path)
    with pytest.raises(WeightError, match=rf"^the adapter: {layer}[.a-z]*: the change holds NaN"):
        bake_checkpoint(tmp_path / "q.safetensors", tmp_path / "baked.safetensors", {layer: broken})


def test_loha_lokr_and_dora_are_baked_into_files(tmp_path):
    """By the names of LyCORIS, in one file: each layer moves by its change; a DoRA by that of the weight it finds."""
    path = quantized(tmp_path, "int8")
    before = decoded(path)
    n, k = before["blocks.0.up"][1].shape
    m = before["blocks.1.down"][1].shape[0]
    generator = torch.Generator().manual_seed(3)

    def rand(*shape):
        return torch.randn(shape, generator=generator) / 4

    hada = {f"hada_w{i}_{side}": rand(*s) for i in (1, 2) for side, s in (("a", (n, 4)), ("b", (4, k)))}
    lokr = {
        "lokr_w1": rand(4, 4) / 8,
        "lokr_w2_a": rand(n // 4, 4),
        "lokr_w2_b": rand(4, k // 4),
        "alpha": torch.ones(()),
    }
    rows = before["blocks.1.down"][1].norm(dim=1, keepdim=True)
    dora = {"lora_down.weight": rand(4, before["blocks.1.down"][1].shape[1]) / 8, "lora_up.weight": rand(m, 4)}
    dora["dora_scale"] = rows * (1 + 0.2 * torch.rand(rows.shape, generator=generator))
    layers = {"blocks.0.up": hada, "blocks.1.up": lokr, "blocks.1.down": dora}
    spelled = {f"lycoris_{name.replace('.', '_')}.{key}": t for name, ts in layers.items() for key, t in ts.items()}
    save_file({key: tensor.contiguous() for key, tensor in spelled.items()}, tmp_path / "lycoris.safetensors")

    report = bake_checkpoint(path, tmp_path / "baked.safetensors", tmp_path / "lycoris.safetensors")

    after = decoded(tmp_path / "baked.safetensors")
    full = before["blocks.1.down"][1] + dora["lora_up.weight"] @ dora["lora_down.weight"]
    wanted = {
        "blocks.0.up": (hada["hada_w1_a"] @ hada["hada_w1_b"]) * (hada["hada_w2_a"] @ hada["hada_w2_b"]),
        "blocks.1.up": torch.kron(lokr["lokr_w1"], lokr["lokr_w2_a"] @ lokr["lokr_w2_b"]) / 4,
        "blocks.1.down": dora["dora_scale"] * full / full.norm(dim=1, keepdim=True) - before["blocks.1.down"][1],
    }
    assert set(report.layers) == set(wanted)
    for name, change in wanted.items():
        gained = after[name][1] - before[name][1]
        assert float((gained * change).sum() / change.square().sum()) == pytest.approx(1, abs=0.05)
        assert float((gained - change).norm() / change.norm()) < 0.5


def test_a_quantized_kernel_takes_the_change_of_a_convolution(tmp_path):
    """A kernel that is stored as its matrix is found by its own shape, and moves by the kernel's change."""
    save_file({"conv.weight": torch.randn(16, 8, 3, 3)}, tmp_path / "in.safetensors")
    with open_source(tmp_path / "in.safetensors") as source:
        plan = make_plan(source, "int8", preset="none", layer_rules=[("conv", "int8")], solver="rtn")
        convert(source, tmp_path / "out.safetensors", plan)
    down, up = torch.randn(4, 8, 3, 3), torch.randn(16, 4, 1, 1) / 8
    save_file({"conv.lora_down.weight": down, "conv.lora_up.weight": up}, tmp_path / "lora.safetensors")

    bake_checkpoint(tmp_path / "out.safetensors", tmp_path / "baked.safetensors", tmp_path / "lora.safetensors")

    gained = decoded(tmp_path / "baked.safetensors")["conv"][1] - decoded(tmp_path / "out.safetensors")["conv"][1]
    change = up.flatten(1) @ down.flatten(1)
    assert float((gained - change).norm() / change.norm()) < 0.2


def test_a_dora_of_columns_does_not_go_on_with_a_file_of_rows(tmp_path):
    """What was written of one is no part of the other, although their tensors have the same values."""
    change = LoraDelta(torch.ones(2, 8), torch.ones(8, 2))
    by_row, by_column = (Adapter({"a": DoraDelta(change, torch.ones(8), by_row=side)}) for side in (True, False))

    assert adapter_digest(by_row) != adapter_digest(by_column)
    assert adapter_digest(by_row) == adapter_digest(by_row)


def test_a_digest_tells_rows_strengths_and_inner_scales():
    """Changes of the same tensors that mean other changes do not go on with each other's files."""
    lora, inner = LoraDelta(torch.ones(2, 8), torch.ones(8, 2)), LoraDelta(torch.ones(2, 8), torch.ones(8, 2), 2.0)
    thick = LohaDelta(lora, lora)
    changes = [
        lora,
        inner,
        thick,
        LohaDelta(inner, lora),
        LohaDelta(lora, inner),
        RowsDelta([(0, lora)], 24),
        RowsDelta([(8, lora)], 24),
        SumDelta([(thick, 1.0), (lora, 0.5)]),
        SumDelta([(thick, 0.5), (lora, 1.0)]),
        DoraDelta(SumDelta([(thick, 0.5), (lora, 1.0)]), torch.ones(8), by_row=True),
        DoraDelta(SumDelta([(thick, 1.0), (lora, 0.5)]), torch.ones(8), by_row=True),
    ]

    assert len({adapter_digest(Adapter({"a": change})) for change in changes}) == len(changes)
