"""Every kind of bad input that a converter meets: one clear error or a stated result, and the target untouched."""

from __future__ import annotations

import errno
import json
import os
import signal
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file, save, save_file

from lowbit.checkpoint import writer as writer_module
from lowbit.checkpoint.convert import convert
from lowbit.checkpoint.plan import make_plan
from lowbit.checkpoint.quantized_source import look_for_layers
from lowbit.checkpoint.source import open_source
from lowbit.errors import CheckpointError, LowbitError, PlanError, WeightError, WriteError
from tests.support.checkpoints import files_below, model_tensors, save_model, save_shards
from tests.support.specs import SMALL_SPECS

OLD = b"what was there before"


def run(path, target, spec="fp8_e4m3", **options):
    """Open, plan and convert, as a user's call does."""
    with open_source(path) as source:
        return convert(source, target, make_plan(source, spec, preset="none", solver="rtn", **options))


def refused(path, target, complaint, kind=LowbitError, **options):
    """The conversion fails with one error that says `complaint`; the target keeps its old bytes and nothing is left."""
    target.write_bytes(OLD)
    before = set(target.parent.iterdir())
    with pytest.raises(kind, match=complaint):
        run(path, target, **options)
    assert target.read_bytes() == OLD
    assert set(target.parent.iterdir()) == before


@pytest.fixture
def out(tmp_path):
    """A target in a folder of its own."""
    (tmp_path / "out").mkdir()
    return tmp_path / "out" / "model.safetensors"


def rewritten(path, change) -> None:
    """Change the JSON header of a safetensors file in place."""
    raw = path.read_bytes()
    length = int.from_bytes(raw[:8], "little")
    header = json.loads(raw[8 : 8 + length])
    change(header)
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + raw[8 + length :])


def test_truncated_file(tmp_path, out):
    """A file that ends early is refused and never read as zeros, wherever it was cut."""
    path = save_model(tmp_path / "in.safetensors")
    whole = path.read_bytes()
    for size in (len(whole) - 1, len(whole) // 2):
        path.write_bytes(whole[:size])
        refused(path, out, r"in\.safetensors: is truncated", CheckpointError)
    for size, complaint in ((100, "header should have"), (7, "only 7 bytes"), (0, "is empty")):
        path.write_bytes(whole[:size])
        refused(path, out, complaint, CheckpointError)


def test_header_longer_than_the_file(tmp_path, out):
    """A header length beyond the end of the file is refused."""
    path = tmp_path / "in.safetensors"
    path.write_bytes((1 << 40).to_bytes(8, "little") + b"{}")
    refused(path, out, "the header should have 1099511627776 bytes", CheckpointError)


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        (lambda h: h["tiny.weight"].update(data_offsets=[0, 256]), "overlap"),
        (lambda h: h["steps"].update(dtype="I65"), "I65"),
        (lambda h: h["steps"].update(dtype="F4", shape=[160]), "'F4', which torch has no type for"),
        (lambda h: h["steps"].update(shape=[11]), "holds 80 bytes"),
        (lambda h: h.update(__metadata__={"n": 1}), "__metadata__ must map names to strings"),
    ],
)
def test_damaged_header(tmp_path, out, change, complaint):
    """Overlapping offsets, an unknown dtype, a wrong shape and bad metadata are each refused by name."""
    path = save_model(tmp_path / "in.safetensors")
    rewritten(path, change)
    refused(path, out, complaint, CheckpointError)


def test_two_tensors_of_one_name(tmp_path, out):
    """A header that has a name twice is refused: one of the two layers would be lost."""
    entry = '"a.weight":{"dtype":"F32","shape":[64,64],"data_offsets":[%d,%d]}'
    text = ("{" + entry % (0, 16384) + "," + entry % (16384, 32768) + "}").encode()
    path = tmp_path / "in.safetensors"
    path.write_bytes(len(text).to_bytes(8, "little") + text + bytes(32768))
    refused(path, out, r"'a\.weight' twice: two layers with one name", CheckpointError)


