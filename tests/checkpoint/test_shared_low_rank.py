"""Conversions in which layers with the same input share smooth_factor and proj_down: who does, and what is written."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from lowbit.checkpoint import convert_group
from lowbit.checkpoint.convert import convert
from lowbit.checkpoint.layer_statistics import InMemory
from lowbit.checkpoint.plan import Plan, make_plan
from lowbit.checkpoint.quantized_source import look_for_layers
from lowbit.checkpoint.shared_low_rank import group_name, groups_of
from lowbit.checkpoint.source import open_source
from lowbit.cli import app
from lowbit.errors import PlanError
from lowbit.formats import parse_spec
from lowbit.solvers import Member, solve_shared
from tests.solvers.test_svdquant import power_law, seen
from tests.support import gaussian

SPEC = "svdquant_w4a4(rank=8)"
K = 128
QKV = ("blocks.0.attn.to_k", "blocks.0.attn.to_q", "blocks.0.attn.to_v")  # in the order of the file
GROUP = "blocks.0.attn.to_k+to_q+to_v"


def weights(*names: str, k: int = K, first: int = 64) -> dict[str, torch.Tensor]:
    """Weights of several heights, by key."""
    return {f"{name}.weight": gaussian(first + 32 * i, k, seed=i) for i, name in enumerate(names)}


def opened(folder, tensors):
    """An open file of some tensors."""
    save_file(tensors, folder / "in.safetensors")
    return open_source(folder / "in.safetensors")


def groups(folder, tensors, spec=SPEC, statistics=None, **options) -> dict[str, list[str]]:
    """The layers of each group in a plan."""
    with opened(folder, tensors) as source:
        plan = make_plan(source, spec, preset="none", share_low_rank=True, statistics=statistics, **options)
    found = groups_of(plan.tensors())
    return {name: [tensor.layer for tensor in group] for name, group in found.items()}


@pytest.fixture(scope="module")
def known():
    """Statistics of an input with outlier channels."""
    return seen(power_law(1024, 1, K))


@pytest.mark.parametrize(
    "names",
    [
        QKV,
        ("layers.3.self_attn.q_proj", "layers.3.self_attn.k_proj", "layers.3.self_attn.v_proj"),
        ("b.0.attn.add_q_proj", "b.0.attn.add_k_proj", "b.0.attn.add_v_proj"),
        ("b.0.img_attn_q", "b.0.img_attn_k", "b.0.img_attn_v"),
        ("b.0.txt_q", "b.0.txt_k", "b.0.txt_v"),
        ("encoder.layer.0.attention.self.query", "encoder.layer.0.attention.self.key"),
        ("layers.0.attention.wq", "layers.0.attention.wk", "layers.0.attention.wv"),
        ("layers.0.mlp.gate_proj", "layers.0.mlp.up_proj"),
    ],
)
def test_names_tell_who_reads_the_same_input(tmp_path, names):
    """Without statistics query, key and value are one group, gate and up another, and nothing else is in them."""
    prefix = names[0].rpartition(".")[0]
    others = (f"{prefix}.to_out.0", f"{prefix}.proj", names[0].replace(".0.", ".7.").replace(".3.", ".7."))
    found = groups(tmp_path, weights(*names, *others))

    assert found == {group_name(sorted(names)): sorted(names)}


def test_a_query_of_cross_attention_stays_alone(tmp_path):
    """By names the query of an attention to a text is not joined with its key and value, which read another input."""
    names = [f"blocks.0.attn2.to_{role}" for role in "qkv"]
    assert groups(tmp_path, weights(*names)) == {"blocks.0.attn2.to_k+to_v": names[1:]}


def test_image_and_text_are_two_groups(tmp_path):
    """to_q and add_q_proj of one attention read two inputs."""
    names = [*QKV, *(f"blocks.0.attn.add_{role}_proj" for role in "qkv")]
    assert sorted(groups(tmp_path, weights(*names)).values()) == [sorted(names[3:]), names[:3]]


def test_statistics_know_better_than_names(tmp_path, known):
    """The same input makes a group whatever the names; other inputs none; and a block is never left."""
    names = ("blocks.0.attn.to_q", "blocks.0.attn.to_k", "blocks.0.mlp.up", "blocks.1.mlp.up", "blocks.0.mod.1")
    other = replace(known, tokens=known.tokens + 1)
    by_layer = dict.fromkeys(names, known) | {"blocks.0.attn.to_k": other}
    found = groups(tmp_path, weights(*names), statistics=InMemory(by_layer))

    assert found == {"blocks.0.attn.to_q+mlp.up+mod.1": [names[0], names[2], names[4]]}


def test_layers_that_differ_do_not_share(tmp_path):
    """Another format, width or dtype keeps a layer out of its group."""
    tensors = weights(*QKV)
    tensors["blocks.0.attn.to_q.weight"] = tensors["blocks.0.attn.to_q.weight"].bfloat16()
    assert groups(tmp_path, tensors) == {"blocks.0.attn.to_k+to_v": [QKV[0], QKV[2]]}
    rules = [("to_v", "svdquant_w4a4(rank=16)")]
    assert groups(tmp_path, weights(*QKV), layer_rules=rules) == {"blocks.0.attn.to_k+to_q": list(QKV[:2])}


def test_nothing_to_share_is_an_error(tmp_path):
    """The option for a format without a low rank, or for layers with inputs of their own, says what to do."""
    with pytest.raises(PlanError, match=r"--share-low-rank: no two layers of svdquant_w4a4 read the same input"):
        groups(tmp_path, weights(*QKV), spec="nvfp4")
    with pytest.raises(PlanError, match=r"--share-low-rank: no two layers"):
        groups(tmp_path, weights("a.fc1", "a.fc2"))


def parts_of(path):
    """The parts of each layer of a file."""
    with open_source(path) as source:
        held = look_for_layers(source, source.components[0])
        return {name: held.load(stored) for name, stored in held.layers.items()}


@pytest.mark.parametrize("given", [True, False])
def test_what_is_written_is_what_the_solver_gives(tmp_path, known, given):
    """The file holds solve_shared's parts, one smooth_factor and one proj_down, and the report names the group."""
    tensors = weights(*QKV, "blocks.0.attn.to_out.0") | {"blocks.0.attn.to_q.bias": torch.linspace(-1, 1, 96)}
    statistics = InMemory(dict.fromkeys(QKV, replace(known, mean=torch.full((K,), 0.1)))) if given else None
    with opened(tmp_path, tensors) as source:
        plan = make_plan(source, SPEC, preset="none", share_low_rank=True, statistics=statistics)
        report = convert(source, tmp_path / "out.safetensors", plan, statistics=statistics, jobs=1)
    made, layers = parts_of(tmp_path / "out.safetensors"), {layer.layer: layer for layer in report.layers}
    members = [Member(tensors[f"{name}.weight"], layers[name].solver, name.endswith("to_q")) for name in QKV]
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    expected = solve_shared(members, parse_spec(SPEC), statistics.get(QKV[0]) if given else None)
    torch.set_num_threads(threads)

    for name, solution in zip(QKV, expected.solutions, strict=True):
        assert all(torch.equal(made[name][part], value) for part, value in solution.parts.items())
        for part in ("smooth_factor", "proj_down"):
            assert torch.equal(made[name][part], made[QKV[0]][part])
        assert layers[name].shares == GROUP
        assert layers[name].accuracy.sqnr > 10
        assert (layers[name].error is None) == (not given)
    assert layers["blocks.0.attn.to_out.0"].shares == ""
    assert not torch.equal(made["blocks.0.attn.to_out.0"]["proj_down"], made[QKV[0]]["proj_down"])


