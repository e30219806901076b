"""The statistics file, merging, and importance matrices."""

from __future__ import annotations

import copy
import json
import struct

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

import lowbit
from lowbit.calibration import StatisticsFile, save_statistics
from lowbit.calibration.imatrix import gguf_name, import_imatrix
from lowbit.calibration.merge import Merged
from lowbit.errors import CheckpointError, StatisticsError
from tests.calibration.models import Attention, batches, same


@pytest.fixture
def taken():
    """Statistics of a model in memory."""
    return lowbit.calibrate(Attention(), batches())


@pytest.fixture
def path(taken, tmp_path):
    """The same in a file."""
    return taken.save(tmp_path / "s.safetensors")


def test_a_file_holds_what_was_saved(taken, path):
    """Every field of every layer comes back to the bit, and so does the directory."""
    with StatisticsFile.open(path) as file:
        assert same(file, taken)
        assert file.contents == taken.contents
        assert file.describe() == taken.describe()
        assert file.describe()["inputs"]["0"]["tokens_per_channel"] == 60 / 24
        assert file.get("unused") is None
        assert "unused" not in file
        assert file.get("q") is file.get("k")


def test_other_programs_can_read_it(taken, path):
    """It is a plain safetensors file: tensors named <input>.<field>, and JSON in the header."""
    with safe_open(path, "pt") as file:
        facts = json.loads(file.metadata()["lowbit.statistics"])
        key = facts["layers"]["q"]["input"]
        diagonal, rest = file.get_tensor(f"{key}.hessian"), file.get_tensor(f"{key}.hessian.correlations")
    h = taken["q"].hessian
    assert torch.equal(diagonal, h.diagonal())
    size = diagonal.sqrt()
    torch.testing.assert_close((rest.view(24, 24) / 32767 * size[:, None] * size).triu(1), h.triu(1))
    assert facts["layers"]["q"]["shape"] == [24, 24]
    assert facts["inputs"][key]["tokens"] == 60
    assert facts["never_called"] == ["unused"]


def test_statistics_of_another_model_are_listed(taken):
    """`check` accepts the model's layers and more, and lists names and shapes that do not fit."""
    shapes = dict.fromkeys("qkvo", (24, 24))
    taken.check({**shapes, "more": (3, 3)})

    with pytest.raises(StatisticsError) as caught:
        taken.check({"q": (24, 24), "k": (24, 24), "v": (24, 48)})
    assert "2 of 4 layers do not fit" in str(caught.value)
    assert "not in the model: o" in str(caught.value)
    assert "v is [24, 48], the statistics are of [24, 24]" in str(caught.value)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (
            lambda facts: facts.update(version=1),
            r"^\S+: was written by an earlier lowbit .*version 1, this",
        ),
        (lambda facts: facts.update(version=3), "version 3, this lowbit reads 2"),
        (lambda facts: facts.pop("inputs"), "inputs"),
        (lambda facts: facts["layers"]["q"].update(shape=[24, 25]), "K = 25"),
        (lambda facts: facts["inputs"]["0"].update(kind="diagonal"), r"correlations is int16 \[576\], expected absent"),
        (lambda facts: facts["inputs"]["0"].update(k=23), "K = 24, its input has 23"),
        (lambda facts: facts["layers"]["q"].update(weight="AAAAAAAA"), "no mark of 576 elements"),
    ],
)
def test_a_damaged_directory_is_refused(path, tmp_path, change, said):
    """A header that contradicts itself or the tensors is an error that names the file."""
    with safe_open(path, "pt") as file:
        facts = json.loads(file.metadata()["lowbit.statistics"])
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  (no dict)
    change(facts)
    broken = tmp_path / "broken.safetensors"
    save_file(tensors, broken, {"lowbit.statistics": json.dumps(facts)})

    with pytest.raises(StatisticsError, match=said) as caught:
        StatisticsFile(broken)
    assert "broken.safetensors" in str(caught.value)


def test_other_files_are_refused(tmp_path):
    """A checkpoint is no statistics file, and a missing file is said to be missing."""
    save_file({"a.weight": torch.ones(2, 2)}, tmp_path / "model.safetensors")

    with pytest.raises(StatisticsError, match="is no statistics file"):
        StatisticsFile(tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"no\.safetensors"):
        StatisticsFile(tmp_path / "no.safetensors")


@pytest.mark.parametrize(
    ("gone", "said"),
    [
        (["hessian.correlations"], r"0\.hessian\.correlations is absent, expected int16 \[576\]"),
        (["hessian"], r"0\.hessian is absent, expected float32 \[24\]"),
        (["held_out", "held_out.correlations"], r"0\.held_out is absent, expected float32 \[24\]"),
    ],
)
def test_a_file_without_a_moment_that_its_directory_tells_of_is_refused(path, tmp_path, gone, said):
    """Such layers would pass for ones with full second moments, and have none."""
    with safe_open(path, "pt") as file:
        facts = file.metadata()
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  (no dict)
    for field in gone:
        del tensors[f"0.{field}"]
    save_file(tensors, tmp_path / "broken.safetensors", facts)

    with pytest.raises(StatisticsError, match=rf"broken\.safetensors: {said}; calibrate again"):
        StatisticsFile(tmp_path / "broken.safetensors")


