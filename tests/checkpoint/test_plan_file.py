"""A plan survives being written, edited and read, and runs only where it fits; other files are refused in words."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file

from lowbit.checkpoint.convert import convert
from lowbit.checkpoint.plan import Plan, make_plan
from lowbit.errors import PlanError
from tests.checkpoint.test_plan import opened
from tests.support.checkpoints import model_tensors


def test_json_round_trip(source, tmp_path):
    """A plan written and read is the same plan; its file has one line a tensor."""
    plan = make_plan(source, "nvfp4", preset="none")
    path = tmp_path / "plan.json"
    plan.save(path)

    assert Plan.load(path) == plan
    assert Plan.from_json(json.loads(json.dumps(plan.to_json()))) == plan
    for key in model_tensors():
        assert sum(json.dumps(key) + ": {" in line for line in path.read_text().splitlines()) == 1


def test_an_edited_plan_is_what_runs(source, tmp_path):
    """Changing a layer's format, keeping one and dropping one in the file changes exactly these in the output."""
    path = tmp_path / "plan.json"
    make_plan(source, "fp8_e4m3", preset="none").save(path)
    data = json.loads(path.read_text())
    tensors = data["components"][""]["tensors"]
    tensors["blocks.0.up.weight"] |= {"format": "int8", "solver": "scale_search"}
    tensors["blocks.1.up.weight"]["action"] = "keep"
    tensors["steps"]["action"] = "drop"
    path.write_text(json.dumps(data))
    convert(source, tmp_path / "out.safetensors", Plan.load(path))
    out = load_file(tmp_path / "out.safetensors")

    assert out["blocks.0.up.weight"].dtype == torch.int8
    assert torch.equal(out["blocks.1.up.weight"], model_tensors()["blocks.1.up.weight"])
    assert "steps" not in out
    assert out["blocks.2.up.weight"].dtype == torch.float8_e4m3fn


@pytest.mark.parametrize(
    ("key", "change", "complaint"),
    [
        ("blocks.0.up.weight", {"action": "squash"}, "action is 'squash', expected one of quantize, keep, drop"),
        ("blocks.0.up.weight", {"format": "fp9"}, "unknown format 'fp9'"),
        ("blocks.0.up.weight", {"format": ""}, "blocks.0.up.weight"),
        ("blocks.0.up.weight", {"solver": "luck"}, "unknown solver 'luck'"),
        ("blocks.0.up.weight", {"formt": "int8"}, "has no field 'formt'"),
        ("blocks.0.up.weight", {"shape": "192x128"}, "shape is '192x128'"),
        ("blocks.0.up.weight", {"shape": [2**40, 2**40]}, "shape is .*, expected a list of sizes"),
        ("blocks.0.up.weight", {"dtype": "bf16"}, "dtype 'bf16' is unknown"),
        ("blocks.0.up.weight", {"why": 3}, "why is 3, expected text"),
        ("blocks.0.up.weight", {"format": "int8(pre_quant_scale=true)"}, "start with awq, as in awq"),
        ("ragged.weight", {"format": "awq_w4a16"}, r"cannot become awq_w4a16: \[64, 100\]"),
        (
            "patch.weight",
            {"action": "quantize", "format": "int8", "solver": "rtn", "axes": ""},
            r"cannot become int8: \[8, 4, 2, 2\] has 4 axes",
        ),
        ("steps", {"action": "quantize", "format": "int8", "solver": "rtn"}, "cannot become int8: .*int64 values"),
    ],
)
def test_a_wrong_entry_is_one_clear_error(source, tmp_path, key, change, complaint):
    """A mistake in a plan file is refused with the file, the tensor and what is expected."""
    data = make_plan(source, "fp8_e4m3", preset="none").to_json()
    data["components"][""]["tensors"][key] |= change
    (tmp_path / "plan.json").write_text(json.dumps(data))

    with pytest.raises(PlanError, match=complaint) as caught:
        Plan.load(tmp_path / "plan.json")
    assert "plan.json" in str(caught.value)
    assert key in str(caught.value)


@pytest.mark.parametrize(
    ("text", "complaint"),
    [("{", "is not JSON"), ("[]", "not an object"), ("{}", "is no lowbit plan of version 1"),
     ('{"lowbit_plan": 1, "components": 3}', "'components' must be an object"),
     ('{"lowbit_plan": 1, "components": {}, "colour": 1}', "has no field 'colour'"),
     ('{"lowbit_plan": 1, "components": {"": {}}}', "'tensors' by key"),
     ('{"lowbit_plan": 1, "components": {"": {"tensors": {"a": 1}}}}', "tensor 'a': must be an object"),
     ('{"lowbit_plan": 1, "components": {}, "components": {}}', "'components' stands twice")],
)  # fmt: skip
def test_a_file_that_is_no_plan_is_refused(tmp_path, text, complaint):
    """Whatever else is given as a plan file is refused with the file's name and the reason."""
    (tmp_path / "plan.json").write_text(text)
    with pytest.raises(PlanError, match=rf"plan\.json.*{complaint}"):
        Plan.load(tmp_path / "plan.json")


def test_a_missing_plan_file_is_refused(tmp_path):
    """A plan file that is not there gives its path."""
    with pytest.raises(PlanError, match=r"nowhere\.json: the plan cannot be read"):
        Plan.load(tmp_path / "nowhere.json")


def test_a_plan_for_another_checkpoint_is_refused(source, tmp_path):
    """A plan runs only on tensors of the very names, shapes and dtypes it was made for."""
    plan = make_plan(source, "fp8_e4m3", preset="none")
    changed = {
        "one more": model_tensors() | {"more": torch.ones(1)},
        "one less": {k: v for k, v in model_tensors().items() if k != "steps"},
        "another shape": model_tensors() | {"steps": torch.arange(11)},
        "another dtype": model_tensors() | {"steps": torch.arange(10).float()},
    }
    for name, tensors in changed.items():
        with opened(tmp_path / "other.safetensors", tensors) as other, pytest.raises(PlanError, match="plan anew"):
            convert(other, tmp_path / "out.safetensors", plan)
        assert not (tmp_path / "out.safetensors").exists(), name
