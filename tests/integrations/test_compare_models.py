"""Running a model with several checkpoints' weights: the measures, the blocks, factories and text models."""

from __future__ import annotations

import math

import pytest
import torch
from safetensors.torch import save_file
from torch import nn
from torch.nn import functional as F

from lowbit.checkpoint.convert import convert
from lowbit.checkpoint.plan import make_plan
from lowbit.checkpoint.source import open_source
from lowbit.errors import CheckpointError, PlanError, StatisticsError
from lowbit.integrations.compare_blocks import Pair, largest_list
from lowbit.integrations.compare_models import SEEDS, evaluate_folder, evaluate_module
from lowbit.report.end_to_end import EmbeddingMeter, LanguageMeter, PredictionMeter, psnr

FACTORY = '''
import torch
from torch import nn

class Tiny(nn.Module):
    """Predicts noise: three residual blocks, moved by the time."""

    def __init__(self):
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(64, 64), nn.GELU()) for _ in range(3))
        self.out = nn.Linear(64, 64)
        for p in self.parameters():
            p.data = torch.randn(p.shape, generator=generator) / 8

    def forward(self, x, timestep):
        h = x * (1 + timestep.reshape(-1, 1) / TIME)
        for block in self.blocks:
            h = h + block(h)
        return {"sample": self.out(h)}

TIME = 1.0
DATA_RANGE = 2.0

def make():
    generator = torch.Generator().manual_seed(1)
    times = [torch.full((4,), t * TIME) for t in (0.1, 0.3, 0.9)]
    return Tiny(), ({"x": torch.randn(4, 64, generator=generator), "timestep": t} for t in times)

def broken():
    raise RuntimeError("no weights here")

def empty():
    return Tiny(), []

def number():
    return 7

def late():
    return Tiny(), ({}["late"] for _ in range(1))

def sample(model, seed):
    x = torch.randn(2, 64, generator=torch.Generator().manual_seed(seed))
    return model(x, torch.ones(2))["sample"]
'''


@pytest.fixture
def factory(tmp_path, monkeypatch, request):
    """A module with factories in the current folder, its model as a checkpoint, and that in int8 and nvfp4."""
    name = f"tiny_{abs(hash(request.node.name))}"  # modules are imported once a process
    (tmp_path / f"{name}.py").write_text(FACTORY)
    monkeypatch.chdir(tmp_path)
    scope = {}
    exec(FACTORY, scope)
    save_file(scope["Tiny"]().state_dict(), "ref.safetensors")
    for spec in ("int8", "nvfp4"):
        with open_source("ref.safetensors") as source:
            convert(source, f"{spec}.safetensors", make_plan(source, spec, preset="none"))
    return name


def test_cosines_of_embeddings():
    """1 - cosine is exact for angles too small for a difference of float32 cosines, and lengths do not matter."""
    meter = EmbeddingMeter()
    angle = torch.tensor([1e-5, 1e-2])
    meter.add(torch.tensor([[2.0, 0.0]] * 2), torch.stack([angle.cos(), angle.sin()], dim=1).double() * 3)

    measures, count = meter.result()

    assert count == 2
    assert measures["max 1 - cosine"] == pytest.approx(1 - math.cos(1e-2), rel=1e-4)
    assert measures["mean 1 - cosine"] == pytest.approx((5e-11 + 1 - math.cos(1e-2)) / 2, rel=1e-4)


def test_divergence_of_predicted_tokens():
    """KL is that of the definition, from the reference to the candidate; the 99th percentile is one of the largest."""
    p, q = torch.randn(2, 200, 11, generator=torch.Generator().manual_seed(0))
    meter = LanguageMeter()
    meter.add(p[:50], q[:50])
    meter.add(p[50:], q[50:])

    measures, count = meter.result()

    each = (p.softmax(-1) * (p.log_softmax(-1) - q.log_softmax(-1))).sum(-1)
    assert count == 200
    assert measures["mean KL"] == pytest.approx(float(each.mean()), rel=1e-5)
    assert measures["q99 KL"] == pytest.approx(float(each.quantile(0.99)), rel=1e-5)
    assert measures["top-1 agreement"] == float((p.argmax(-1) == q.argmax(-1)).double().mean())


