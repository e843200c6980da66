"""Reading safetensors headers: what is found, and what is refused and named."""

import json
import struct

import pytest
import torch
from safetensors.torch import save_file

from expertflow import CheckpointError
from expertflow.checkpoint import read_checkpoint_index

TENSORS = {
    "a": torch.arange(6, dtype=torch.float32).view(2, 3),
    "b": torch.arange(4, dtype=torch.bfloat16),
    "empty": torch.zeros(0, 5),
    "scalar": torch.tensor(3, dtype=torch.int64),
}


@pytest.fixture
def file(tmp_path):
    save_file(TENSORS, tmp_path / "model.safetensors", metadata={"format": "pt"})
    return tmp_path / "model.safetensors"


@pytest.fixture
def index_file(tmp_path):
    save_file({"a": TENSORS["a"]}, tmp_path / "part-1.safetensors")
    save_file({"b": TENSORS["b"]}, tmp_path / "part-2.safetensors")
    index = tmp_path / "model.safetensors.index.json"
    write_index(index, {"a": "part-1.safetensors", "b": "part-2.safetensors"})
    return index


def write_index(index_file, weight_map):
    index_file.write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def split(file):
    data = file.read_bytes()
    (length,) = struct.unpack("<Q", data[:8])
    return json.loads(data[8 : 8 + length]), data[8 + length :]


def join(file, header, data):
    text = json.dumps(header).encode()
    file.write_bytes(struct.pack("<Q", len(text)) + text + data)


def edit_header(file, change):
    header, data = split(file)
    join(file, change(header) or header, data)


def check_refused(file, *words, error=CheckpointError):
    """Reading must fail, and the message must name the file and all of `words`."""
    with pytest.raises(error) as caught:
        read_checkpoint_index(file)
    for word in words:
        assert str(word) in str(caught.value)


def test_offsets_point_at_the_data(file):
    index = read_checkpoint_index(file)
    assert set(index.tensors) == set(TENSORS)
    assert index.tensors["a"].shape == (2, 3)
    assert index.tensors["b"].dtype == "BF16"
    assert index.file_of("a") == file
    content = file.read_bytes()
    for name, tensor in TENSORS.items():
        entry = index.tensors[name]
        data = content[entry.offset : entry.offset + entry.num_bytes]
        assert data == tensor.contiguous().flatten().view(torch.uint8).numpy().tobytes()


def test_shards_are_found_through_the_index(index_file):
    index = read_checkpoint_index(index_file)
    assert index.file_of("a").name == "part-1.safetensors"
    assert index.file_of("b").name == "part-2.safetensors"


def test_missing_file_is_named(tmp_path):
    check_refused(tmp_path / "model.safetensors", tmp_path, error=FileNotFoundError)


def test_missing_shard_is_named(index_file):
    (index_file.parent / "part-2.safetensors").unlink()
    check_refused(index_file, "1 of 2 shards", "part-2.safetensors", error=FileNotFoundError)


@pytest.mark.parametrize("kept", [0, 5, 8, 20])
def test_file_cut_within_the_header_is_named(file, kept):
    file.write_bytes(file.read_bytes()[:kept])
    check_refused(file, file)


def test_truncated_file_is_named_with_its_tensor(file):
    file.write_bytes(file.read_bytes()[:-3])
    check_refused(file, file, "truncated", "tensor ")


def test_truncated_shard_is_named(index_file):
    shard = index_file.parent / "part-2.safetensors"
    shard.write_bytes(shard.read_bytes()[:-1])
    check_refused(index_file, shard, "tensor b")


def test_bytes_after_the_last_tensor_are_refused(file):
    file.write_bytes(file.read_bytes() + b"x")
    check_refused(file, file, "1 bytes after")


def test_absurd_header_length_is_refused(file):
    file.write_bytes(b"\xff" * 7 + b"\x7f" + file.read_bytes()[8:])
    check_refused(file, file, "not a safetensors file")


