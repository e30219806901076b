"""Banks of experts in files: each expert quantized for itself, one in memory at a time."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

import lowbit
from lowbit.checkpoint import convert_layer
from lowbit.checkpoint.convert import convert
from lowbit.checkpoint.dialects import dialects
from lowbit.checkpoint.plan import Plan, make_plan
from lowbit.checkpoint.source import Source, open_source
from lowbit.errors import PlanError, WeightError
from lowbit.experts import quantize_bank
from tests.support.bank_files import DOWN, FORMATS, UP, by_layer, module, planned, same_parts, tensors
from tests.support.tensors import outlier_weight


@pytest.fixture
def source(tmp_path):
    """The plain file, open."""
    save_file(tensors(), tmp_path / "in.safetensors")
    with open_source(tmp_path / "in.safetensors") as opened:
        yield opened


@pytest.mark.parametrize("spec", FORMATS)
def test_a_converted_bank_is_that_of_quantize_bank(spec, source, tmp_path):
    """Both orientations load as the banks that `quantize_bank` makes, each expert with scales of its own."""
    report = convert(source, tmp_path / "out.safetensors", planned(source, spec))
    root, held = module()
    lowbit.load(root, tmp_path / "out.safetensors", strict=False)

    plain = tensors()
    assert same_parts(held.gate_up_proj, quantize_bank(plain[UP], spec, solver="rtn"))
    assert same_parts(held.down_proj, quantize_bank(plain[DOWN], spec, solver="rtn", transposed=True))
    stored = load_file(tmp_path / "out.safetensors")
    marker = json.loads(stored[f"{DOWN}.comfy_quant"].numpy().tobytes())
    assert (marker["num_experts"], marker["bank_transposed"], marker["bank_parameter"]) == (4, True, True)
    assert torch.equal(stored[f"{UP}_bias"], plain[f"{UP}_bias"])
    assert {layer.layer: layer.shape for layer in report.layers}[DOWN] == (4, 128, 64)
    assert all(layer.accuracy.sqnr > 12 for layer in report.layers)


def test_the_plan_says_how_a_bank_is_taken(source, tmp_path):
    """The reason names the orientation and who says so; the plan survives its file, and its sizes are the file's."""
    plan = planned(source)
    found = by_layer(plan)

    assert found[UP].why.endswith("4 experts, each for itself, [E, N, K] as transformers documents")
    assert found[DOWN].why.endswith("[E, K, N] as --bank-transposed 'down_proj' says")
    assert (found[UP].axes, found[DOWN].axes) == ("E N K", "E K N")
    assert found[f"{UP}_bias"].why == "its name does not end in .weight"
    plan.save(tmp_path / "plan.json")
    assert Plan.load(tmp_path / "plan.json") == plan
    convert(source, tmp_path / "out.safetensors", Plan.load(tmp_path / "plan.json"))
    assert plan.bytes_after == sum(t.nbytes for t in load_file(tmp_path / "out.safetensors").values())


def test_a_family_says_how_its_banks_lie(tmp_path):
    """The banks of GPT-OSS are [E, K, N] without anybody saying so, and the reason names the preset."""
    names = ("self_attn.q_proj.weight", "self_attn.sinks", "mlp.experts.gate_up_proj")
    held = {f"model.layers.0.{name}": torch.ones(2, 64, 64) for name in names}
    save_file({**held, "model.embed_tokens.weight": torch.ones(9, 64)}, tmp_path / "in.safetensors")
    with open_source(tmp_path / "in.safetensors") as source:
        found = by_layer(make_plan(source, "int8"))["model.layers.0.mlp.experts.gate_up_proj"]
        unnamed = by_layer(make_plan(source, "int8", preset="none"))["model.layers.0.mlp.experts.gate_up_proj"]

    assert (found.axes, unnamed.axes) == ("E K N", "E N K")
    assert found.why.endswith("2 experts, each for itself, [E, K, N] as the preset gpt_oss says")


@pytest.mark.parametrize(
    ("name", "action"),
    [
        ("mlp.experts.down_proj", "quantize"),
        ("mlp.experts.down_proj.weight", "quantize"),
        ("block_sparse_moe.input_linear.weight", "keep"),
        ("experts.weight", "keep"),
        ("conv.weight", "keep"),
        ("mlp.experts.0.conv.weight", "keep"),
        ("mlp.down_proj", "keep"),
    ],
)
def test_only_known_names_are_banks_by_default(name, action, tmp_path):
    """A 3-D weight of another name may be a kernel, or a bank in any orientation: it stays unless a rule names it."""
    save_file({name: torch.randn(2, 64, 64), "other.weight": torch.randn(64, 64)}, tmp_path / "in.safetensors")
    with open_source(tmp_path / "in.safetensors") as source:
        found = {tensor.key: tensor for tensor in make_plan(source, "int8").tensors()}[name]
        ruled = {t.key: t for t in make_plan(source, "int8", layer_rules=[("^(?!other)", "int8")]).tensors()}[name]

    assert found.action == action
    if name == "mlp.down_proj":
        assert ruled.why == "its name does not end in .weight"
    else:
        assert (ruled.action, ruled.axes) == ("quantize", "O I ..." if "conv" in name else "E N K")