def test_predictions_are_told_by_time():
    """The relative error is told over all inputs and near each of the three times, where there are any."""
    meter = PredictionMeter()
    reference = torch.ones(4, 8)
    factors = torch.tensor([1.1, 1.2, 1.4, 1.0]).unsqueeze(1)
    meter.add(reference, reference * factors, torch.tensor([0.1, 0.15, 0.9, 0.3]))

    measures, count = meter.result()

    assert count == 4
    assert measures["at t = 0.1"] == pytest.approx(math.sqrt((0.01 + 0.04) / 2))
    assert measures["at t = 0.9"] == pytest.approx(0.4)
    assert "at t = 0.5" not in measures
    assert measures["relative error"] == pytest.approx(math.sqrt((0.01 + 0.04 + 0.16) / 4))


def test_psnr_is_that_of_the_range():
    """A difference of a tenth of the range is 20 dB."""
    assert psnr(torch.zeros(4), torch.full((4,), 0.2), 2.0) == pytest.approx(20)
    assert psnr(torch.zeros(4), torch.zeros(4), 2.0) == math.inf


class Stack(nn.Module):
    """Blocks in a list, and a shorter list of smaller things inside each."""

    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList(nn.ModuleDict({"a": nn.ModuleList([nn.Linear(16, 16)])}) for _ in range(0))
        self.layers = nn.ModuleList(nn.Linear(16, 16) for _ in range(4))

    def forward(self, x):
        """[..., 16] -> the same."""
        for layer in self.layers:
            x = x + F.gelu(layer(x))
        return x


def test_an_error_in_one_block_is_told_apart_from_what_follows():
    """A changed block has an isolated error, blocks after it only an accumulated one, blocks before it none."""
    reference, candidate = Stack(), Stack()
    candidate.load_state_dict(reference.state_dict())
    candidate.layers[1].weight.data *= 1.1
    pair = Pair(reference, candidate)

    one, two = pair.run(((torch.randn(3, 5, 16),), {}))

    errors = pair.blocks()
    assert [error.name for error in errors] == [f"layers.{i}" for i in range(4)]
    assert [error.isolated > 0 for error in errors] == [False, True, False, False]
    # The first changed block still sees the reference's input.
    assert errors[1].accumulated == pytest.approx(errors[1].isolated)
    assert [error.accumulated > 0 for error in errors] == [False, True, True, True]
    assert not torch.equal(one, two)
    assert not reference.layers[0]._forward_hooks


def test_padding_does_not_count():
    """Tokens that the mask leaves out change no block's error."""
    reference, candidate = Stack(), Stack()
    x, mask = torch.randn(2, 3, 16), torch.tensor([[1, 1, 0], [1, 0, 0]]).bool()

    found = []
    for scale in (1.0, 100.0):
        pair = Pair(reference, candidate)
        pair.run(((torch.where(mask.unsqueeze(-1), x, scale * x),), {}), mask)
        found.append(pair.blocks())

    assert found[0] == found[1]
    assert found[0][0].accumulated > 0


def test_the_largest_list_is_the_blocks():
    """The list with the most weights is taken, not the longest; a model without one has no blocks."""
    model = nn.ModuleDict(
        {
            "many": nn.ModuleList(nn.Linear(2, 2) for _ in range(9)),
            "large": nn.ModuleList(nn.Linear(64, 64) for _ in range(2)),
            "single": nn.ModuleList([nn.Linear(512, 512)]),
        }
    )

    assert largest_list(model) == "large"
    assert largest_list(nn.Linear(2, 2)) is None


def test_a_module_is_run_on_its_factorys_inputs(factory, tmp_path):
    """Eight bits predict better than four, at every time that there is, in every block and in every image."""
    paths = [tmp_path / f"{name}.safetensors" for name in ("int8", "nvfp4", "ref")]

    eight, four, same = evaluate_module(f"{factory}:make", tmp_path / "ref.safetensors", paths)

    assert set(four.measures) == {"relative error", "at t = 0.1", "at t = 0.9", "mean PSNR, dB"}
    assert 0 < eight.error[1] < 0.05 < four.error[1] < 0.5
    assert eight.measures["mean PSNR, dB"] > four.measures["mean PSNR, dB"] + 10
    assert all(a.accumulated < b.accumulated for a, b in zip(eight.blocks, four.blocks, strict=True))
    assert four.samples == 12
    assert same.error[1] == 0
    assert same.measures["mean PSNR, dB"] == math.inf
    assert len(set(SEEDS)) == len(SEEDS)