def test_marker_that_is_not_json(tmp_path, out):
    """A marker whose bytes are no JSON is refused with its name."""
    marker = torch.tensor(list(b"{format"), dtype=torch.uint8)
    path = save_model(tmp_path / "in.safetensors", blocks__0__up__comfy_quant=marker)
    refused(path, out, r"'blocks\.0\.up\.comfy_quant' cannot be read: it is not JSON", CheckpointError)


def test_marker_without_weight(tmp_path, out):
    """A marker for a layer that has no weight is refused with the layer's name."""
    marker = torch.tensor(list(b'{"format": "float8_e4m3fn"}'), dtype=torch.uint8)
    path = save_model(tmp_path / "in.safetensors", ghost__comfy_quant=marker)
    refused(path, out, r"layer 'ghost': .* there is no tensor 'ghost\.weight'", CheckpointError)


@pytest.mark.parametrize("spec", SMALL_SPECS)
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_weight_that_is_not_finite(tmp_path, out, spec, bad):
    """NaN or infinity anywhere in a weight is refused with file and layer in every format, and leaves nothing."""
    w = model_tensors()["blocks.1.down.weight"]
    w[127, 191] = bad
    path = save_model(tmp_path / "in.safetensors", blocks__1__down__weight=w)
    refused(path, out, r"in\.safetensors: layer 'blocks\.1\.down': holds NaN or infinity", WeightError, spec=spec)


@pytest.mark.parametrize("spec", SMALL_SPECS)
def test_all_zero_layers(tmp_path, out, spec):
    """A layer of zeros is converted and decodes to zeros."""
    path = save_model(tmp_path / "in.safetensors", blocks__1__down__weight=torch.zeros(128, 192).bfloat16())
    report = run(path, out, spec)
    with open_source(out) as source:
        held = look_for_layers(source, source.components[0])
        w, _ = held.dequantized(held.layers["blocks.1.down"], torch.float32)

    assert torch.equal(w, torch.zeros(128, 192))
    assert next(x for x in report.layers if x.layer == "blocks.1.down").accuracy.sqnr == float("inf")


def test_quantized_input(tmp_path, out):
    """Input that is quantized already is refused, marked or not: its codes are no weights."""
    run(save_model(tmp_path / "in.safetensors"), tmp_path / "fp8.safetensors")
    refused(tmp_path / "fp8.safetensors", out, "is quantized already", PlanError)
    tensors = load_file(tmp_path / "fp8.safetensors")
    save_file({k: v for k, v in tensors.items() if not k.endswith("comfy_quant")}, tmp_path / "bare.safetensors")
    refused(tmp_path / "bare.safetensors", out, "look like quantized weights", CheckpointError)


@pytest.mark.parametrize("how", ["same", "link", "hard link", "dots"])
def test_output_is_the_input(tmp_path, how):
    """The input is refused as the output, also through links and other spellings of its path, and stays as it is."""
    path = save_model(tmp_path / "in.safetensors")
    target = {"same": path, "dots": tmp_path / ".." / tmp_path.name / "in.safetensors"}.get(
        how, tmp_path / "l.safetensors"
    )
    if how == "link":
        target.symlink_to(path)
    if how == "hard link":
        os.link(path, target)
    before = path.read_bytes()
    with pytest.raises(WriteError, match="is the input"):
        run(path, target)
    assert path.read_bytes() == before


def test_no_space_left(tmp_path, out, monkeypatch):
    """A full disk is one error that says how much is needed; it is found before work starts."""

    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(writer_module, "reserve", full)
    refused(save_model(tmp_path / "in.safetensors"), out, "no space left: .* MB in all", WriteError)


def test_no_space_left_in_mid_run(tmp_path, out, monkeypatch):
    """A disk that fills up during the run is one error, and the target stays."""
    calls = []

    def full(*arguments):
        calls.append(arguments)
        if len(calls) > 8:
            raise OSError(errno.ENOSPC, "No space left on device")
        return honest(*arguments)

    honest = writer_module.write_all
    monkeypatch.setattr(writer_module, "write_all", full)
    out.write_bytes(OLD)
    with pytest.raises(WriteError, match="no space left"):
        run(save_model(tmp_path / "in.safetensors"), out)
    assert out.read_bytes() == OLD


