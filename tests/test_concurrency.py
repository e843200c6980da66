"""Threads, several models, forks, and what is left when a model is gone."""

import gc
import subprocess
import sys
import time
import weakref
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from random_experts import RandomExperts
from streamed import (
    EVERYTHING_CACHED,
    SMALLEST,
    CacheOptions,
    generate,
    logits,
    same_bits,
    token_ids,
    use,
)

import expertflow
from expertflow import MoELayer

MIB = 1 << 20


def resident_bytes():
    """Of this process."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * 4096


def num_threads():
    return len(list(Path("/proc/self/task").iterdir()))


def wait_until(condition):
    deadline = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


@pytest.mark.parametrize("options", [SMALLEST, CacheOptions("50%", "lru")], ids=str)
@pytest.mark.parametrize("pool", ["ram", "file"])
def test_two_threads_use_one_model(tiny_streamed, pool, options):
    batches = [token_ids(25, 8, seed=1), token_ids(3, seed=2)]
    model = use(tiny_streamed("qwen3_moe", pool=pool), EVERYTHING_CACHED)
    expected = [generate(model, batch, 8) for batch in batches]
    use(model, options)

    def run(batch):
        return [generate(model, batch, 8) for _ in range(4)]

    with ThreadPoolExecutor(2) as threads:
        results = list(threads.map(run, batches, timeout=120))
    for found, right in zip(results, expected, strict=True):
        assert same_bits(found, [right] * 4)


def test_prefetches_from_another_thread(tiny_streamed):
    """A thread that foresees while another computes."""
    batch = token_ids(25, 8)
    expected = generate(use(tiny_streamed("qwen3_moe"), EVERYTHING_CACHED), batch, 12)
    model = use(tiny_streamed("qwen3_moe", pool="file"), CacheOptions("25%"))
    cache, done = model.expert_cache, False

    def foresee():
        generator = torch.Generator().manual_seed(5)
        while not done:
            layer = int(torch.randint(cache.num_layers, (), generator=generator))
            cache.prefetch(layer, torch.randint(8, (3,), generator=generator), 2)

    with ThreadPoolExecutor(1) as threads:
        prefetching = threads.submit(foresee)
        try:
            found = [generate(model, batch, 12) for _ in range(3)]
        finally:
            done = True
        prefetching.result(timeout=60)
    assert same_bits(found, [expected] * 3)


def test_two_models_in_one_process(tiny_streamed):
    models = [tiny_streamed("mixtral"), tiny_streamed("gpt_oss", torch.bfloat16, "file")]
    batch = token_ids(20, 5)
    expected = [generate(use(model, EVERYTHING_CACHED), batch, 8) for model in models]
    for model in models:
        use(model, SMALLEST)

    def run(model):
        return generate(model, batch, 8)

    assert same_bits(map(run, models), expected)
    with ThreadPoolExecutor(2) as threads:
        assert same_bits(threads.map(run, models, timeout=120), expected)
    assert models[0].expert_cache.handle[0] != models[1].expert_cache.handle[0]


FIRST_LOADS = """
from concurrent.futures import ThreadPoolExecutor
import torch
from expertflow import from_pretrained
from expertflow.demo import DEMO_MODEL

def load(number):
    dtype = [torch.float32, torch.bfloat16][number % 2]
    return from_pretrained(DEMO_MODEL, expert_cache="25%", dtype=dtype, progress=False)

with ThreadPoolExecutor(4) as threads:
    models = list(threads.map(load, range(8)))
assert torch.get_default_dtype() == torch.float32
prompt = torch.arange(2, 22)[None]
for kind in (models[::2], models[1::2]):
    first, *others = [model(prompt).logits for model in kind]
    assert all(torch.equal(other, first) for other in others)
"""


def run_script(script, *arguments):
    """What a fresh Python process prints."""
    command = [sys.executable, "-c", script, *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_first_loads_from_several_threads():
    """While transformers is still being imported, and in two dtypes."""
    run_script(FIRST_LOADS)


FORK = """
import gc, os, signal, sys, threading
import torch
import expertflow
from expertflow.demo import DEMO_MODEL