@pytest.mark.parametrize(
    ("name", "complaint"),
    [
        ("broken", "raised RuntimeError: no weights here"),
        ("empty", "returned no inputs"),
        ("number", "must return a pair"),
        ("late", "its inputs raised KeyError: 'late'"),
        ("missing", "cannot be imported"),
        ("TIME", "is a float, not a function"),
    ],
)
def test_a_factory_that_does_not_work_is_one_error(factory, tmp_path, name, complaint):
    """Whatever a factory does wrong is told with its name, and what it should do."""
    path = tmp_path / "ref.safetensors"
    with pytest.raises((PlanError, StatisticsError), match=f"{factory}:{name}.*{complaint}"):
        evaluate_module(f"{factory}:{name}", path, [path])


def test_a_spec_without_a_function_is_refused(tmp_path):
    """A module alone names no factory, and one that is not there cannot be imported."""
    with pytest.raises(PlanError, match=r"FILE\.py:FUNCTION"):
        evaluate_module("os.path", tmp_path, [])
    with pytest.raises(PlanError, match="cannot be imported"):
        evaluate_module("no_such_package_here:make", tmp_path, [])


def test_a_checkpoint_of_another_model_is_refused(factory, tmp_path):
    """Weights that the model needs and the file lacks are named: nothing is run with random ones."""
    save_file({"out.weight": torch.zeros(64, 64)}, tmp_path / "part.safetensors")

    with pytest.raises(CheckpointError, match=r"part\.safetensors: lacks blocks\.0"):
        evaluate_module(f"{factory}:make", tmp_path / "part.safetensors", [])


@pytest.fixture
def language_model(tmp_path):
    """A folder with a tiny language model and its tokenizer of single words."""
    transformers = pytest.importorskip("transformers")
    tokenizers = pytest.importorskip("tokenizers")
    words = {word: index for index, word in enumerate(["[UNK]", *"abcdefghijklmnopqrstuvwxyz"])}
    plain = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="[UNK]"))
    plain.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    folder = tmp_path / "model"
    transformers.PreTrainedTokenizerFast(tokenizer_object=plain, unk_token="[UNK]").save_pretrained(folder)
    config = transformers.LlamaConfig(
        vocab_size=32, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=2, max_position_embeddings=32, tie_word_embeddings=False,
    )  # fmt: skip
    transformers.LlamaForCausalLM(config).save_pretrained(folder)
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_a_language_model_is_compared_token_by_token(language_model, tmp_path, device):
    """KL and top-1 agreement over all windows of the text; the model itself agrees with itself in everything."""
    text = tmp_path / "text.txt"
    text.write_text(" ".join("the quick brown fox jumps over the lazy dog".replace(" ", "") * 4))
    with open_source(language_model) as source:
        convert(source, tmp_path / "four", make_plan(source, "nvfp4", preset="none"))

    four, same = evaluate_folder(
        language_model, text, language_model, [tmp_path / "four", language_model], samples=3, device=device
    )  # fmt: skip

    assert four.kind == "language"
    assert four.samples == 3 * 31
    assert 0 < four.measures["mean KL"] < four.measures["q99 KL"] < 1
    assert same.measures["mean KL"] == 0
    assert same.measures["top-1 agreement"] == 1
    assert [block.name for block in four.blocks] == ["model.layers.0", "model.layers.1"]
    assert all(block.accumulated > 0 for block in four.blocks)


@pytest.mark.parametrize("content", [b"", b" \n ", b"\xff\xfe\x00", b"a\0b"])
def test_what_is_no_text_is_refused(tmp_path, content):
    """An empty file, blanks, another encoding and a binary file are errors that name the file."""
    (tmp_path / "text.txt").write_bytes(content)

    with pytest.raises(StatisticsError, match=r"text\.txt"):
        evaluate_folder(tmp_path, tmp_path / "text.txt", tmp_path, [])
