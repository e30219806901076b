"""`lowbit calibrate` of a model that predicts the next token."""

from __future__ import annotations

import pytest
import torch

from lowbit.calibration import StatisticsFile
from lowbit.cli import calibrating
from tests.support.tiny_tokenizer import write_tokenizer
from tests.support.tiny_transformers import llama

pytest.importorskip("transformers")


@pytest.fixture
def model(tmp_path):
    """A folder, and some text of the words of its tokenizer."""
    torch.manual_seed(0)
    llama().save_pretrained(tmp_path / "llama")
    write_tokenizer(tmp_path / "llama", start="[CLS]")
    (tmp_path / "t.txt").write_text("one two three four five two one\n" * 40)
    return tmp_path / "llama", "--text", tmp_path / "t.txt", "--max-tokens", "8", "--json"


@pytest.mark.parametrize(
    ("options", "gradients", "size"),
    [((), 15, 1), (("--gradients", "--batch-size", "3"), 15, 3), (("--no-gradients",), 0, 16)],
)
def test_it_runs_backward_one_sample_at_a_time(lowbit, tmp_path, monkeypatch, model, options, gradients, size):
    """Unless asked not to: what runs backward keeps the activations of all layers."""
    sizes = []

    def batches(*args, batch_size, **kwargs):
        sizes.append(batch_size)
        return made(*args, batch_size=batch_size, **kwargs)

    made = calibrating.text_batches
    monkeypatch.setattr(calibrating, "text_batches", batches)

    done = lowbit("calibrate", *model, *options, "-o", tmp_path / "s.safetensors")

    assert (done.code, done.json["gradients"], sizes) == (0, gradients, [size])
    with StatisticsFile(tmp_path / "s.safetensors") as found:
        layer = found["model.layers.0.mlp.down_proj"]
    assert (layer.output_hessian is not None) == bool(gradients)


def test_how_many_at_once_changes_nothing(lowbit, tmp_path, model):
    """The same windows in the same halves; along other directions, so gradients differ by chance."""
    found = []
    for size in ("1", "7"):
        out = tmp_path / f"{size}.safetensors"
        assert lowbit("calibrate", *model, "--dtype", "float32", "--batch-size", size, "-o", out).code == 0
        with StatisticsFile(out) as file:
            found.append(file["model.layers.1.mlp.down_proj"])

    one, other = found
    assert (one.tokens, one.held_out_tokens) == (other.tokens, other.held_out_tokens)
    torch.testing.assert_close(one.hessian, other.hessian, rtol=1e-3, atol=1e-9)
    traces = [float(layer.output_hessian.trace()) for layer in found]
    assert traces[0] == pytest.approx(traces[1], rel=0.5)