def test_wrong_orientations_and_formats(source):
    """A pattern that names no bank is an error; formats that need a bias leave banks alone, and say why."""
    message = f"--bank-transposed 'o_proj' matches no bank of experts; a bank's name is, for example, '{UP}'"
    with pytest.raises(PlanError, match=message):
        planned(source, bank_transposed=["o_proj"])
    spec = "svdquant_w4a4(rank=8,act_unsigned=true)"
    assert "which a bank has not" in by_layer(planned(source, spec))[UP].why


def test_other_dialects_keep_banks_or_refuse_them(source):
    """Without a place for a bank a dialect leaves it as it is, with the reason; where a rule names one it refuses."""
    for name in [name for name, dialect in dialects().items() if dialect.writes and name != "comfy"]:
        why = f"the dialect {name} has no place for a bank of experts"
        assert by_layer(planned(source, "int8", only=["experts"], dialect=name))[UP].why.startswith(why)
        with pytest.raises(PlanError, match=f"layer '{UP}' as int8.*: {why}"):
            planned(source, "int8", only=["nothing|up_proj"], dialect=name, layer_rules=[("up_proj", "int8")])


def test_one_expert_is_in_memory_at_a_time(tmp_path, monkeypatch):
    """The source is read expert by expert, and nothing that is made holds more than one."""
    save_file({key: tensor for key, tensor in tensors().items() if key in (UP, DOWN)}, tmp_path / "in.safetensors")
    solved, read = [], []
    real, rows = convert_layer.solve, Source.read_rows

    def solve(w, *arguments, **options):
        solved.append(tuple(w.shape))
        return real(w, *arguments, **options)

    def read_rows(self, component, key, start, stop):
        read.append((key, start, stop))
        return rows(self, component, key, start, stop)

    monkeypatch.setattr(convert_layer, "solve", solve)
    monkeypatch.setattr(Source, "read_rows", read_rows)
    monkeypatch.setattr(Source, "read", lambda _, *where: pytest.fail(f"{where[1]} is read as a whole"))
    with open_source(tmp_path / "in.safetensors") as source:
        convert(source, tmp_path / "out.safetensors", planned(source), jobs=1)

    assert solved == [(64, 128)] * 8
    assert sorted(read) == [(key, index, index + 1) for key in (DOWN, UP) for index in range(4)]


def test_an_expert_that_is_not_finite_is_named(tmp_path):
    """NaN in one expert is an error that names file, layer and expert; nothing is written."""
    plain = tensors()
    plain[UP][2, 5, 7] = torch.nan
    save_file(plain, tmp_path / "in.safetensors")
    refused = pytest.raises(WeightError, match=rf"in\.safetensors: layer '{UP}', expert 2")
    with open_source(tmp_path / "in.safetensors") as source, refused:
        convert(source, tmp_path / "out.safetensors", planned(source))
    assert not (tmp_path / "out.safetensors").exists()


def test_an_interrupted_conversion_goes_on(source, tmp_path, monkeypatch):
    """A bank that was not finished is made anew, a finished one is not; the bytes are those of a run in one go."""
    plan = planned(source)
    whole = convert(source, tmp_path / "whole.safetensors", plan)
    real, calls = convert_layer.solve, []

    def dies(*arguments, **options):
        calls.append(1)
        if len(calls) == 7:
            raise KeyboardInterrupt
        return real(*arguments, **options)

    with monkeypatch.context() as patch:
        patch.setattr(convert_layer, "solve", dies)
        with pytest.raises(KeyboardInterrupt):
            convert(source, tmp_path / "out.safetensors", plan, jobs=1)
    report = convert(source, tmp_path / "out.safetensors", plan)

    assert report.resumed >= 1
    assert (tmp_path / "out.safetensors").read_bytes() == (tmp_path / "whole.safetensors").read_bytes()
    assert [layer.accuracy for layer in report.layers] == [layer.accuracy for layer in whole.layers]


def test_stochastic_rounding_differs_between_experts(tmp_path):
    """With a seed each expert is rounded with numbers of its own, the same in every run."""
    one = outlier_weight(64, 128, dtype=torch.bfloat16)
    save_file({UP: torch.stack([one, one])}, tmp_path / "in.safetensors")
    with open_source(tmp_path / "in.safetensors") as source:
        for name in ("a", "b"):
            convert(source, tmp_path / f"{name}.safetensors", make_plan(source, "int8", solver="rtn"), seed=5)
    codes = load_file(tmp_path / "a.safetensors")[f"{UP}.weight"]

    assert (tmp_path / "a.safetensors").read_bytes() == (tmp_path / "b.safetensors").read_bytes()
    assert not torch.equal(codes[0], codes[1])
