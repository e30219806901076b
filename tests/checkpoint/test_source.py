"""Whatever a user points at is opened as the right set of tensors, or refused for one stated reason."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from lowbit.checkpoint.source import open_source
from lowbit.errors import CheckpointError

INDEX = "model.safetensors.index.json"
FILES_OF_THIS_PROCESS = Path("/proc/self/fd")


def save(path, **tensors) -> None:
    """Write a file; a number becomes a tensor of two such values."""
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file({name: torch.full((2,), float(value)) for name, value in tensors.items()}, path)


def save_index(path, weight_map: dict[str, str]) -> None:
    """Write an index."""
    path.write_text(json.dumps({"metadata": {"total_size": 16}, "weight_map": weight_map}))


@pytest.fixture
def sharded(tmp_path):
    """A transformers folder: two shards, their index, a config, a tokenizer, and the pickle that came first."""
    folder = tmp_path / "llm"
    save(folder / "model-00001-of-00002.safetensors", a=1, b=2)
    save(folder / "model-00002-of-00002.safetensors", c=3)
    first, second = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"
    save_index(folder / INDEX, {"a": first, "b": first, "c": second})
    for name in ("config.json", "tokenizer.model", "pytorch_model.bin", "pytorch_model.bin.index.json", ".hidden"):
        (folder / name).write_text("{}")
    return folder


@pytest.fixture
def pipeline(tmp_path):
    """A diffusers folder: a sharded transformer, a single-file text encoder, a scheduler, and copies at the top."""
    folder = tmp_path / "pipe"
    stem = "diffusion_pytorch_model"
    save(folder / f"transformer/{stem}-00001-of-00002.safetensors", a=1)
    save(folder / f"transformer/{stem}-00002-of-00002.safetensors", b=2)
    shards = [f"{stem}-0000{number}-of-00002.safetensors" for number in (1, 2)]
    save_index(folder / f"transformer/{stem}.safetensors.index.json", dict(zip("ab", shards, strict=True)))
    save(folder / "text_encoder/model.safetensors", a=5)
    save(folder / "text_encoder/model.fp16.safetensors", a=5)
    save(folder / "flux1-dev.safetensors", z=1)
    save(folder / "ae.safetensors", z=1)
    (folder / "scheduler").mkdir()
    for name in ("transformer/config.json", "text_encoder/config.json", "scheduler/scheduler_config.json"):
        (folder / name).write_text("{}")
    loaders = {"transformer": ["d", "T"], "text_encoder": ["t", "C"], "scheduler": ["d", "S"]}
    (folder / "model_index.json").write_text(json.dumps({"_class_name": "FluxPipeline", **loaders}))
    return folder


def relative(source, paths) -> list[str]:
    """Paths below a source's root, as text."""
    return [path.relative_to(source.root).as_posix() for path in paths]


def test_one_file(tmp_path):
    """A single file is one nameless component, nothing is copied beside it, and its tensors are read."""
    save(tmp_path / "m.safetensors", a=1, b=2)
    save(tmp_path / "other.safetensors", c=3)
    with open_source(tmp_path / "m.safetensors") as source:
        (component,) = source.components
        assert (source.kind, source.root, component.name, component.index) == ("file", tmp_path, "", None)
        assert list(source.files) == ["m.safetensors"]
        assert source.tensors == component.tensors
        assert list(source.tensors) == ["a", "b"]
        assert (source.extra_files, source.skipped_files) == ([], [])
        assert source.read(component, "b").tolist() == [2, 2]
        assert source.read("", "a").tolist() == [1, 1]
        assert source.read_rows("", "b", 1, 2).tolist() == [2]
        assert source.read_bytes("", "a") == bytes(source.read("", "a").numpy().tobytes())


