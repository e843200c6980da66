"""How large a cache may be, and how much memory a model takes."""

import gc
import weakref

import pytest
import torch
from loaded import check_refused, load

from expertflow import loading, model_info


def test_percentages_become_slots(qwen_path):
    slots = {
        size: load(qwen_path, expert_cache=size).expert_cache.num_slots for size in ("25%", 0.5)
    }
    assert slots == {"25%": 6, 0.5: 12}


def test_cache_larger_than_all_experts_is_all_of_them(qwen_path):
    assert load(qwen_path, expert_cache="1GiB").expert_cache.num_slots == 24


def test_every_layer_gets_as_many_slots(qwen_path):
    model = load(qwen_path, expert_cache=0.45, cache_scope="layer")
    assert model.expert_cache.num_slots == 9


@pytest.mark.parametrize(("scope", "smallest"), [("global", 3), ("layer", 9)])
def test_cache_smaller_than_one_layers_top_k_is_refused(qwen_path, scope, smallest):
    slot_bytes = model_info(qwen_path).expert_bytes
    load(qwen_path, expert_cache=smallest * slot_bytes, cache_scope=scope)
    words = (f"expert_cache={smallest * slot_bytes - 1}", f"{smallest * slot_bytes} bytes")
    size = smallest * slot_bytes - 1
    check_refused(qwen_path, *words, expert_cache=size, cache_scope=scope, error=ValueError)


@pytest.mark.parametrize("size", ["lots", "-1GiB", "150%", None, 1.5])
def test_size_that_does_not_parse_is_named(qwen_path, size):
    check_refused(qwen_path, f"expert_cache={size!r}", expert_cache=size, error=ValueError)


@pytest.mark.parametrize(
    ("arguments", "word"),
    [
        ({"policy": "fifo"}, "fifo"),
        ({"cache_scope": "model"}, "model"),
        ({"pool": "tape"}, "tape"),
        ({"dtype": "float64"}, "float64"),
        ({"dtype": "floaty"}, "floaty"),
        ({"dtype": torch.int8}, "int8"),
        ({"num_threads": 0}, "num_threads=0"),
        ({"ram_limit": "much"}, "ram_limit='much'"),
    ],
)
def test_meaningless_option_is_named_before_reading(qwen_path, monkeypatch, arguments, word):
    monkeypatch.setattr(loading, "_load_without_experts", forbidden)
    check_refused(qwen_path, word, error=ValueError, **arguments)


def forbidden(*_):
    raise AssertionError("nothing may be read")


def test_too_little_memory_is_refused_before_reading(qwen_path, monkeypatch):
    monkeypatch.setattr(loading, "_load_without_experts", forbidden)
    info = model_info(qwen_path)
    needed = info.expert_bytes_total * 5 // 4 + info.other_bytes
    check_refused(qwen_path, "needs", 'pool="file"', ram_limit=needed - 30_000, error=MemoryError)
    check_refused(qwen_path, "No cache would fit", ram_limit=1000, error=MemoryError)


def test_file_pool_needs_less_memory(qwen_path):
    info = model_info(qwen_path)
    limit = info.other_bytes + 6 * info.expert_bytes
    model = load(qwen_path, pool="file", ram_limit=limit)
    assert model.expert_cache.num_slots == 6
    check_refused(qwen_path, 'pool="file" with expert_cache', ram_limit=limit, error=MemoryError)


def test_cache_of_all_experts_is_the_ram_pool_itself(qwen_path):
    info = model_info(qwen_path)
    pool_bytes = 24 * -(-info.expert_bytes // 4096) * 4096
    load(qwen_path, expert_cache="100%", ram_limit=pool_bytes + info.other_bytes)
    limit = pool_bytes + info.other_bytes
    check_refused(qwen_path, 'expert_cache="100%"', ram_limit=limit, error=MemoryError)


def test_what_model_info_says_would_fit_does(qwen_path):
    info = model_info(qwen_path)
    pool_bytes = 24 * -(-info.expert_bytes // 4096) * 4096
    for pool, num_slots in (("file", 5), ("ram", 0), ("ram", 7)):
        limit = info.other_bytes + (num_slots + 1) * info.expert_bytes - 1
        limit += pool_bytes if pool == "ram" else 0
        info = model_info(qwen_path, ram_limit=limit)
        largest = {"ram": info.largest_ram_pool_cache_bytes, "file": info.largest_cache_bytes}[pool]
        assert largest == num_slots * info.expert_bytes
        arguments = {"pool": pool, "ram_limit": limit}
        if largest:
            assert load(qwen_path, expert_cache=largest, **arguments)
            words = [f'pool="{pool}" with expert_cache up to {largest} ']
        else:
            words = ['expert_cache="100%"', 'pool="file"']
        larger = max(largest, info.smallest_cache_bytes) + info.expert_bytes
        check_refused(qwen_path, *words, expert_cache=larger, **arguments, error=MemoryError)
        if pool == "ram":
            assert info.fits_ram_pool
            assert load(qwen_path, expert_cache="100%", **arguments)


def test_memory_is_freed_with_the_model(qwen_path):
    model = load(qwen_path)
    cache = weakref.ref(model.expert_cache)
    gc.disable()
    try:
        del model
        assert cache() is None
    finally:
        gc.enable()