def test_a_group_that_falls_back_says_so(tmp_path, known, monkeypatch):
    """Where sharing is worse than rounding to nearest, the report has no group and the reason, for all three."""
    statistics = InMemory(dict.fromkeys(QKV, known))

    def alone(members, fmt, statistics, **options):
        done = solve_shared(members, fmt, statistics, **options)
        return replace(done, shared=False, solutions=tuple(replace(one, note="why") for one in done.solutions))

    with opened(tmp_path, weights(*QKV)) as source:
        plan = make_plan(source, SPEC, preset="none", share_low_rank=True, statistics=statistics, solver="svdquant")
        monkeypatch.setattr(convert_group, "solve_shared", alone)
        report = convert(source, tmp_path / "out.safetensors", plan, statistics=statistics, jobs=1)
    assert [(layer.shares, layer.note) for layer in report.layers] == [("", "why")] * 3


def test_a_plan_tells_of_its_groups_and_is_read_back(tmp_path):
    """The JSON names the group of each layer, a plan file gives it back, and the notes count the groups."""
    with opened(tmp_path, weights(*QKV)) as source:
        plan = make_plan(source, SPEC, preset="none", share_low_rank=True)
        assert not groups_of(make_plan(source, SPEC, preset="none").tensors())
    plan.save(tmp_path / "plan.json")
    data = json.loads((tmp_path / "plan.json").read_text())
    assert {entry["shares"] for entry in data["components"][""]["tensors"].values()} == {GROUP}
    assert any(
        note == f"3 layers in 1 groups share smooth_factor and proj_down, such as {GROUP}" for note in plan.notes
    )
    assert Plan.load(tmp_path / "plan.json") == plan


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ({"format": "svdquant_w4a4(rank=16)"}, "differ in format, solver, dtype or the number of columns"),
        ({"format": "nvfp4"}, "only matrices of svdquant_w4a4"),
        ({"solver": "rtn"}, "differ in format, solver"),
        ({"solver": "learned_rounding"}, "only matrices of svdquant_w4a4 by one of svdquant"),
    ],
)
def test_an_edited_plan_that_cannot_share_is_refused(tmp_path, change, why):
    """A group of layers that differ, or of a format without a low rank, is an error that names a tensor."""
    with opened(tmp_path, weights(*QKV)) as source:
        data = make_plan(source, SPEC, preset="none", share_low_rank=True).to_json()
    data["components"][""]["tensors"]["blocks.0.attn.to_k.weight"] |= change
    with pytest.raises(PlanError, match=rf"blocks.0.attn.to_k.weight.*{why}"):
        Plan.from_json(data)