@pytest.mark.parametrize("pointed_at", ["", INDEX])
def test_a_sharded_set(sharded, pointed_at):
    """By its folder or by its index, a sharded set is one component with its shards in order and its index."""
    with open_source(sharded / pointed_at) as source:
        (component,) = source.components
        names = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]
        assert source.kind == ("sharded" if pointed_at else "folder")
        assert source.root == sharded
        assert [shard.relative for shard in component.shards] == list(component.files) == names
        assert [shard.path for shard in component.shards] == [sharded / name for name in names]
        assert list(component.tensors) == list(source.tensors) == ["a", "b", "c"]
        assert component.index_name == INDEX
        assert component.index["metadata"] == {"total_size": 16}
        assert source.read(component, "c").tolist() == [3, 3]


def test_only_what_goes_with_the_weights_is_copied(sharded):
    """Config and tokenizer are copied; pickles, their index, the weights' own index and hidden files are not."""
    with open_source(sharded) as source:
        assert relative(source, source.extra_files) == ["config.json", "tokenizer.model"]
        skipped = [".hidden", "pytorch_model.bin", "pytorch_model.bin.index.json"]
        assert relative(source, source.skipped_files) == skipped


def test_a_diffusers_pipeline(pipeline, caplog):
    """Each subfolder that the pipeline loads is a component; keys that two share stay apart; copies are left out."""
    with open_source(pipeline) as source:
        assert [component.name for component in source.components] == ["text_encoder", "transformer"]
        assert sorted(source.tensors) == ["text_encoder/a", "transformer/a", "transformer/b"]
        assert source.read("text_encoder", "a").tolist() == [5, 5]
        assert source.read("transformer", "a").tolist() == [1, 1]
        assert source.components[0].index is None
        assert source.components[1].index_name == "diffusion_pytorch_model.safetensors.index.json"
        assert list(source.files) == [
            "text_encoder/model.safetensors",
            "transformer/diffusion_pytorch_model-00001-of-00002.safetensors",
            "transformer/diffusion_pytorch_model-00002-of-00002.safetensors",
        ]
        assert relative(source, source.extra_files) == [
            "model_index.json",
            "scheduler/scheduler_config.json",
            "text_encoder/config.json",
            "transformer/config.json",
        ]
        left_out = ["ae.safetensors", "flux1-dev.safetensors", "text_encoder/model.fp16.safetensors"]
        assert relative(source, source.skipped_files) == left_out
        assert all(str(pipeline / name) in caplog.text for name in left_out)
        with pytest.raises(CheckpointError, match=r"no component 'vae'; it has 'text_encoder', 'transformer'"):
            source.read("vae", "a")
        with pytest.raises(CheckpointError, match="no tensor 'x' in component 'transformer'"):
            source.read("transformer", "x")


def test_a_component_with_pickles_only_is_reported(pipeline, caplog):
    """A part of a pipeline that has no safetensors is left out with a warning that names it."""
    (pipeline / "text_encoder/model.safetensors").rename(pipeline / "text_encoder/model.bin")
    (pipeline / "text_encoder/model.fp16.safetensors").unlink()
    with open_source(pipeline) as source:
        assert [component.name for component in source.components] == ["transformer"]
    assert f"{pipeline / 'text_encoder'}: has weights only as pickle files" in caplog.text


def test_links_in_a_folder(sharded, tmp_path, caplog):
    """A linked subfolder is left out with a warning, and a file that links to the outside is not copied."""
    (tmp_path / "secret").write_text("s")
    (tmp_path / "elsewhere").mkdir()
    (sharded / "README.md").symlink_to(tmp_path / "secret")
    (sharded / "broken.json").symlink_to(tmp_path / "gone")
    (sharded / "alias.json").symlink_to("config.json")
    (sharded / "linked").symlink_to(tmp_path / "elsewhere")
    with open_source(sharded) as source:
        assert relative(source, source.extra_files) == ["alias.json", "config.json", "tokenizer.model"]
        assert {"README.md", "broken.json", "linked"} <= set(relative(source, source.skipped_files))
    assert f"{sharded / 'linked'}: is a link to a folder" in caplog.text


