"""The small language model of the benchmarks: what it is trained on, and how conversions are held against it."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("transformers")

from benchmarks import small_llama, small_llama_train as training
from lowbit.numerics.block_diagonal import count_of
from lowbit.solvers import Statistics


def test_no_module_is_trained_and_tested_on():
    """A tenth of the library is left out, none of it is in the rest, and no test of Python's own."""
    known, left_out = (training.modules(left_out=kind) for kind in (False, True))

    assert 8 < len(known) / len(left_out) < 10
    texts = set(known)
    assert sum(text not in texts for text in left_out if text.strip()) > 0.9 * len([t for t in left_out if t.strip()])


@pytest.mark.slow
def test_a_conversion_is_measured(tmp_path, monkeypatch):
    """A model of a few steps: plain rounding is worse than with statistics, and every row tells of both tests."""
    texts = ["def add(a, b):\n    return a + b\n\n\nclass Sum:\n    total = 0\n" * 60] * 2
    monkeypatch.setattr(training, "modules", lambda **_: texts)
    monkeypatch.setattr(small_llama, "modules", lambda **_: texts)
    monkeypatch.setattr(small_llama, "CALIBRATIONS", ("library",))
    monkeypatch.setattr(small_llama, "WINDOWS", 4)
    training.train_to(tmp_path, steps=3)

    rows = list(small_llama.Bench(tmp_path).rows(["awq_w4a16"]))

    assert [row.statistics for row in rows] == ["none", "inputs", "gradients"]
    plain, inputs, gradients = (row.measures["library"]["mean KL"] for row in rows)
    assert 0 < inputs < plain
    assert 0 < gradients < plain
    assert all(set(row.measures) == {"library", "reference"} for row in rows)
    assert torch.isfinite(torch.tensor([plain, inputs, gradients])).all()


@pytest.mark.parametrize(("n", "size", "count"), [(704, 704, 1), (704, 256, 4), (256, 64, 4), (256, 1000, 1)])
def test_blocks_have_no_more_rows_than_asked_for(n, size, count):
    """Matrices are halved until they have; of each half of the samples."""
    moment = torch.eye(n)

    found = small_llama.in_blocks(Statistics(output_hessian=moment, output_held_out=2 * moment), size)

    assert count_of(found.output_hessian) == count_of(found.output_held_out) == count
    assert found.output_held_out.sum() == 2 * n
