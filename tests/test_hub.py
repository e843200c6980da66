"""Hub ids, and files inside a model directory that are named otherwise."""

import json
import shutil
from pathlib import Path

import pytest
from loaded import check_refused, check_same, load
from transformers import AutoModelForCausalLM

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture
def hub_cache(sharded_path, qwen_path, tmp_path):
    """A Hub cache that holds org/tiny: a single file at "main" and shards at "v2"."""
    repository = tmp_path / "hub" / "models--org--tiny"
    (repository / "refs").mkdir(parents=True)
    for revision, commit, source in (
        ("main", COMMIT, qwen_path),
        ("v2", COMMIT[::-1], sharded_path),
    ):
        (repository / "refs" / revision).write_text(commit)
        shutil.copytree(source, repository / "snapshots" / commit)
    return tmp_path / "hub"


@pytest.mark.parametrize("revision", ["main", "v2", COMMIT[::-1], None])
def test_hub_id_is_read_from_the_cache(hub_cache, qwen_path, revision):
    arguments = {} if revision is None else {"revision": revision}
    model = load("org/tiny", cache_dir=hub_cache, local_files_only=True, **arguments)
    check_same(model, AutoModelForCausalLM.from_pretrained(qwen_path))
    assert model.config.name_or_path == "org/tiny"


def test_offline_mode_reads_the_cache(hub_cache, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(hub_cache))
    assert load("org/tiny").expert_cache.num_slots == 6


def test_hub_id_that_is_not_cached_is_named(hub_cache):
    arguments = {"cache_dir": hub_cache, "local_files_only": True, "error": OSError}
    check_refused("org/other", "org/other", **arguments)
    check_refused("org/tiny", "v3", revision="v3", **arguments)


def test_missing_shard_of_a_hub_id_is_named(hub_cache):
    shard = sorted(hub_cache.rglob("*-of-*.safetensors"))[1]
    shard.unlink()
    check_refused(
        "org/tiny",
        shard.name,
        revision="v2",
        cache_dir=hub_cache,
        local_files_only=True,
        error=OSError,
    )


def test_subfolder_and_variant_are_found(qwen_path, tmp_path):
    folder = shutil.copytree(qwen_path, tmp_path / "inner")
    (folder / "model.safetensors").rename(folder / "model.fp32.safetensors")
    model = load(tmp_path, subfolder="inner", variant="fp32")
    check_same(model, AutoModelForCausalLM.from_pretrained(qwen_path))


def test_index_may_name_any_files(sharded_path, tmp_path):
    path = Path(shutil.copytree(sharded_path, tmp_path / "model"))
    index_file = path / "model.safetensors.index.json"
    index = json.loads(index_file.read_text())
    names = {name: f"part {name[6:11]}.safetensors" for name in index["weight_map"].values()}
    for old, new in names.items():
        (path / old).rename(path / new)
    index["weight_map"] = {key: names[name] for key, name in index["weight_map"].items()}
    index_file.write_text(json.dumps(index))
    check_same(load(path), AutoModelForCausalLM.from_pretrained(sharded_path))