def test_unwritable_folder(tmp_path, out):
    """A folder without write permission is refused before work starts."""
    path = save_model(tmp_path / "in.safetensors")
    out.parent.chmod(0o500)
    if os.access(out.parent, os.W_OK):
        pytest.skip("this user may write anywhere")
    try:
        with pytest.raises(WriteError, match="check its permissions"):
            run(path, out)
    finally:
        out.parent.chmod(0o700)


def test_missing_folder(tmp_path):
    """A target in a folder that does not exist is refused with that folder's name."""
    with pytest.raises(WriteError, match="nowhere is no folder that exists"):
        run(save_model(tmp_path / "in.safetensors"), tmp_path / "nowhere" / "out.safetensors")


def test_index_that_leaves_its_folder(tmp_path):
    """An index that names a file outside its folder is refused before that file is opened."""
    save_model(tmp_path / "secret.safetensors")
    index = save_shards(tmp_path / "in")
    data = json.loads(index.read_text())
    for name in ("../secret.safetensors", str(tmp_path / "secret.safetensors")):
        data["weight_map"]["steps"] = name
        index.write_text(json.dumps(data))
        with pytest.raises(CheckpointError, match="outside the folder"):
            run(index, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_rows_from_none_up(tmp_path, out):
    """A weight without rows is kept; one of a single row is quantized and decodes with the right shape."""
    tensors = {"none.weight": torch.zeros(0, 128), "one.weight": torch.randn(1, 8192)}
    save_file(tensors, tmp_path / "in.safetensors")
    for spec in ("fp8_e4m3(granularity=row)", "int8", "nvfp4", "mxfp8", "awq_w4a16", "svdquant_w4a4(rank=1)"):
        run(tmp_path / "in.safetensors", out, spec)
        with open_source(out) as source:
            held = look_for_layers(source, source.components[0])
            assert list(held.layers) == ["one"]
            assert held.dequantized(held.layers["one"], torch.float32)[0].shape == (1, 8192)
            assert held.specs["none.weight"].shape == (0, 128)


def test_nothing_that_can_be_quantized(tmp_path, out):
    """A file of convolutions and vectors is an error that gives the reasons, not a copy called a success."""
    save_file({"a.weight": torch.randn(8, 8, 3, 3), "b": torch.randn(9)}, tmp_path / "in.safetensors")
    refused(
        tmp_path / "in.safetensors",
        out,
        r"in.safetensors: the plan quantizes nothing; the reasons are: 1-D; 4-D weight \(convolution\)",
        PlanError,
    )


@pytest.mark.parametrize(
    ("start", "kind"),
    [(b"GGUF\x03", "GGUF"), (b"PK\x03\x04", "pickle"), (b"\x80\x02}", "pickle"), (b"version ", "LFS")],
)
def test_another_kind_of_file_under_our_name(tmp_path, out, start, kind):
    """A file that begins as a GGUF file, a pickle or a Git LFS pointer is named as that, not called truncated."""
    (tmp_path / "in.safetensors").write_bytes(start + bytes(range(100)))
    refused(tmp_path / "in.safetensors", out, f"in.safetensors: is an? .*{kind}.* no safetensors file", CheckpointError)


def test_pickle(tmp_path, out):
    """A pickle is refused by its name, without being opened."""
    (tmp_path / "model.ckpt").write_bytes(save(model_tensors()))
    refused(tmp_path / "model.ckpt", out, "never pickle", CheckpointError)


# ---- interrupted runs
# ---------------------------------------------------------------------------------------------------

KILLED = """
import os, signal, sys
from lowbit.checkpoint.convert import convert
from lowbit.checkpoint.plan import make_plan
from lowbit.checkpoint.source import open_source
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background job would ignore it
path, target, pieces, number, jobs = sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4]), int(sys.argv[5])
finished = []
def progress(done, total, name):
    finished.append(name)
    if len(finished) == pieces:
        os.kill(os.getpid(), number)
with open_source(path) as source:
    convert(source, target, make_plan(source, "nvfp4", preset="none"), progress=progress, jobs=jobs)
"""


def killed(path, target, pieces, number=signal.SIGKILL, jobs=1):
    """Run a conversion in a process that gets a signal after some pieces of work."""
    command = [sys.executable, "-c", KILLED, str(path), str(target), str(pieces), str(int(number)), str(jobs)]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)


