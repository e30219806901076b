"""Text as batches for a model of transformers."""

from __future__ import annotations

import io
import json
import shutil

import pytest
import torch

from lowbit.errors import CheckpointError, PlanError, StatisticsError
from lowbit.integrations import text_batches as text_batches_module, text_models
from lowbit.integrations.text_batches import builtin_text, read_text, text_batches
from lowbit.integrations.text_models import calibration_dtype, load_text_model
from tests.support.other_device import DEVICE, needs_stand_in, other_device
from tests.support.tiny_tokenizer import write_tokenizer

pytest.importorskip("transformers")


@pytest.fixture(scope="module")
def encoder(tmp_path_factory):
    """A tiny BERT for masked tokens: its keys begin with "bert."."""
    from transformers import BertConfig, BertForMaskedLM

    folder = tmp_path_factory.mktemp("bert")
    config = BertConfig(
        vocab_size=9, hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=48,
        max_position_embeddings=16,
    )  # fmt: skip
    BertForMaskedLM(config).save_pretrained(folder)
    write_tokenizer(folder)
    return folder


@pytest.fixture(scope="module")
def causal(tmp_path_factory):
    """A tiny Llama."""
    from transformers import LlamaConfig, LlamaForCausalLM

    folder = tmp_path_factory.mktemp("llama")
    config = LlamaConfig(
        vocab_size=9, hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=48,
        max_position_embeddings=64,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder)
    write_tokenizer(folder, start="[CLS]")
    return folder


TEXT = "one two three\n\nfour\nfive five five five\n  \none one\n"


def test_lines_are_the_samples_of_an_encoder(encoder):
    """Each line that is not empty is a sample with its special tokens; the mask is 0 on padding only."""
    model = load_text_model(encoder)

    found = text_batches(model, TEXT, batch_size=3)

    assert not model.causal
    assert [tuple(batch["input_ids"].shape) for batch in found] == [(3, 5), (1, 6)]
    assert found[0]["input_ids"].tolist() == [[2, 7, 3, 0, 0], [2, 4, 4, 3, 0], [2, 4, 5, 6, 3]]
    assert found[0]["attention_mask"].tolist() == [[1, 1, 1, 0, 0], [1, 1, 1, 1, 0], [1, 1, 1, 1, 1]]
    assert model.model(**found[0]).logits.shape == (3, 5, 9)


def test_windows_are_the_samples_of_a_causal_model(causal):
    """All text is cut into windows, each with the token that begins a text."""
    model = load_text_model(causal)

    found = text_batches(model, TEXT, max_tokens=5)

    assert model.causal
    rows = sorted(row[: sum(mask)] for b in found for row, mask in zip(
        b["input_ids"].tolist(), b["attention_mask"].tolist(), strict=True))  # fmt: skip
    assert rows == sorted([[2, 4, 5, 6, 7], [2, 8, 8, 8, 8], [2, 4, 4]])


@needs_stand_in
@pytest.mark.parametrize(
    ("isa", "fast", "expected"),
    [("avx512", True, torch.bfloat16), ("avx512", False, torch.float32), ("amx", False, torch.bfloat16)],
)
def test_calibration_runs_in_what_the_processor_is_fast_at(monkeypatch, isa, fast, expected):
    """bfloat16 where its products are; on other devices what the checkpoint has."""
    native = pytest.importorskip("lowbit.backends.cpu", exc_type=ImportError).native
    monkeypatch.setattr(native, "isa", lambda: isa)
    monkeypatch.setattr(native, "bf16_dots", lambda: fast)
    assert calibration_dtype("cpu") == calibration_dtype("cpu:0") == expected
    with other_device():
        assert calibration_dtype(str(DEVICE)) is None
    with pytest.raises(PlanError, match="gpu"):
        calibration_dtype("gpu")
    monkeypatch.setattr(text_models, "load", lambda _: "nothing was compiled")
    assert calibration_dtype("cpu") == torch.float32


def test_limits_are_kept(encoder, caplog):
    """No sample is longer than the model takes, and of many lines some at even distances are taken."""
    model = load_text_model(encoder)
    text = "\n".join("one " * 40 if index % 2 else "two" for index in range(100))

    found = text_batches(model, text, samples=10, max_tokens=99)

    assert "no more than 16 tokens" in caplog.text
    assert max(batch["input_ids"].shape[1] for batch in found) <= 16
    assert sum(len(batch["input_ids"]) for batch in found) == 10