def test_a_hub_cache_is_read_through_its_links(sharded, tmp_path):
    """In the Hugging Face cache every file links into the repository's blobs: that is inside."""
    snapshot, blobs = tmp_path / "models--x/snapshots/0a1b", tmp_path / "models--x/blobs"
    shutil.copytree(sharded, snapshot)
    blobs.mkdir()
    for number, path in enumerate(sorted(snapshot.iterdir())):
        path.rename(blobs / str(number))
        path.symlink_to(f"../../blobs/{number}")
    with open_source(snapshot) as source:
        assert list(source.tensors) == ["a", "b", "c"]
        assert relative(source, source.extra_files) == ["config.json", "tokenizer.model"]


def test_shards_without_an_index(tmp_path):
    """Files that are numbered as one set are one component; when one is missing, it is named."""
    for number in range(1, 4):
        save(tmp_path / f"model-0000{number}-of-00003.safetensors", **{f"t{number}": number})
    with open_source(tmp_path) as source:
        assert sorted(source.tensors) == ["t1", "t2", "t3"]
        assert source.components[0].index is None
    (tmp_path / "model-00002-of-00003.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"shards are missing, the first is model-00002-of-00003\.safetensors"):
        open_source(tmp_path)


def test_several_sets_of_weights(sharded):
    """The index that transformers loads is preferred to a variant's; other files beside it are left out."""
    save(sharded / "consolidated.safetensors", a=1)
    save_index(sharded / "model.safetensors.index.fp16.json", {"a": "none.safetensors"})
    with open_source(sharded) as source:
        assert list(source.tensors) == ["a", "b", "c"]
        assert {"consolidated.safetensors", "model.safetensors.index.fp16.json"} <= set(
            relative(source, source.skipped_files)
        )
    (sharded / INDEX).rename(sharded / "other.safetensors.index.json")
    with pytest.raises(CheckpointError, match=r"has several indexes .*name the index"):
        open_source(sharded)


def test_a_tensor_that_the_index_does_not_name_is_read_too(sharded, caplog):
    """Nothing in the shards is lost because the index forgot it; the log says so."""
    save_index(sharded / INDEX, {"a": "model-00001-of-00002.safetensors", "c": "./model-00002-of-00002.safetensors"})
    with open_source(sharded) as source:
        assert sorted(source.tensors) == ["a", "b", "c"]
    assert "1 tensors are in the shards but not in the index (b)" in caplog.text


@pytest.mark.parametrize("pointed_at", ["", INDEX])
@pytest.mark.parametrize(
    "name",
    [
        "{parent}/outside.safetensors",
        "../outside.safetensors",
        "sub/../../outside.safetensors",
        r"..\outside.safetensors",
        r"C:\outside.safetensors",
        "link.safetensors",
        "sub/outside.safetensors",
        "a\0.safetensors",
        "",
    ],
)
def test_an_index_that_leaves_its_folder_is_refused(sharded, name, pointed_at):
    """However the path is spelled, or through a link, a shard outside the folder is refused by name and not opened."""
    save(sharded.parent / "outside.safetensors", a=1)
    (sharded / "link.safetensors").symlink_to(sharded.parent / "outside.safetensors")
    (sharded / "sub").symlink_to(sharded.parent)
    name = name.replace("{parent}", str(sharded.parent))
    save_index(sharded / INDEX, {"a": name})
    with pytest.raises(CheckpointError, match=r"index\.json: the index names .*outside the folder") as error:
        open_source(sharded / pointed_at)
    assert repr(name) in str(error.value)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{not json", "not JSON"),
        ("[]", "list, not an object"),
        ("{}", "no 'weight_map'"),
        ('{"weight_map": {"a": 3}}', "no 'weight_map'"),
        ('{"weight_map": {}}', "names no tensors"),
        ('{"weight_map": {"a": "x.safetensors", "a": "y.safetensors"}}', "'a' twice: two layers with one name"),
        ('{"weight_map": {"a": "gone.safetensors"}}', "shard 'gone.safetensors', which is missing; download"),
        ('{"weight_map": {"a": "."}}', "shard '.', which is missing"),
        ('{"weight_map": {"a": "pytorch_model.bin"}}', "never pickle"),
        (
            '{"weight_map": {"c": "model-00001-of-00002.safetensors"}}',
            "tensor 'c' in 'model-00001-of-00002.safetensors', which does not have it",
        ),
    ],
)
def test_an_unsound_index_is_refused(sharded, content, message):
    """Each fault of an index is one error that names the file."""
    (sharded / INDEX).write_text(content)
    with pytest.raises(CheckpointError, match=message) as error:
        open_source(sharded)
    assert str(sharded) in str(error.value)