@pytest.mark.skipif(sys.platform == "win32", reason="no SIGKILL")
@pytest.mark.parametrize(("pieces", "jobs"), [(1, 1), (4, 1), (6, 2)])
def test_killed_and_resumed(tmp_path, out, pieces, jobs):
    """After kill -9 the target is untouched; the next run does only what is missing, and ends with the same bytes."""
    path = save_model(tmp_path / "in.safetensors")
    with open_source(path) as source:
        plan = make_plan(source, "nvfp4", preset="none")
        whole = convert(source, tmp_path / "whole.safetensors", plan)
        out.write_bytes(OLD)
        assert killed(path, out, pieces, jobs=jobs).returncode == -signal.SIGKILL
        assert out.read_bytes() == OLD
        report = convert(source, out, plan)

    assert report.resumed >= pieces
    assert out.read_bytes() == (tmp_path / "whole.safetensors").read_bytes()
    assert [layer.accuracy for layer in report.layers] == [layer.accuracy for layer in whole.layers]
    assert list(out.parent.iterdir()) == [out]


@pytest.mark.skipif(sys.platform == "win32", reason="no SIGKILL")
def test_killed_folder_and_resumed(tmp_path):
    """A folder being written appears only when it is complete, and a killed run of it is resumed too."""
    index = save_shards(tmp_path / "in")
    with open_source(index) as source:
        plan = make_plan(source, "nvfp4", preset="none")
        convert(source, tmp_path / "whole", plan)
        assert killed(index, tmp_path / "out", 3).returncode == -signal.SIGKILL
        assert not (tmp_path / "out").exists()
        report = convert(source, tmp_path / "out", plan)

    assert report.resumed >= 3
    assert files_below(tmp_path / "out") == files_below(tmp_path / "whole")
    assert not (tmp_path / "out.partial").exists()


@pytest.mark.skipif(sys.platform == "win32", reason="signals differ")
def test_interrupted_from_the_keyboard(tmp_path, out):
    """Control-C ends the run with the work kept; the next run goes on from there."""
    path = save_model(tmp_path / "in.safetensors")
    ended = killed(path, out, 3, signal.SIGINT)
    assert ended.returncode != 0
    assert "KeyboardInterrupt" in ended.stderr
    assert not out.exists()
    with open_source(path) as source:
        assert convert(source, out, make_plan(source, "nvfp4", preset="none")).resumed >= 3


@pytest.mark.skipif(sys.platform == "win32", reason="no SIGKILL")
@pytest.mark.parametrize("change", ["source", "plan", "resume=False"])
def test_other_work_is_not_resumed(tmp_path, out, change):
    """What was begun from another source or by another plan, or is not wanted, is not mixed into the result."""
    path = save_model(tmp_path / "in.safetensors")
    killed(path, out, 4)
    if change == "source":
        save_model(path, seed=9)
    with open_source(path) as source:
        plan = make_plan(source, "nvfp4", preset="none", keep=["blocks.0.up"] if change == "plan" else [])
        report = convert(source, out, plan, resume=change != "resume=False")
        convert(source, tmp_path / "whole.safetensors", plan)

    assert report.resumed == 0
    assert out.read_bytes() == (tmp_path / "whole.safetensors").read_bytes()


def test_foreign_files_in_the_staging_folder(tmp_path):
    """A folder that happens to have the name of the staging folder is refused, and its files stay."""
    index = save_shards(tmp_path / "in")
    (tmp_path / "out.partial").mkdir()
    (tmp_path / "out.partial" / "mine.txt").write_text("precious")
    with pytest.raises(WriteError, match=r"holds 'mine\.txt', which this run does not write"):
        run(index, tmp_path / "out")
    assert files_below(tmp_path / "out.partial") == {"mine.txt": b"precious"}