def test_variants_are_in_the_half_of_their_sample(encoder):
    """A sample and its variant have places of the same parity, whatever the size of batches; one may be left over."""
    model = load_text_model(encoder)
    text = "\n".join(" ".join(["one", "two", "three"] * (index % 4 + 1)) for index in range(9))

    found = text_batches(model, text, batch_size=5, vary=1.0)

    rows = [row[: sum(mask)] for b in found for row, mask in zip(
        b["input_ids"].tolist(), b["attention_mask"].tolist(), strict=True)]  # fmt: skip
    assert len(rows) == 17
    for start in range(0, 16, 4):
        originals, variants = rows[start : start + 2], rows[start + 2 : start + 4]
        assert all(row == [2, *[4, 5, 6] * (len(row) // 3), 3] for row in originals)
        assert [(row[0], len(row), row[-1]) for row in variants] == [(2, len(row), 3) for row in originals]
        assert all(old != new for old, new in zip(originals, variants, strict=True))
    assert rows[16] == [2, *[4, 5, 6] * 4, 3]


def test_samples_without_a_variant_come_once(encoder, caplog):
    """What has no token replaced comes once, and moves no other sample out of the half of its variant."""
    model = load_text_model(encoder)

    found = text_batches(model, "one two three\n" * 21, vary=0.3)

    rows = [row for batch in found for row in batch["input_ids"].tolist()]
    plain = [index for index, row in enumerate(rows) if row == [2, 4, 5, 6, 3]]
    assert len(plain) == 21
    alone = next(index for index, row in enumerate(rows) if index not in plain) - 2
    assert 2 < alone < 19
    assert len(rows) == alone + 2 * (21 - alone)
    changed = [index for index in range(len(rows)) if index not in plain]
    assert all((index - alone) % 4 in (2, 3) for index in changed[: (21 - alone) // 2 * 2])
    assert "nothing is varied" not in caplog.text


def test_a_vocabulary_without_words_makes_no_variants(encoder, caplog):
    """Where no token can be replaced every sample comes once, and a warning says so."""
    model = load_text_model(encoder)
    model.tokenizer = _NoWords(model.tokenizer)

    found = text_batches(model, "one two three\n" * 5, vary=1.0)

    assert sum(len(batch["input_ids"]) for batch in found) == 5
    assert "nothing is varied" in caplog.text


class _NoWords:
    """A tokenizer whose vocabulary has nothing but signs and numbers."""

    def __init__(self, tokenizer):
        self.tokenizer, self.pad_token_id, self.all_special_ids = tokenizer, 0, []
        self.model_max_length = 16

    def __call__(self, *arguments, **options):
        return self.tokenizer(*arguments, **options)

    def get_vocab(self):
        """Digits only."""
        return {str(index): index for index in range(9)}


def test_more_texts_than_samples_are_taken_at_even_distances(encoder, caplog):
    """Short texts are not left out for being short: a warning counts those that are, and says how to take all."""
    model = load_text_model(encoder)
    texts = [f"{word}\n" * (9 - index) for index, word in enumerate(["one", "two", "three", "four", "five"])]

    rows = [row for batch in text_batches(model, texts, samples=3) for row in batch["input_ids"].tolist()]

    assert sorted(row[1] for row in rows) == [4, 5, 7]
    assert "2 of 5 texts give no sample" in caplog.text
    assert "--samples 5 takes one of each" in caplog.text


def test_several_texts_count_the_same(encoder):
    """Of two texts as many samples are taken of each; what a short one lacks comes from the other."""
    model = load_text_model(encoder)

    def count(*texts):
        rows = [row for batch in text_batches(model, texts, samples=8) for row in batch["input_ids"].tolist()]
        return sum(4 in row for row in rows), sum(5 in row for row in rows)

    assert count("one\n" * 20, "two\n" * 30) == (4, 4)
    assert count("one\n" * 20, "two\n" * 2) == (6, 2)
    assert count("one\n" * 3, "two\n" * 2) == (3, 2)


def test_the_builtin_text_is_of_many_lines():
    """The text that comes along has some hundred different lines, none empty."""
    lines = builtin_text().splitlines()

    assert len(lines) == len(set(lines)) == 512
    assert all(line.strip() == line and line for line in lines)
    assert len(set(builtin_text().lower().split())) > 3000


def test_a_tied_head_has_no_statistics(tmp_path):
    """A head that is the embedding has no weight in the file, so it gets no name."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=9, hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=48,
        tie_word_embeddings=True,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(tmp_path)
    write_tokenizer(tmp_path)

    assert load_text_model(tmp_path).names() == {"lm_head": None}


def test_names_are_those_of_the_file(encoder):
    """A model loaded without its head has other names than the file; they are translated."""
    from transformers import BertModel

    model = load_text_model(encoder)
    assert model.names() == {"cls.predictions.decoder": None}  # tied to the embedding

    model.model = BertModel.from_pretrained(encoder, add_pooling_layer=False)
    assert model.names()["encoder.layer.0.intermediate.dense"] == "bert.encoder.layer.0.intermediate.dense"


@pytest.mark.parametrize(
    ("raw", "said"),
    [
        (b"", "has no text"),
        (b" \n\t\n", "has no text"),
        (b"\xff\xfe\x00\x01", "is no UTF-8 text"),
        (b"PK\x03\x04\x00\x00", "NUL bytes"),
    ],
)
def test_what_is_no_text_is_refused(tmp_path, raw, said):
    """An empty or binary file is one clear error that names it."""
    path = tmp_path / "text.txt"
    path.write_bytes(raw)

    with pytest.raises(StatisticsError, match=said) as caught:
        read_text(path)
    assert "text.txt" in str(caught.value)


def test_a_missing_text_is_refused(tmp_path):
    """A path that is not there, or is a folder, is said to be unreadable."""
    for path in (tmp_path / "no.txt", tmp_path):
        with pytest.raises(StatisticsError, match="cannot be read"):
            read_text(path)


def test_what_is_no_model_folder_is_refused(tmp_path):
    """No config.json, one without a class, and one without weights are errors that name the folder."""
    with pytest.raises(CheckpointError, match=r"no config\.json"):
        load_text_model(tmp_path)
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(CheckpointError, match="does not name the model's class"):
        load_text_model(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"architectures": ["BertModel"], "model_type": "bert"}))
    with pytest.raises(CheckpointError, match="transformers cannot load it as BertModel"):
        load_text_model(tmp_path)


def test_a_wrong_device_is_named(encoder):
    """A device that is misspelled or not there is the user's choice to correct, not a fault of the folder."""
    with pytest.raises(PlanError, match="device 'gpu': cannot be used"):
        load_text_model(encoder, device="gpu")


def test_the_dtype_is_float32_on_a_cpu(encoder):
    """Weights are widened by default, since statistics of half precision on a CPU are slow; another can be chosen."""
    assert next(load_text_model(encoder).model.parameters()).dtype == torch.float32
    assert next(load_text_model(encoder, dtype=torch.bfloat16).model.parameters()).dtype == torch.bfloat16


def test_a_truncated_weight_file_is_named(encoder, tmp_path):
    """Whatever transformers says to a damaged file, the error names it and what is missing."""
    shutil.copytree(encoder, tmp_path / "model")
    weights = tmp_path / "model" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])

    with pytest.raises(CheckpointError, match=r"model\.safetensors: is truncated: 100 of \d+ bytes are missing"):
        load_text_model(tmp_path / "model")


def test_a_stream_without_an_end_is_not_read_to_its_end(tmp_path, monkeypatch):
    """NUL bytes at the beginning are enough to know that something is no text."""
    path = tmp_path / "device"
    path.write_bytes(b"\0" * 4096)
    monkeypatch.setattr(text_batches_module, "_FIRST", 16)
    sizes = []

    class Watched(io.FileIO):
        def read(self, size=-1):
            sizes.append(size)
            return super().read(size)

    monkeypatch.setattr(text_batches_module.Path, "open", lambda path, mode: Watched(str(path), mode))
    with pytest.raises(StatisticsError, match="device: is a binary file"):
        read_text(path)
    assert sizes == [16]