def test_a_missing_index_is_refused(tmp_path):
    """An index that is not there is named."""
    with pytest.raises(CheckpointError, match=r"none\.safetensors\.index\.json: the index cannot be opened"):
        open_source(tmp_path / "none.safetensors.index.json")


def test_one_name_in_two_shards_is_refused(sharded):
    """Two shards with one tensor name would lose a layer: both files and the tensor are named."""
    save(sharded / "model-00002-of-00002.safetensors", a=3, c=3)
    with pytest.raises(CheckpointError, match=r"00002-of-00002\.\S+ tensor 'a' is also in \S+00001-of-00002.*one name"):
        open_source(sharded)


@pytest.mark.parametrize("name", ["m.bin", "m.pt", "m.pth", "m.ckpt", "m.PKL", "pytorch_model.bin.index.json"])
def test_a_pickle_is_refused(tmp_path, name):
    """A pickle is refused by its name before it is opened, whatever is in it."""
    with pytest.raises(CheckpointError, match=r"only safetensors, never pickle.*convert with"):
        open_source(tmp_path / name)


def test_a_path_that_is_not_there_is_refused(tmp_path):
    """A missing path is named."""
    with pytest.raises(CheckpointError, match=r"gone\.safetensors: does not exist"):
        open_source(tmp_path / "gone.safetensors")


def test_a_folder_without_weights_is_refused(tmp_path):
    """A folder without safetensors says so; one with pickles says that those are never read."""
    with pytest.raises(CheckpointError, match="no safetensors weights in this folder; check the path"):
        open_source(tmp_path)
    (tmp_path / "model.bin").write_bytes(b"x")
    with pytest.raises(CheckpointError, match="no safetensors weights in this folder; it has pickle files"):
        open_source(tmp_path)


def test_a_folder_of_unrelated_files_is_refused(tmp_path):
    """Several checkpoints in one folder are not mixed: one must be named."""
    for name in ("one", "two"):
        save(tmp_path / f"{name}.safetensors", a=1)
    with pytest.raises(CheckpointError, match=r"2 safetensors files .*name the one file"):
        open_source(tmp_path)


@pytest.mark.skipif(not FILES_OF_THIS_PROCESS.is_dir(), reason="the system does not list open files")
def test_an_unsound_shard_closes_the_others(sharded):
    """When one file is unsound, the error names it and no file stays open."""
    path = sharded / "model-00002-of-00002.safetensors"
    path.write_bytes(path.read_bytes()[:-1])
    before = len(list(FILES_OF_THIS_PROCESS.iterdir()))
    with pytest.raises(CheckpointError, match=r"00002-of-00002\.safetensors: is truncated"):
        open_source(sharded)
    assert len(list(FILES_OF_THIS_PROCESS.iterdir())) == before


def test_the_fingerprint_changes_with_the_weights(sharded):
    """It is the same for the same files, and another when a weight file is rewritten, touched or renamed."""

    def fingerprint() -> str:
        with open_source(sharded) as source:
            return source.fingerprint()

    seen = [fingerprint()]
    assert fingerprint() == seen[0]
    (sharded / "config.json").write_text("{ }")
    assert fingerprint() == seen[0]
    path = sharded / "model-00002-of-00002.safetensors"
    os.utime(path, ns=(1, 1))
    seen.append(fingerprint())
    save(path, c=3, d=4)
    os.utime(path, ns=(1, 1))
    seen.append(fingerprint())
    path.rename(sharded / "renamed.safetensors")
    index = (sharded / INDEX).read_text().replace(path.name, "renamed.safetensors")
    (sharded / INDEX).write_text(index)
    seen.append(fingerprint())
    assert len(set(seen)) == 4
