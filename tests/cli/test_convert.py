"""`lowbit plan` and `lowbit convert`."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from lowbit.checkpoint import source
from lowbit.cli import convert as convert_command
from tests.cli.conftest import tiny_model

SPEC = "fp8_e4m3(granularity=row)"


def test_convert_writes_a_checked_file_and_says_what_it_did(lowbit, model, tmp_path):
    """The output is there, loads, and the text names its size and the layers that lost most."""
    out = tmp_path / "out.safetensors"

    done = lowbit("convert", model, "-o", out, "--format", SPEC)

    assert done.code == 0
    assert "6 layers quantized, 9 tensors kept" in done.out
    assert "layers that lost most" in done.out
    assert "dB" in done.out
    with source.open_source(out) as opened:
        assert opened.read("", "blocks.0.attn.q.weight").dtype == torch.float8_e4m3fn


def test_convert_is_quiet_on_stderr_when_that_is_no_terminal(lowbit, model, tmp_path):
    """Neither the progress line nor anything else goes to a stderr that nobody watches."""
    assert lowbit("convert", model, "-o", tmp_path / "out.safetensors", "--format", "int8").err == ""


def test_convert_as_json_is_one_document(lowbit, model, tmp_path):
    """--json gives every layer with its accuracy, the totals and nothing else on stdout."""
    out = tmp_path / "out.safetensors"

    report = lowbit("convert", model, "-o", out, "--format", "nvfp4", "--json").json

    assert report["target"] == str(out)
    assert len(report["layers"]) == 6
    assert all(layer["accuracy"]["sqnr"] > 18 for layer in report["layers"])
    assert report["plan"]["quantize"] == 6
    assert report["bytes_after"] < report["bytes_before"]


def test_options_choose_format_by_layer(lowbit, model, tmp_path):
    """--keep, --only and --layer decide as they say, a rule with fields and commas in its format included."""
    arguments = [
        "--only",
        "blocks",
        "--keep",
        "blocks.0.",
        "--layer",
        "mlp.down=int8(granularity=tensor,activations=none)",
    ]

    report = lowbit("convert", model, "-o", tmp_path / "out.safetensors", "--format", SPEC, *arguments, "--json").json

    formats = {layer["layer"]: layer["format"] for layer in report["layers"]}
    assert formats == {
        "blocks.1.attn.q": SPEC,
        "blocks.1.mlp.up": SPEC,
        "blocks.1.mlp.down": "int8(granularity=tensor,activations=none)",
    }


def test_convolutions_and_banks_are_converted_as_asked(lowbit, tmp_path):
    """--convolutions takes kernels in, --bank-transposed says how a bank lies; both are shown, verified and decoded."""
    tensors = {"conv.weight": torch.randn(64, 32, 2, 2), "mlp.experts.down_proj": torch.randn(2, 64, 64)}
    save_file(tensors, tmp_path / "in.safetensors")
    wishes = ("--format", "int8", "--convolutions", "--bank-transposed", "down_proj")

    shown = lowbit("plan", tmp_path / "in.safetensors", *wishes, "--json").json["components"][""]["tensors"]
    done = lowbit("convert", tmp_path / "in.safetensors", "-o", tmp_path / "out.safetensors", *wishes, "--json").json
    seen = lowbit("inspect", tmp_path / "out.safetensors").out
    lowbit("verify", tmp_path / "in.safetensors", tmp_path / "out.safetensors")
    lowbit("dequantize", tmp_path / "out.safetensors", "-o", tmp_path / "plain.safetensors")

    assert {name: tensor["axes"] for name, tensor in shown.items()} == {
        "conv.weight": "O I ...",
        "mlp.experts.down_proj": "E K N",
    }
    assert sorted(layer["shape"] for layer in done["layers"]) == [[2, 64, 64], [64, 32, 2, 2]]
    assert "64x32x2x2" in seen
    plain = load_file(tmp_path / "plain.safetensors")
    assert {name: tensor.shape for name, tensor in plain.items()} == {k: t.shape for k, t in tensors.items()}


def test_solver_is_taken(lowbit, model, tmp_path):
    """--solver rtn is what is used and reported."""
    report = lowbit(
        "convert", model, "-o", tmp_path / "o.safetensors", "--format", "nvfp4", "--solver", "rtn", "--json"
    ).json

    assert {layer["solver"] for layer in report["layers"]} == {"rtn"}


@pytest.mark.parametrize("spec", ["int8", "nvfp4", "mxfp4"])
def test_seed_makes_stochastic_rounding_repeatable(lowbit, model, tmp_path, spec):
    """The same seed gives the same bytes with any number of threads, another one others."""
    files = [tmp_path / f"{name}.safetensors" for name in "abc"]
    for path, seed, jobs in zip(files, (1, 1, 2), (1, 3, 1), strict=True):
        assert lowbit("convert", model, "-o", path, "--format", spec, "--seed", seed, "--jobs", jobs).code == 0

    assert files[0].read_bytes() == files[1].read_bytes()
    assert files[0].read_bytes() != files[2].read_bytes()


def test_without_verification_nothing_is_claimed(lowbit, model, tmp_path):
    """--no-verify reports no accuracy, and says so."""
    done = lowbit("convert", model, "-o", tmp_path / "out.safetensors", "--format", "int8", "--no-verify")

    assert done.code == 0
    assert "nothing was read back" in done.out


def test_plan_shows_what_would_happen_and_touches_nothing(lowbit, model, tmp_path):
    """The dry run groups layers of all blocks, gives reasons and sizes, and writes no file."""
    done = lowbit("plan", model, "--format", "nvfp4")

    assert done.code == 0
    assert "blocks.*.attn.q " in done.out
    assert "nvfp4 by scale_search" in done.out
    assert "fewer than 4096 weights" in done.out
    assert [path.name for path in tmp_path.iterdir()] == ["model.safetensors"]


def test_plan_as_json_has_every_tensor_and_the_totals(lowbit, model):
    """--json is the plan itself, with totals."""
    plan = lowbit("plan", model, "--format", "int8", "--json").json

    assert len(plan["components"][""]["tensors"]) == 15
    assert plan["totals"]["quantize"] == 6


def test_a_plan_can_be_written_edited_and_run(lowbit, model, tmp_path):
    """What the edited plan file says is what is done."""
    file, out = tmp_path / "plan.json", tmp_path / "out.safetensors"
    assert lowbit("plan", model, "--format", "int8", "-o", file).code == 0
    plan = json.loads(file.read_text())
    plan["components"][""]["tensors"]["blocks.0.attn.q.weight"]["format"] = "fp8_e5m2"
    file.write_text(json.dumps(plan))

    report = lowbit("convert", model, "-o", out, "--plan", file, "--json").json

    formats = {layer["layer"]: layer["format"] for layer in report["layers"]}
    assert formats.pop("blocks.0.attn.q") == "fp8_e5m2"
    assert set(formats.values()) == {"int8(rotation=64)"}


def test_a_plan_file_and_options_that_contradict_it_are_refused(lowbit, model, tmp_path):
    """A plan says it all: options beside it would be ignored, so they are an error that names them."""
    done = lowbit(
        "convert", model, "-o", tmp_path / "o.safetensors", "--plan", tmp_path / "plan.json", "--format", "int8"
    )

    assert done.code == 2
    assert "--format: the plan file says this already" in done.err


def test_report_is_a_page_that_stands_alone(lowbit, model, tmp_path):
    """--report writes one HTML file with every layer and no link to anywhere."""
    report = tmp_path / "report.html"

    done = lowbit("convert", model, "-o", tmp_path / "out.safetensors", "--format", "nvfp4", "--report", report)

    text = report.read_text(encoding="utf-8")
    assert done.code == 0
    assert "blocks.1.mlp.down" in text
    assert "fewer than 4096 weights" in text
    assert "http" not in text
    assert "<script" not in text


def test_an_interrupt_says_that_the_run_can_go_on(lowbit, model, tmp_path, monkeypatch):
    """Ctrl-C ends with 130 and one line; with --no-resume nothing is promised."""

    def interrupted(*args, **kwargs):
        (tmp_path / "out.safetensors.partial").touch()  # as a run that has begun to write leaves it
        raise KeyboardInterrupt

    monkeypatch.setattr(convert_command, "run", interrupted)
    arguments = ["convert", model, "-o", tmp_path / "out.safetensors", "--format", "int8"]

    first, second = lowbit(*arguments), lowbit(*arguments, "--no-resume")

    assert (first.code, second.code) == (130, 130)
    assert "run the same command again" in first.err
    assert second.err == "interrupted\n"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--format", "int9"], "known formats: awq_w4a16, convrot_w4a4"),
        (["--format", "int8(granularity=column)"], "expected one of tensor, row, block"),
        (["--format", "int8", "--solver", "magic"], "known solvers: auto, "),
        (["--format", "int8", "--preset", "magic"], "flux"),
        (["--format", "int8", "--dialect", "magic"], "known dialects: awq, bfl"),
        (["--format", "int8", "--layer", "attn"], "write it as REGEX=FORMAT"),
        (["--format", "int8", "--layer", "attn=int9"], "known formats"),
        (["--format", "int8", "--keep", "("], "no regular expression"),
        (["--format", "int8", "--keep", "nothing_has_this_name"], "matches no layer"),
        (["--format", "awq_w4a16(group_size=7)"], "the plan quantizes nothing"),
        (["--format", "int8", "--solver", "svdquant"], "int8 has no low-rank branch, so svdquant does not apply"),
        (["--format", "int8", "--lora-rank", "32"], "--lora-rank is of the LoRA that --error-lora writes"),
        (["--format", "int8", "--lora-layers", "x"], "--lora-layers is of the LoRA that --error-lora writes"),
        (["--format", "int8", "--error-lora", "l.safetensors", "--lora-layers", "nothing"], "matches no layer that is"),
        (["--format", "int8", "--error-lora", "l.safetensors", "--lora-layers", "("], "no regular expression"),
        (["--format", "int8", "--lora-prefix", "x."], "--lora-prefix is of the LoRA that --error-lora writes"),
        ([], "--format"),
    ],
)
def test_wrong_options_end_with_2_and_name_the_choices(lowbit, model, tmp_path, arguments, message):
    """An option's value that cannot be gives one line on stderr with what could be, and writes nothing."""
    done = lowbit("convert", model, "-o", tmp_path / "out.safetensors", *arguments)

    assert done.code == 2
    assert message in done.err
    assert done.err.startswith("error: ")
    assert done.err.count("\n") == 1
    assert [path.name for path in tmp_path.iterdir()] == ["model.safetensors"]


