"""What `calibrate` takes from a model's linears."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import lowbit
from lowbit.calibration import save_statistics
from lowbit.calibration.accumulate import state_bytes
from lowbit.errors import PlanError, StatisticsError, WriteError
from tests.calibration.models import Attention, Chain, assert_moments, batches


def test_linears_of_one_input_share_its_statistics():
    """q, k and v have one entry, o its own, and a linear that is never called is named, without statistics."""
    found = lowbit.calibrate(Attention(), batches())

    layers = found.contents.layers
    assert layers["q"].input == layers["k"].input == layers["v"].input != layers["o"].input
    assert len(found.contents.inputs) == 2
    assert found.never_called == ("unused",)
    assert found.get("unused") is None
    assert "unused" in " ".join(found.warnings())
    assert found.shape("q") == (24, 24)


def test_samples_go_to_the_halves_in_turn():
    """Rows 0, 2, ... of all batches make the first half, the others the held-out one, whatever the batches' sizes."""
    data = batches(1, size=9)[0]
    model = Attention()

    found = lowbit.calibrate(model, [data[:4], data[4:5], data[5:]])["q"]

    for moment, half in ((found.hessian, data[0::2]), (found.held_out, data[1::2])):
        assert_moments(moment, half)
    assert (found.tokens, found.held_out_tokens) == (25, 20)


def test_padding_does_not_count():
    """Rows that the attention mask marks by 0 are in no statistics, not even when they are NaN."""
    model, data = Attention(), batches(2)
    mask = torch.ones(4, 5, dtype=torch.int64)
    mask[1, 2:] = mask[2, 4:] = 0
    padded = [x.masked_fill(mask[..., None] == 0, torch.nan) for x in data]

    found = lowbit.calibrate(model, [{"x": x, "attention_mask": mask} for x in padded])["q"]

    rows = torch.cat([x[0::2][mask[0::2] == 1] for x in data])
    assert (found.tokens, found.held_out_tokens) == (18, 14)
    assert_moments(found.hessian, rows)


def test_a_token_mask_can_be_given():
    """`token_mask` says which rows count, in place of a keyword argument."""
    data = batches(2)

    found = lowbit.calibrate(Attention(), data, token_mask=lambda args, _: args[0][..., 0] > 0)

    assert found["q"].total_tokens == sum(int((x[..., 0] > 0).sum()) for x in data)
    assert found["o"].total_tokens == found["q"].total_tokens


@pytest.mark.parametrize(
    "form",
    [
        lambda x: x,
        lambda x: (x,),
        lambda x: [x, x.clone()],
        lambda x: {"x": x},
        lambda x: ((x,), {"attention_mask": None}),
    ],
    ids=["tensor", "tuple", "list", "dict", "pair"],
)
def test_batches_come_in_many_forms(form):
    """Tensors, tuples, dicts and pairs of both are passed on as arguments."""
    model = Attention()

    assert lowbit.calibrate(model, [form(x) for x in batches()])["q"].total_tokens == 120