# ---- merging --------------------------------------------------------------------------------------------------------


def halves_apart():
    """Statistics of all of some batches, and of the first two and the others of them."""
    model, data = Attention(), batches(6)
    return (lowbit.calibrate(model, part) for part in (data, data[:2], data[2:]))


def test_merged_parts_are_the_whole(tmp_path):
    """Moments, ranges, means, counts and tokens of two runs together are those of one run over both's batches."""
    whole, first, second = halves_apart()

    with StatisticsFile(save_statistics(Merged([first, second]), tmp_path / "m.safetensors")) as merged:
        assert set(merged) == set(whole)
        assert merged.never_called == ("unused",)
        for layer in whole:
            a, b = merged[layer], whole[layer]
            assert (a.tokens, a.held_out_tokens) == (b.tokens, b.held_out_tokens) == (60, 60)
            torch.testing.assert_close(a.mean, b.mean, rtol=1e-5, atol=1e-6)
            size = b.diagonal.sqrt()
            for name in ("hessian", "held_out"):  # packed in three files
                difference = (getattr(a, name) - getattr(b, name)).abs() / (size[:, None] * size)
                assert float(difference.max()) < 3 * 0.5 / 32767 + 2e-6
            for name in ("absmax", "minimum", "maximum", "magnitudes"):
                assert torch.equal(getattr(a, name), getattr(b, name))
            assert torch.equal(a.samples, b.samples)
        assert merged.contents.layers["q"].input == merged.contents.layers["k"].input


def test_many_kept_rows_are_merged_by_tokens():
    """Of full reservoirs each gives rows by its share of the tokens, up to 256 in all."""
    model = Attention()
    runs = [lowbit.calibrate(model, batches(count, 20, 10, seed=count)) for count in (4, 12)]

    samples = Merged(runs)["q"].samples

    fits = [sum(bool((run["q"].samples == row).all(1).any()) for row in samples) for run in runs]
    assert 250 <= len(samples) <= 256
    assert fits[0] == pytest.approx(64, abs=2)


def test_a_diagonal_makes_the_result_diagonal():
    """Merged with a diagonal, a full second moment counts by its diagonal."""
    model, data = Attention(), batches(6)
    whole = lowbit.calibrate(model, data)

    merged = Merged([lowbit.calibrate(model, data[:2]), lowbit.calibrate(model, data[2:], full_up_to=8)])

    assert merged.contents.inputs["0"].kind == "diagonal"
    torch.testing.assert_close(merged["q"].hessian, whole["q"].diagonal, rtol=1e-5, atol=1e-6)


def test_layers_that_one_lacks_are_kept():
    """A layer in only one of the files is taken from it, and no longer shares with others."""
    model, data = Attention(), batches(4)
    only_q, both = lowbit.calibrate(model, data, layers=["q"]), lowbit.calibrate(model, data)

    merged = Merged([only_q, both])

    assert torch.equal(merged["o"].hessian, both["o"].hessian)
    assert merged["q"].total_tokens == 2 * merged["k"].total_tokens
    assert merged.contents.layers["q"].input != merged.contents.layers["k"].input


def test_marks_of_weights_are_kept_where_all_agree(caplog):
    """Of one model, or where only one knows the weights, they stay; those of two models are left out, and said."""
    model, data = Attention(), batches(4)
    one = lowbit.calibrate(model, data[:2])
    two = lowbit.calibrate(copy.deepcopy(model).bfloat16(), [x.bfloat16() for x in data[2:]])
    unmarked = lowbit.calibrate(model, data)
    unmarked.contents = unmarked.contents.marked({})
    other = lowbit.calibrate(Attention(), data)
    mark = one.contents.layers["q"].weight

    assert len(mark) == 172
    for files in ([one, two], [unmarked, one], [one, unmarked]):
        assert Merged(files).contents.layers["q"].weight == mark
    assert not caplog.records
    assert Merged([one, other]).contents.layers["q"].weight == ""
    (record,) = caplog.records
    assert "are of models with other weights, 4 of 4 layers differ (q, k, v and 1 more)" in record.getMessage()


def test_other_shapes_do_not_merge():
    """A layer that has another shape elsewhere is named with both shapes."""
    runs = [lowbit.calibrate(Attention(width), batches(width=width)) for width in (24, 32)]

    with pytest.raises(StatisticsError, match=r"q: has the shapes \[24, 24\].*\[32, 32\]"):
        Merged(runs)


# ---- importance matrices --------------------------------------------------------------------------------------------