def test_a_dry_run_is_the_plan(lowbit, model, tmp_path):
    """The option that other programs have names the command that shows what would be done, before anything else."""
    for arguments in ((model,), (model, "-o", tmp_path / "out.safetensors", "--format", "int8")):
        done = lowbit("convert", *arguments, "--dry-run", "--json")
        assert done.code == 2
        assert "`lowbit plan` shows what would be done" in done.json["error"]
    assert [path.name for path in tmp_path.iterdir()] == ["model.safetensors"]
    assert "--dry-run" not in lowbit("convert", "--help").out


def test_each_command_names_what_it_takes_instead_of_a_format(lowbit, model, tmp_path):
    """`plan` has no --plan, and `convert` no target."""
    planned, converted = lowbit("plan", model).err, lowbit("convert", model, "-o", tmp_path / "o.safetensors").err

    assert "--format SPEC, or what to reach with --target-size or --target-sqnr;" in planned
    assert "--plan" not in planned
    assert "--format SPEC, or give a plan with --plan FILE;" in converted


def test_a_layout_is_written_behind_an_at_sign(lowbit, tmp_path):
    """Format option and layer rule take it, and inspect shows what the file holds; verify and dequantize read it."""
    model = tiny_model(tmp_path / "m.safetensors", big__weight=torch.ones(128, 128, dtype=torch.bfloat16))
    out, spec = tmp_path / "out.safetensors", "svdquant_w4a4(rank=8)@kitchen_tile_packed_w4a4"

    done = lowbit("convert", model, "-o", out, "--format", "int8", "--layer", f"up|big={spec}", "--json")

    assert done.code == 0, done.err
    assert load_file(out)["blocks.0.mlp.up.weight"].shape == (1, 1, 32, 128)
    groups = {group["format"] for group in lowbit("inspect", out, "--json").json["groups"]}
    assert spec in groups
    assert lowbit("verify", model, out, "--min-sqnr", "15").code == 0
    assert lowbit("dequantize", out, "-o", tmp_path / "plain.safetensors").code == 0


def test_a_device_that_is_not_there_is_refused_first(lowbit, model, tmp_path):
    """By convert and plan, before anything is read; without a target a plan solves nothing, on no device."""
    output = tmp_path / "x.safetensors"
    for command, *rest in (("convert", "-o", output, "--format", "int8"), ("plan", "--target-size", "0.6x")):
        done = lowbit(command, tmp_path / "none.safetensors", *rest, "--device", "cuda:99")
        assert done.code == 2
        assert "device 'cuda:99': cannot be used" in done.err
    idle = lowbit("plan", model, "--format", "int8", "--device", "cuda")
    assert idle.code == 2
    assert "--device" in idle.err
    assert not output.exists()