class Switching(nn.Module):
    """Two linears that share their input, but not in every call."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.c = (nn.Linear(8, 8) for _ in range(3))
        self.calls = 0

    def forward(self, x):
        """From the second call on, b and c have another input than a."""
        self.calls += 1
        other = x if self.calls % 4 == 1 else x + 1
        return self.a(x) + self.b(other) + self.c(other)


def test_a_layer_that_shares_only_at_first_gets_its_own(tmp_path):
    """Sharing is checked at every call; b and c are split off and taken in a second pass, from the first batch on."""
    data = batches(4, width=8)

    found = lowbit.calibrate(Switching(), data, path=tmp_path / "s.safetensors")

    layers = found.contents.layers
    assert layers["a"].input != layers["b"].input == layers["c"].input
    rows = torch.cat([(x if index == 0 else x + 1)[0::2].reshape(-1, 8) for index, x in enumerate(data)])
    assert_moments(found["b"].hessian, rows)


def test_sharing_can_be_switched_off():
    """With share=False every linear has an entry, with the same statistics."""
    found = lowbit.calibrate(Attention(), batches(), share=False)

    assert len(found.contents.inputs) == 4
    assert torch.equal(found["q"].hessian, found["k"].hessian)


def test_a_layer_that_begins_later_is_taken_too():
    """A linear first called in the third batch has the tokens of that batch on."""

    class Late(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second = nn.Linear(8, 8), nn.Linear(8, 8)

        def forward(self, x):
            return self.second(x) if x.shape[1] == 3 else self.first(x)

    data = [torch.randn(2, tokens, 8) for tokens in (2, 2, 3, 3)]

    found = lowbit.calibrate(Late(), data)

    assert found["first"].total_tokens == 8
    assert found["second"].total_tokens == 12


def test_the_model_comes_back_as_it_was():
    """Training mode of each module, gradients and hooks are as before, also after an error."""
    model = nn.Sequential(nn.Linear(8, 8), nn.Dropout(), nn.Linear(8, 8)).train()
    model[1].eval()

    lowbit.calibrate(model, [torch.randn(4, 8)])
    with pytest.raises(StatisticsError):
        lowbit.calibrate(model, [torch.randn(4, 7)])

    assert model.training
    assert model[2].training
    assert not model[1].training
    assert not any(module._forward_pre_hooks for module in model.modules())
    assert model(torch.randn(4, 8)).requires_grad


def test_layers_are_chosen_and_renamed():
    """Regular expressions choose linears, `names` gives them the names of a checkpoint."""
    found = lowbit.calibrate(Attention(), batches(), layers=["^[qo]$"], names={"q": "model.block.q"})

    assert set(found) == {"model.block.q", "o"}


def test_linears_without_a_name_are_left_out(caplog):
    """A linear renamed to None is not watched, and said; without any left there is nothing to do."""
    found = lowbit.calibrate(Attention(), batches(), names={"q": None, "unused": None})

    assert set(found) == {"k", "v", "o"}
    assert found.never_called == ()
    assert "q, unused" in caplog.text
    with pytest.raises(StatisticsError, match="is a layer of the checkpoint"):
        lowbit.calibrate(nn.Linear(8, 4), [torch.randn(6, 8)], names={"": None})


def test_a_bare_linear_is_called_weight():
    """As in `quantize_`, a linear by itself goes by the name "weight"."""
    assert set(lowbit.calibrate(nn.Linear(8, 4), [torch.randn(6, 8)])) == {"weight"}


def test_wide_inputs_keep_the_diagonal():
    """Where H does not fit into the memory, or K is above full_up_to, the diagonal is kept, and the facts say so."""
    data = batches(width=64)
    model = Chain()
    full = lowbit.calibrate(model, data)
    small = lowbit.calibrate(model, data, full_up_to=100)

    kinds = [facts.kind for facts in small.contents.inputs.values()]
    assert kinds == ["full", "full", "diagonal", "diagonal"]
    torch.testing.assert_close(small["steps.3"].hessian, full["steps.3"].diagonal, rtol=1e-5, atol=1e-7)


def test_a_flattened_input_keeps_its_samples_apart():
    """A linear that sees [B * T, K] has the halves and the padding of the samples, as one that sees [B, T, K]."""

    class Flat(nn.Module):
        def __init__(self):
            super().__init__()
            self.wide, self.flat = nn.Linear(8, 8), nn.Linear(8, 4)

        def forward(self, x, attention_mask):
            self.wide(x)
            return self.flat((x + 0).reshape(-1, 8) * 2)

    x, mask = torch.randn(4, 6, 8), torch.ones(4, 6, dtype=torch.bool)
    mask[3, 1:] = False

    found = lowbit.calibrate(Flat(), [{"x": x, "attention_mask": mask}])

    torch.testing.assert_close(found["flat"].held_out, found["wide"].held_out * 4)
    assert found["flat"].held_out_tokens == 7


@pytest.mark.parametrize(
    ("data", "said"),
    [
        ([], "there are no batches"),
        (7, "batches: 'int' object is not iterable"),
        (["text"], "batch 0: is a str"),
        ([torch.randn(2, 3)], "batch 0: the model raised RuntimeError after the linear q"),
        ([torch.full((2, 3, 24), torch.nan)], "q: its input has NaN or infinite values in batch 0"),
        ([{"y": torch.randn(2, 24)}], "batch 0: the model raised TypeError before its first linear"),
    ],
)
def test_bad_batches_are_one_clear_error(data, said):
    """What cannot be run is an error that names the batch, and the layer where there is one."""
    with pytest.raises(StatisticsError, match=said):
        lowbit.calibrate(Attention(), data)


def test_an_iterable_that_raises_is_named():
    """An exception of the user's generator names the batch that it was asked for."""

    def broken():
        yield torch.randn(2, 3, 24)
        raise KeyError("image_17")

    with pytest.raises(StatisticsError, match="batch 1: the iterable raised KeyError: 'image_17'"):
        lowbit.calibrate(Attention(), broken())


def test_a_model_without_linears_is_refused():
    """There must be something to calibrate, and patterns must match something."""
    with pytest.raises(StatisticsError, match=r"no nn\.Linear"):
        lowbit.calibrate(nn.Sequential(nn.ReLU()), [torch.randn(2, 3)])
    with pytest.raises(PlanError, match="no linear matches"):
        lowbit.calibrate(Attention(), batches(), layers=["mlp"])
    with pytest.raises(PlanError, match="no regular expression"):
        lowbit.calibrate(Attention(), batches(), layers=["("])
    with pytest.raises(PlanError, match="memory 'much'"):
        lowbit.calibrate(Attention(), batches(), memory="much")


def test_few_tokens_are_warned_about():
    """T/N below 1 and a missing held-out half are said, with numbers."""
    found = lowbit.calibrate(Attention(), [torch.randn(1, 6, 24)])

    said = " ".join(found.warnings())
    assert "T/N = 6/24 = 0.25" in said
    assert "nothing held out" in said
    assert found["q"].held_out is None


def test_a_matrix_without_room_is_warned_about(tmp_path):
    """What memory has no room for is said, with the widest input; what was asked to be a diagonal is not."""
    room = state_bytes(64, full=True)
    crowded = lowbit.calibrate(Chain(), batches(width=64), memory=room, path=tmp_path / "s.safetensors")
    asked = lowbit.calibrate(Chain(), batches(width=64), full_up_to=100)
    said = [line for line in crowded.warnings() if "only the diagonal" in line]
    kinds = [facts.kind for facts in crowded.contents.inputs.values()]

    assert 0 < kinds.count("diagonal") < len(kinds)
    assert len(said) == 1
    assert f"{kinds.count('diagonal')} of {len(kinds)} inputs" in said[0]
    assert f"in {room} bytes of memory" in said[0]
    assert not any("only the diagonal" in line for line in asked.warnings())


def test_a_path_that_names_a_folder_is_refused(tmp_path):
    """A separator at its end is not dropped: neither while statistics are taken nor where they are saved."""
    model, data = nn.Linear(8, 8), [torch.randn(4, 8)]
    with pytest.raises(WriteError, match=r"is a folder; name a file to write, such as .*stats\.safetensors"):
        lowbit.calibrate(model, data, path=f"{tmp_path}/name/")
    with pytest.raises(WriteError, match="is a folder"):
        save_statistics(lowbit.calibrate(model, data), f"{tmp_path}/name/")
    assert list(tmp_path.iterdir()) == []