OTHER = "blocks.0.attn.to_out.0"


def edited(folder, shares=GROUP):
    """A plan in which to_out, which reads another input, is in the group of query, key and value, or `shares`."""
    with opened(folder, weights(*QKV, OTHER)) as source:
        data = make_plan(source, SPEC, preset="none", share_low_rank=True, solver="rtn").to_json()
    data["components"][""]["tensors"][f"{OTHER}.weight"]["shares"] = shares
    return Plan.from_json(data)


def test_an_edited_plan_cannot_share_across_inputs_that_statistics_know(tmp_path, known):
    """Statistics by which a layer reads another input than the rest of its group end the conversion, naming both."""
    plan, other = edited(tmp_path), replace(known, tokens=known.tokens + 1)
    same, apart = InMemory(dict.fromkeys((*QKV, OTHER), known)), InMemory(dict.fromkeys(QKV, known) | {OTHER: other})
    with open_source(tmp_path / "in.safetensors") as source:
        with pytest.raises(PlanError, match=rf"{QKV[0]}.weight' and '{OTHER}.weight'.*read different inputs; take"):
            convert(source, tmp_path / "out.safetensors", plan, statistics=apart, jobs=1)
        assert not list(tmp_path.glob("out*"))
        report = convert(source, tmp_path / "out.safetensors", plan, statistics=same, jobs=1)

    assert {layer.shares for layer in report.layers} == {report.layers[0].shares} != {""}


