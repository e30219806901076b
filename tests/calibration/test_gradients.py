"""What `calibrate(gradients=...)` takes from passes backward."""

from __future__ import annotations

import functools
import json
import re

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn

import lowbit
from lowbit.calibration import StatisticsFile, save_statistics
from lowbit.calibration.merge import Merged
from lowbit.errors import StatisticsError
from tests.calibration.models import Attention, Chain, batches, same
from tests.calibration.test_passes import dying


class Line(nn.Module):
    """Two linears in a row, so that the Jacobian at the first one's output is the second one's weight."""

    def __init__(self, *, inplace=False, without=False):
        super().__init__()
        self.first, self.second = nn.Linear(24, 16), nn.Linear(16, 24)
        self.inplace, self.without = inplace, without

    def forward(self, x, attention_mask=None):
        """x [B, T, 24]."""
        with torch.no_grad() if self.without else torch.enable_grad():
            y = self.first(x)
        if self.inplace:
            y += 0.0
        return {"tokens": torch.ones(3, dtype=torch.int64), "y": self.second(y)}


def many(size=256):
    """Enough random rows for moments that are right to a few percent."""
    return batches(16, size=size, tokens=4)


@pytest.mark.parametrize("inplace", [False, True])
def test_they_are_the_second_moments_of_the_jacobian(inplace):
    """E[g g^T] is J^T J: of the output itself the identity, of the layer before it W^T W, in both halves."""
    torch.manual_seed(0)
    model = Line(inplace=inplace)

    found = lowbit.calibrate(model, many(), gradients=True)

    w = model.second.weight.detach()
    for name, expected in (("second", torch.eye(24)), ("first", w.mT @ w)):
        for moment in (found[name].output_hessian, found[name].output_held_out):
            assert float((moment - expected).norm() / expected.norm()) < 0.1
        assert not torch.equal(found[name].output_hessian, found[name].output_held_out)


def test_what_counts_is_the_callers_choice():
    """With an objective of one output, only what reaches it has a gradient."""
    torch.manual_seed(0)
    model = Line()

    found = lowbit.calibrate(model, many(), gradients=lambda output, _: output["y"][..., :1])

    second = found["second"].output_hessian
    assert float(second[0, 0]) == pytest.approx(1.0, rel=0.15)
    assert not second[1:].any()


def test_padding_has_no_gradient():
    """Rows that the mask marks by 0 do not count, in the output or in a layer."""
    torch.manual_seed(0)
    model, x = Line(), torch.randn(64, 5, 24)
    mask = torch.ones(64, 5, dtype=torch.int64)
    mask[:, 3:] = 0
    x[:, 3:] = 1e6

    padded = lowbit.calibrate(model, [{"x": x, "attention_mask": mask}] * 8, gradients=True)["second"]
    alone = lowbit.calibrate(model, [x[:, :3]] * 8, gradients=True)["second"]

    assert padded.total_tokens == alone.total_tokens
    assert float(padded.output_hessian.trace()) == pytest.approx(float(alone.output_hessian.trace()), rel=0.1)


def test_the_model_is_left_as_it_was():
    """Parameters ask for gradients as before, none has one, and no hook stays."""
    model = Attention()
    model.q.requires_grad_(False)

    lowbit.calibrate(model, batches(), gradients=True)

    frozen = set(model.q.parameters())
    assert all(p.requires_grad == (p not in frozen) for p in model.parameters())
    assert all(p.grad is None for p in model.parameters())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_layers_that_no_gradient_reaches_have_none():
    """A linear under no_grad has its input's statistics and no gradient's."""
    found = lowbit.calibrate(Line(without=True), batches(), gradients=True)

    assert found["first"].hessian is not None
    assert found["first"].output_hessian is None
    assert found["second"].output_hessian is not None
    assert found.describe()["gradients"] == 1


def test_without_room_the_largest_have_none(caplog):
    """Gradients take no more than `memory`; who has none is said."""
    model = Chain((24, 24, 24, 4097, 24))  # a number of rows that has no halves

    found = lowbit.calibrate(model, batches(), gradients=True, memory="64MiB", full_up_to=24)

    assert [found[f"steps.{i}"].output_hessian is None for i in range(4)] == [False, False, True, False]
    assert "no room for the gradients of 1 linears (steps.2)" in caplog.text