torch.set_num_threads(2)  # torch's own threads are not in a child either
model = expertflow.from_pretrained(DEMO_MODEL, expert_cache="25%", pool=sys.argv[1], progress=False)
prompt = torch.arange(2, 202)[None]

def generate():
    return model.generate(prompt, max_new_tokens=4, do_sample=False)

def forget():
    global model
    model = None
    gc.collect()

def in_child(action):
    pid = os.fork()
    if pid == 0:
        signal.alarm(60)  # a child that hangs dies of it
        try:
            action()
            print("done", flush=True)
        except BaseException as error:
            print(type(error).__name__, error, flush=True)
        os._exit(0)
    _, status = os.waitpid(pid, 0)
    assert status == 0, status

before = generate()
in_child(generate)
in_child(lambda: model.expert_cache.prefetch(0, torch.tensor([1])))
in_child(lambda: model.set_expert_cache("50%"))
in_child(lambda: model.expert_cache.statistics())
in_child(forget)
locked, forked = threading.Event(), threading.Event()
def hold():
    with model.expert_cache.lock:
        locked.set()
        forked.wait()
thread = threading.Thread(target=hold)
thread.start()
locked.wait()
in_child(lambda: model.expert_cache.prefetch(0, torch.tensor([1])))
forked.set()
thread.join()
print("same" if torch.equal(generate(), before) else "different")
"""


@pytest.mark.parametrize("pool", ["ram", "file"])
def test_fork(pool):
    """The child cannot use the model and says so, also when torch would hang; the parent can."""
    refused = "RuntimeError this expert cache was made before a fork"
    lines = [line[: len(refused)] for line in run_script(FORK, pool).splitlines()]
    assert lines == [refused, refused, "done", refused, "done", refused, "same"]


def test_model_that_is_deleted_ends_its_threads(tiny_checkpoint):
    model = expertflow.from_pretrained(
        tiny_checkpoint("olmoe"), pool="file", num_threads=3, progress=False
    )
    logits(use(model, SMALLEST), token_ids(5))
    threads = num_threads()
    model_is_there, cache_is_there = weakref.ref(model), weakref.ref(model.expert_cache)
    del model
    gc.collect()
    assert model_is_there() is None
    assert cache_is_there() is None
    wait_until(lambda: num_threads() <= threads - 3)


@pytest.mark.parametrize("pool", ["ram", "file"])
def test_memory_is_freed(tmp_path, pool):
    experts = RandomExperts(tmp_path / "experts.bin", num_layers=2, hidden=256, intermediate=1024)
    num_slots = 8 if pool == "ram" else 16
    expected_bytes = (16 * (pool == "ram") + num_slots) * 3 * 256 * 1024 * 4
    assert expected_bytes > 40 * MIB
    tokens = torch.randn(64, 256)
    gc.collect()
    before = resident_bytes()
    cache = experts.cache(num_slots, pool=pool)
    for layer in range(2):
        MoELayer(torch.randn(8, 256), cache, layer)(tokens)
    assert resident_bytes() - before > expected_bytes * 0.9
    del cache
    gc.collect()
    assert resident_bytes() - before < expected_bytes * 0.25


@pytest.mark.parametrize("pool", ["ram", "file"])
def test_memory_stays_flat(tiny_streamed, pool):
    """Hundreds of tokens, with a cache that misses at every one of them."""
    model = use(tiny_streamed("mixtral", pool=pool), SMALLEST)
    batch = token_ids(7, 3)

    def run():
        model.expert_cache.prefetch(1, torch.arange(3))
        generate(model, batch, 30)
        gc.collect()
        return resident_bytes()

    for _ in range(3):
        run()
    before = run()
    after = [run() for _ in range(8)]
    assert min(after[4:]) - before < 2 * MIB
    assert model.expert_cache.statistics()["misses"] > 1000
