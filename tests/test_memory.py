"""Sizes as users write them, and the memory that may still be used."""

from pathlib import Path

import pytest

from expertflow.memory import AvailableMemory, available_memory, check_ram, format_size, parse_size

GIB = 1 << 30


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ("25%", 250),
        (" 25 % ", 250),
        ("100%", 1000),
        ("0%", 0),
        ("12.5%", 125),
        (0.25, 250),
        (1.0, 1000),
        ("0.25", 250),
        (7, 7),
        ("7", 7),
        ("7B", 7),
        ("8GB", 8_000_000_000),
        ("8GiB", 8 * GIB),
        ("8gib", 8 * GIB),
        ("1.5 KiB", 1536),
        ("2MiB", 2 << 20),
        ("1TB", 10**12),
    ],
)
def test_parse_size(value, expected):
    assert parse_size(value, 1000, "expert_cache") == expected


def test_fractions_are_decimal():
    assert parse_size(0.3, 10, "x") == 3
    assert parse_size("30%", 10, "x") == 3
    assert parse_size(1e-05, 1_000_000, "x") == 10


NO_SIZES = ["", "%", "much", "8Gibberish", "8 GiB free", "GiB", "8G", "0x10", "1_000"]
NO_SIZES += ["-1", "-5%", "150%", "1.5"]


@pytest.mark.parametrize(
    "value", [*NO_SIZES, -1, -0.5, 1.5, True, None, [8], float("nan"), float("inf")]
)
def test_size_that_does_not_parse_is_named(value):
    with pytest.raises(ValueError, match="expert_cache=") as error:
        parse_size(value, 1000, "expert_cache")
    assert repr(value) in str(error.value)


def test_format_size():
    assert format_size(512) == "512 B"
    assert format_size(1536) == "1.50 KiB"
    assert format_size(3 * GIB // 2) == "1.50 GiB"
    assert format_size(5000 * GIB) == "4.88 TiB"


def write(root: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    return root


MEMINFO = {"proc/meminfo": "MemTotal: 32000 kB\nMemFree: 100 kB\nMemAvailable:   16000 kB\n"}


def test_available_memory_without_cgroups(tmp_path):
    memory = available_memory(root=write(tmp_path, MEMINFO))
    assert memory.num_bytes == 16000 * 1024
    assert "MemAvailable" in memory.source


def test_available_memory_on_this_machine():
    assert 0 < available_memory().num_bytes < 1 << 60


def test_cgroup_v2_limit_minus_usage_without_page_cache(tmp_path):
    group = "sys/fs/cgroup/a/b"
    files = {
        "proc/self/cgroup": "0::/a/b\n",
        f"{group}/memory.max": "1000000\n",
        f"{group}/memory.current": "700000\n",
        f"{group}/memory.stat": "anon 400000\ninactive_file 100000\nactive_file 150000\n",
        "sys/fs/cgroup/a/memory.max": "max\n",
        "sys/fs/cgroup/a/memory.current": "900000\n",
    }
    memory = available_memory(root=write(tmp_path, MEMINFO | files))
    assert memory.num_bytes == 1_000_000 - 700_000 + 250_000
    assert memory.source.startswith(str(tmp_path / group / "memory.max"))


def test_cgroup_v2_limit_of_a_parent_counts(tmp_path):
    files = {
        "proc/self/cgroup": "0::/a/b\n",
        "sys/fs/cgroup/a/b/memory.max": "1000000\n",
        "sys/fs/cgroup/a/b/memory.current": "0\n",
        "sys/fs/cgroup/a/memory.max": "500000\n",
        "sys/fs/cgroup/a/memory.current": "200000\n",
    }
    assert available_memory(root=write(tmp_path, MEMINFO | files)).num_bytes == 300_000


def test_cgroup_v1_limit_with_the_path_of_the_host(tmp_path):
    files = {
        "proc/self/cgroup": "4:memory:/docker/0123\n2:cpu,cpuacct:/\n0::/\n",
        "sys/fs/cgroup/memory/memory.limit_in_bytes": "800000\n",
        "sys/fs/cgroup/memory/memory.usage_in_bytes": "300000\n",
        "sys/fs/cgroup/memory/memory.stat": "inactive_file 1\ntotal_inactive_file 50000\n",
    }
    assert available_memory(root=write(tmp_path, MEMINFO | files)).num_bytes == 550_000


def test_cgroup_without_a_limit_does_not_count(tmp_path):
    files = {
        "proc/self/cgroup": "4:memory:/\n",
        "sys/fs/cgroup/memory/memory.limit_in_bytes": "9223372036854771712\n",
        "sys/fs/cgroup/memory/memory.usage_in_bytes": "300000\n",
    }
    assert available_memory(root=write(tmp_path, MEMINFO | files)).num_bytes == 16000 * 1024


def test_malformed_cgroup_lines_do_not_count(tmp_path):
    files = {
        "proc/self/cgroup": "nonsense\n\n0:\n0::/\n",
        "sys/fs/cgroup/memory.max": "1000\n",
        "sys/fs/cgroup/memory.current": "400\n",
    }
    assert available_memory(root=write(tmp_path, MEMINFO | files)).num_bytes == 600


def test_usage_above_the_limit_leaves_nothing(tmp_path):
    files = {
        "proc/self/cgroup": "0::/\n",
        "sys/fs/cgroup/memory.max": "1000\n",
        "sys/fs/cgroup/memory.current": "2000\n",
    }
    assert available_memory(root=write(tmp_path, MEMINFO | files)).num_bytes == 0


def test_ram_limit_replaces_the_measurement(tmp_path):
    memory = available_memory("1MiB", root=write(tmp_path, MEMINFO))
    assert memory == AvailableMemory(1 << 20, "ram_limit")
    assert available_memory("1MiB", held_bytes=7, root=tmp_path) == memory
    assert available_memory("50%", root=tmp_path).num_bytes == 8000 * 1024
    assert available_memory(64 * GIB, root=tmp_path).num_bytes == 64 * GIB


def test_memory_that_the_asker_holds_counts_as_available(tmp_path):
    root = write(tmp_path, MEMINFO)
    assert available_memory(held_bytes=4096, root=root).num_bytes == 16004 * 1024
    assert available_memory("50%", held_bytes=4096, root=root).num_bytes == 8002 * 1024


def test_check_ram_says_what_is_needed_and_what_is_there():
    check_ram(100, AvailableMemory(100, "test"), "the model", "")
    with pytest.raises(
        MemoryError, match=r"the model needs 2\.00 GiB .* 1\.00 GiB .*\(test\)\. Do"
    ):
        check_ram(2 * GIB, AvailableMemory(GIB, "test"), "the model", "Do this.")