def test_heads_over_a_vocabulary_have_none(monkeypatch, caplog):
    """They would take more memory than all others; these are taken in the first pass, without a word of the head."""
    monkeypatch.setattr("lowbit.calibration.gradients._HEADS", 4096)
    calls = []
    model = Chain((24, 24, 4095, 4096))
    model.register_forward_hook(lambda *_: calls.append(1))

    found = lowbit.calibrate(model, batches(4), gradients=True, memory="1GB")

    assert [found[f"steps.{i}"].output_hessian is None for i in range(3)] == [False, False, True]
    assert len(calls) == 4
    assert not caplog.records


def test_files_hold_them(tmp_path):
    """Written, read, saved again and merged with themselves they are the same."""
    data = batches()
    taken = lowbit.calibrate(Attention(), data, gradients=True)
    model = Attention()
    written = lowbit.calibrate(model, data, gradients=True, path=tmp_path / "s.safetensors")

    assert same(written, lowbit.calibrate(model, data, gradients=True))
    with StatisticsFile(save_statistics(taken, tmp_path / "again.safetensors")) as again:
        assert same(again, taken)
        assert again["q"].output_hessian.shape == (24, 24)
        assert not torch.equal(again["q"].output_hessian, again["k"].output_hessian)
    twice = Merged([taken, taken])
    for name in taken:
        torch.testing.assert_close(twice[name].output_hessian, taken[name].output_hessian)


def test_without_room_for_any_there_are_none(tmp_path, caplog):
    """Statistics of the inputs are taken all the same, and a warning says that more memory is needed."""
    how = {"gradients": True, "memory": "10KB", "path": tmp_path / "s.safetensors"}

    with lowbit.calibrate(Attention(), batches(), **how) as found:
        assert all(known.output_hessian is None and known.tokens for known in found.values())

    assert "no room for the gradients of 5 linears" in caplog.text


def test_of_a_head_alone_there_are_none():
    """Heads over a vocabulary have no gradients, so that there is no way back to run."""
    model = nn.Sequential(nn.Linear(24, 24), nn.Linear(24, 30_000))

    found = lowbit.calibrate(model, batches(), gradients=True, layers=["^1$"])

    assert found["1"].output_hessian is None
    assert found["1"].tokens


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda facts: facts["layers"]["second"].update(output="g1"), "second: the moments of its output are [24, 24]"),
        (lambda facts: facts["layers"]["second"].update(output="g7"), "g7.output_hessian of shape [24] is not"),
        (lambda facts: facts["layers"]["first"].update(output="g0"), "second: the moments of its output are [24, 24]"),
    ],
)
def test_a_damaged_directory_is_refused(tmp_path, change, said):
    """An output that is not there, or of which layers differ in N, is said by its name."""
    path = tmp_path / "s.safetensors"
    save_statistics(lowbit.calibrate(Line(), batches(), gradients=True), path)
    with safe_open(path, "pt") as file:
        facts = json.loads(file.metadata()["lowbit.statistics"])
        tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    change(facts)
    save_file(tensors, path, {"lowbit.statistics": json.dumps(facts)})

    with pytest.raises(StatisticsError, match=re.escape(said)):
        StatisticsFile(path)


def test_merged_with_statistics_without_them_they_stay():
    """Of several collections those that have gradients give them, by their tokens."""
    model, data = Attention(), batches(8)
    first = lowbit.calibrate(model, data[:2], gradients=True)
    second = lowbit.calibrate(model, data[2:], gradients=True)
    none = lowbit.calibrate(model, data)

    found = Merged([first, none, second])["o"].output_hessian

    parts = (first["o"].output_hessian, second["o"].output_hessian)
    torch.testing.assert_close(found, parts[0] * 0.25 + parts[1] * 0.75)


@pytest.mark.parametrize("after", [4, 7, 9, 13])
def test_an_interrupted_run_goes_on(tmp_path, after):
    """Killed in the first pass, in the one backward or in a later one, the next run ends with the same bits."""
    torch.manual_seed(1)
    model, path = Chain((160, 160, 160, 160, 32)), tmp_path / "s.safetensors"
    data = batches(6, width=160)
    how = {"path": path, "gradients": True, "memory": 3 * 1024 * 1024, "snapshot_every": 0}
    with pytest.raises(KeyboardInterrupt):
        lowbit.calibrate(model, dying(data, after), **how)
    assert not path.exists()

    found = lowbit.calibrate(model, data, **how)

    whole = lowbit.calibrate(model, data, **{**how, "path": tmp_path / "other.safetensors"})
    assert found.contents == whole.contents
    assert same(found, whole)
    assert [file.name for file in tmp_path.iterdir() if "progress" in file.name or "partial" in file.name] == []