def test_git_lfs_pointer_is_recognised(file):
    file.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n")
    check_refused(file, file, "git lfs pull")


@pytest.mark.parametrize("text", [b"{nonsense}", b"\xff\xfe{}", b"[1]    ", b"null    "])
def test_header_that_is_no_json_table_is_refused(file, text):
    file.write_bytes(struct.pack("<Q", len(text)) + text)
    check_refused(file, file)


def test_bytes_that_disagree_with_the_shape_are_named(file):
    edit_header(file, lambda header: header["a"].update(shape=[2, 4]))
    check_refused(file, file, "tensor a", "[2, 4]", "32", "24")


def test_bytes_that_disagree_with_the_dtype_are_named(file):
    edit_header(file, lambda header: header["a"].update(dtype="BF16"))
    check_refused(file, file, "tensor a", "BF16")


def test_unknown_dtype_is_named(file):
    edit_header(file, lambda header: header["b"].update(dtype="F17"))
    check_refused(file, file, "tensor b", "F17")


@pytest.mark.parametrize(
    "entry",
    [
        7,
        {},
        {"dtype": "F32", "shape": 3, "data_offsets": [0, 12]},
        {"dtype": "F32", "shape": [3], "data_offsets": [0]},
        {"dtype": "F32", "shape": [-3], "data_offsets": [12, 0]},
        {"dtype": "F32", "shape": [1.5], "data_offsets": [0, 6]},
        {"dtype": ["F32"], "shape": [3], "data_offsets": [0, 12]},
    ],
)
def test_malformed_entry_is_named(file, entry):
    edit_header(file, lambda header: header | {"a": entry})
    check_refused(file, file, "tensor a")


def test_overlapping_tensors_are_named(file):
    edit_header(file, lambda header: header["b"].update(data_offsets=header["a"]["data_offsets"]))
    edit_header(file, lambda header: header["b"].update(dtype="F32", shape=[6]))
    check_refused(file, file, "overlaps", "tensor b", "tensor a")


def test_gap_between_tensors_is_refused(file):
    edit_header(file, lambda header: header.pop("a") and None)
    check_refused(file, file, "belong to no tensor")


def test_offsets_beyond_the_file_are_named(tmp_path):
    file = tmp_path / "model.safetensors"
    entry = {"dtype": "F32", "shape": [1 << 40], "data_offsets": [0, 1 << 42]}
    join(file, {"a": entry}, b"\0" * 64)
    check_refused(file, file, "truncated", "tensor a")


def test_tensor_that_the_index_promises_but_no_shard_has_is_named(index_file):
    weight_map = {"a": "part-1.safetensors", "b": "part-2.safetensors", "c": "part-1.safetensors"}
    write_index(index_file, weight_map)
    check_refused(index_file, "tensor c", "part-1.safetensors", index_file.name)


def test_tensor_in_another_shard_than_the_index_says_is_named(index_file):
    write_index(index_file, {"a": "part-2.safetensors", "b": "part-1.safetensors"})
    check_refused(index_file, "tensor a", "part-2.safetensors")


def test_tensor_in_two_shards_is_named(index_file):
    save_file({"a": TENSORS["a"], "b": TENSORS["b"]}, index_file.parent / "part-2.safetensors")
    check_refused(index_file, "tensor a", "part-1.safetensors", "part-2.safetensors")


@pytest.mark.parametrize("text", ["{", "[]", "{}", '{"weight_map": {}}', '{"weight_map": 3}'])
def test_broken_index_is_named(index_file, text):
    index_file.write_text(text)
    check_refused(index_file, index_file)


@pytest.mark.parametrize("shard", ["../a.safetensors", "/a.safetensors", "", 3, "a.bin"])
def test_shard_name_that_leaves_the_directory_is_refused(index_file, shard):
    write_index(index_file, {"a": shard})
    check_refused(index_file, index_file)