def test_a_group_that_only_an_edited_plan_knows_of_is_noted(tmp_path):
    """Without statistics a group that names do not make is converted, and a note says that nobody knows."""
    edited(tmp_path).save(tmp_path / "edited.json")
    with opened(tmp_path, weights(*QKV, OTHER)) as source:
        make_plan(source, SPEC, preset="none", share_low_rank=True, solver="rtn").save(tmp_path / "named.json")
    said = {}
    for name in ("edited", "named"):
        how = [
            "convert",
            tmp_path / "in.safetensors",
            "-o",
            tmp_path / f"{name}.out",
            "--plan",
            f"{tmp_path / name}.json",
        ]
        done = CliRunner().invoke(app, [str(part) for part in how])
        assert done.exit_code == 0, done.output
        said[name] = "neither statistics nor names tell" in " ".join(done.output.split())
    assert said == {"edited": True, "named": False}


@pytest.mark.parametrize("last", [1, 2])
def test_layers_of_two_shards_share(tmp_path, last):
    """A group over two files is in that of its first layer; the index and its size are those of the files there are."""
    (tmp_path / "in").mkdir()
    names = ("a.safetensors", "b.safetensors")
    tensors = weights(*QKV) | ({"blocks.1.norm.weight": torch.ones(K)} if last == 2 else {})
    places = {key: names[index > 1] for index, key in enumerate(tensors)}
    for file in names:
        save_file({key: tensors[key] for key in tensors if places[key] == file}, tmp_path / "in" / file)
    index = {"metadata": {}, "weight_map": places}
    (tmp_path / "in" / "model.safetensors.index.json").write_text(json.dumps(index))
    with open_source(tmp_path / "in") as source:
        plan = make_plan(source, SPEC, preset="none", share_low_rank=True)
        convert(source, tmp_path / "out", plan, jobs=1)
    made = parts_of(tmp_path / "out")
    assert all(torch.equal(made[name]["proj_down"], made[QKV[0]]["proj_down"]) for name in QKV)
    files = {path.name: load_file(path) for path in (tmp_path / "out").glob("*.safetensors")}
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    assert sorted(files) == list(names[:last])
    assert index["weight_map"] == {key: name for name, found in files.items() for key in found}
    sizes = [tensor.nbytes for found in files.values() for tensor in found.values()]
    assert index["metadata"]["total_size"] == sum(sizes)


def test_a_resumed_run_takes_the_group_as_one_piece(tmp_path, monkeypatch):
    """An interrupted run goes on with the same bytes; a group is done as a whole or not at all."""
    with opened(tmp_path, weights(*QKV, "blocks.1.fc")) as source:
        plan = make_plan(source, SPEC, preset="none", share_low_rank=True)
        convert(source, tmp_path / "whole.safetensors", plan, jobs=1)

        def dies(*arguments, **options):
            raise KeyboardInterrupt

        with monkeypatch.context() as patch:
            patch.setattr("lowbit.checkpoint.convert_layer.solve", dies)
            with pytest.raises(KeyboardInterrupt):
                convert(source, tmp_path / "out.safetensors", plan, jobs=1)
        report = convert(source, tmp_path / "out.safetensors", plan, jobs=1)
    assert report.resumed == 1
    assert [layer.shares for layer in report.layers] == [GROUP, GROUP, GROUP, ""]
    assert (tmp_path / "out.safetensors").read_bytes() == (tmp_path / "whole.safetensors").read_bytes()


def test_the_command_shares(tmp_path):
    """`lowbit convert --share-low-rank --json` names the group of each layer; `lowbit plan` shows it."""
    save_file(weights(*QKV), tmp_path / "in.safetensors")
    how = [str(tmp_path / "in.safetensors"), "--format", SPEC, "--preset", "none", "--share-low-rank"]
    shown = CliRunner().invoke(app, ["plan", *how])
    assert shown.exit_code == 0, shown.output
    assert f"3 layers in 1 groups share smooth_factor and proj_down, such as {GROUP}" in " ".join(shown.output.split())
    done = CliRunner().invoke(app, ["convert", *how, "-o", str(tmp_path / "out.safetensors"), "--json"])
    assert done.exit_code == 0, done.output
    assert [layer["shares"] for layer in json.loads(done.stdout)["layers"]] == [GROUP] * 3