class Cut(torch.autograd.Function):
    """An operation without a backward."""

    @staticmethod
    def forward(ctx, x):
        """x itself."""
        return x.clone()


@pytest.mark.parametrize(
    ("tail", "said"),
    [
        (Cut.apply, "no gradient can be taken through the model"),
        (lambda x: x.argmax(-1), "no floating-point tensor"),
        (lambda x: torch.sqrt(x * 0), "NaN or infinite"),
    ],
)
def test_a_model_without_gradients_is_one_error(tail, said, tmp_path):
    """What cannot be differentiated is said, with what to do, and no file is left."""

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(24, 24)

        def forward(self, x):
            return tail(self.linear(x))

    with pytest.raises(StatisticsError, match=said):
        lowbit.calibrate(Model(), batches(), gradients=True, path=tmp_path / "s.safetensors")
    assert not (tmp_path / "s.safetensors").exists()


def test_an_iterator_does():
    """Batches that can be had only once give gradients, too: they take no pass of their own."""
    model = Attention()

    found = lowbit.calibrate(model, iter(batches()), gradients=True)

    assert same(found, lowbit.calibrate(model, batches(), gradients=True))


@pytest.mark.parametrize("after", [1, 2, 3, 5])
def test_an_interrupted_first_pass_goes_on_with_its_gradients(tmp_path, after):
    """Killed in the pass that takes both, the next run goes on at that batch, and the file is the same to the byte."""
    torch.manual_seed(1)
    model, data = Chain((24, 40, 24, 32)), batches(6, size=100, tokens=7)
    stopped, straight = tmp_path / "s.safetensors", tmp_path / "other.safetensors"
    how = {"gradients": True, "snapshot_every": 0}
    with pytest.raises(KeyboardInterrupt):
        lowbit.calibrate(model, dying(data, after), path=stopped, **how)
    calls = []
    handle = model.register_forward_hook(lambda *_: calls.append(1))

    lowbit.calibrate(model, data, path=stopped, **how).close()

    handle.remove()
    assert len(calls) == len(data) - after
    lowbit.calibrate(model, data, path=straight, **how).close()
    assert stopped.read_bytes() == straight.read_bytes()


def test_a_batch_that_does_not_fit_is_named():
    """Where the model raises while gradients are taken too, the error names the batch and the layer."""
    with pytest.raises(StatisticsError, match=r"batch 1: the model raised .* after the linear q.*gradients"):
        lowbit.calibrate(Attention(), [*batches(1), torch.randn(2, 3)], gradients=True)


def test_a_lost_file_is_begun_again(tmp_path):
    """Where the progress of an interrupted run is left but not its unfinished file, gradients are taken again."""
    torch.manual_seed(1)
    model, path = Chain((160, 160, 160, 160, 32)), tmp_path / "s.safetensors"
    data = batches(6, width=160)
    how = {"gradients": True, "memory": 3 * 1024 * 1024, "snapshot_every": 0}
    with pytest.raises(KeyboardInterrupt):
        lowbit.calibrate(model, dying(data, 13), path=path, **how)
    for file in tmp_path.glob("*.partial*"):
        file.unlink()

    found = lowbit.calibrate(model, data, path=path, **how)

    assert same(found, lowbit.calibrate(model, data, path=tmp_path / "other.safetensors", **how))


def test_an_objective_needs_no_name():
    """Any callable may say what counts; the file has the name of its class where it has none of its own."""
    found = lowbit.calibrate(Line(), batches(), gradients=functools.partial(lambda key, out, _: out[key], "y"))

    assert found["first"].output_hessian is not None
    assert found.contents.options["gradients"] == "partial"


def test_a_gradient_of_zeros_is_none():
    """A layer that reaches the output only through a zero, which nothing could be judged by, has no gradient."""
    found = lowbit.calibrate(Line(), batches(), gradients=lambda output, _: output["y"] * 0)

    assert found["first"].hessian is not None
    assert found["first"].output_hessian is None


def test_parameters_of_inference_mode_are_one_error():
    """A model made in inference mode, through which there is no gradient, is said to have none."""
    with torch.inference_mode():
        model = Chain((24, 24, 24))

    with pytest.raises(StatisticsError, match="calibrate without gradients"):
        lowbit.calibrate(model, batches(), gradients=True)