SHAPES = {
    "model.layers.0.self_attn.q_proj": (8, 4),
    "model.layers.0.mlp.down_proj": (4, 6),
    "model.layers.0.mlp.experts.1.up_proj": (6, 4),
    "model.embed_tokens": (9, 4),
    "lm_head": (9, 4),
}
Q = np.array([1.0, 2.0, 3.0, 0.0], np.float32)
DOWN = np.arange(6, dtype=np.float32)
EXPERTS = np.arange(8, dtype=np.float32).reshape(2, 4) + 1


def binary(entries, tail=b""):
    """An importance matrix in the older container: means times calls."""
    parts = [struct.pack("<i", len(entries))]
    for name, calls, values in entries:
        parts.append(struct.pack("<i", len(name)) + name.encode() + struct.pack("<ii", calls, values.size))
        parts.append((values * np.float32(calls)).astype("<f4").tobytes())
    return b"".join(parts) + tail


def as_binary(path):
    """Write the three matrices in the older container, with the dataset's name at the end."""
    path.write_bytes(
        binary(
            [
                ("blk.0.attn_q.weight", 5, Q),
                ("blk.0.ffn_down.weight", 5, DOWN),
                ("blk.0.ffn_up_exps.weight", 5, EXPERTS.flatten()),
            ],
            struct.pack("<ii", 7, 4) + b"text",
        )
    )
    return path


def as_gguf(path):
    """Write the three matrices as GGUF, by its owners' library."""
    gguf = pytest.importorskip("gguf")
    writer = gguf.GGUFWriter(path, "")
    writer.add_type("imatrix")
    for name, values, counts in (
        ("blk.0.attn_q.weight", Q[None], [5]),
        ("blk.0.ffn_down.weight", DOWN[None], [5]),
        ("blk.0.ffn_up_exps.weight", EXPERTS, [3, 5]),
    ):
        count = np.array(counts, np.float32)[:, None]
        writer.add_tensor(f"{name}.in_sum2", values * count)
        writer.add_tensor(f"{name}.counts", count)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.mark.parametrize("write", [as_binary, as_gguf])
def test_an_importance_matrix_is_a_diagonal(write, tmp_path):
    """Both containers give the means of x² of each layer, an expert's its own; layers without are listed."""
    found = import_imatrix(write(tmp_path / "model.imatrix"), SHAPES, "model")

    for name, values in zip(list(SHAPES)[:3], (Q, DOWN, EXPERTS[1]), strict=True):
        torch.testing.assert_close(found[name].hessian, torch.from_numpy(values))
        assert found[name].tokens == 5
        assert found[name].held_out is None
    assert found.never_called == ("model.embed_tokens", "lm_head")
    with StatisticsFile(found.save(tmp_path / "s.safetensors")) as file:
        assert torch.equal(file["model.layers.0.mlp.down_proj"].hessian, torch.from_numpy(DOWN))


def test_names_of_llama_cpp():
    """Names of transformers' layers become llama.cpp's."""
    assert gguf_name("model.layers.12.mlp.gate_proj") == ("blk.12.ffn_gate.weight", 0)
    assert gguf_name("model.layers.3.block_sparse_moe.experts.7.w2") == ("blk.3.ffn_down_exps.weight", 7)
    assert gguf_name("lm_head") == ("output.weight", 0)


@pytest.mark.parametrize(
    ("raw", "said"),
    [
        (b"", "no importance matrix"),
        (b"a text file, not a matrix", "no importance matrix"),
        (binary([("blk.0.attn_q.weight", 5, Q)])[:-4], "cut off"),
        (binary([("blk.0.attn_q.weight", 5, DOWN)]), "K = 4"),
        (binary([("blk.9.attn_q.weight", 5, Q)]), "another model"),
        (binary([("blk.0.attn_q.weight", 5, -Q)]), "negative"),
        (b"GGUF" + bytes(20), "GGUF"),
    ],
)
def test_bad_importance_matrices_are_refused(tmp_path, raw, said):
    """What is no importance matrix, a cut one, or one of another model is one clear error."""
    path = tmp_path / "bad.imatrix"
    path.write_bytes(raw)

    with pytest.raises(StatisticsError, match=said) as caught:
        import_imatrix(path, SHAPES, "model")
    assert "bad.imatrix" in str(caught.value)


def test_broad_statistics_say_so(taken, tmp_path):
    """What was calibrated as broad is broad in memory and in the file; of a merged one half the tokens have to be."""
    path = tmp_path / "broad.safetensors"
    inside = lowbit.calibrate(Attention(), batches(), broad=True)

    with lowbit.calibrate(Attention(), batches(), path=path, broad=True) as file:
        assert file["q"].broad
        assert file["q"].hessian is file["k"].hessian
        assert Merged([taken, file])["q"].broad
        assert not Merged([taken, file, taken])["q"].broad
    assert inside["q"].broad
    assert not taken["q"].broad
    assert not Merged([taken, taken])["q"].broad
