"""Memory as the kernel, control groups and nvidia-smi tell it. Group files and nvidia-smi are stand-ins; the kernel is real."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from models_app import node_memory
from models_app.node_memory import MIB, Gpu, gpu_bytes_by_pid, gpus, host_memory

UNLIMITED_V1 = str((1 << 63) - 4096)


def group(folder: Path, limit: str, use: int, v1: bool = False, **stat: int) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / ("memory.limit_in_bytes" if v1 else "memory.max")).write_text(limit + "\n")
    (folder / ("memory.usage_in_bytes" if v1 else "memory.current")).write_text(f"{use}\n")
    (folder / "memory.stat").write_text("".join(f"{key} {value}\n" for key, value in {"anon": 1, **stat}.items()))


def member_of(root: Path, *lines: str) -> None:
    (root / "proc/self").mkdir(parents=True)
    (root / "proc/self/cgroup").write_text("\n".join(lines) + "\n")


def test_this_machine_has_memory() -> None:
    memory = host_memory()
    assert 0 < memory.available <= psutil.virtual_memory().total
    assert memory.available <= memory.total <= psutil.virtual_memory().total


def test_without_control_groups_the_kernel_alone_speaks(tmp_path: Path) -> None:
    memory = host_memory(tmp_path)
    assert memory.group_limit is None
    assert memory.total == psutil.virtual_memory().total


def test_a_group_v2_limits_and_its_file_pages_can_be_had_back(tmp_path: Path) -> None:
    member_of(tmp_path, "0::/engines")
    group(tmp_path / "sys/fs/cgroup/engines", str(100 * MIB), 90 * MIB, active_file=20 * MIB, inactive_file=10 * MIB)
    memory = host_memory(tmp_path)
    assert (memory.total, memory.available, memory.group_limit) == (100 * MIB, 40 * MIB, 100 * MIB)


def test_the_tightest_group_around_ours_counts(tmp_path: Path) -> None:
    member_of(tmp_path, "0::/outer/inner")
    group(tmp_path / "sys/fs/cgroup/outer", str(64 * MIB), 60 * MIB)
    group(tmp_path / "sys/fs/cgroup/outer/inner", "max", 10 * MIB)
    memory = host_memory(tmp_path)
    assert (memory.total, memory.available, memory.group_limit) == (64 * MIB, 4 * MIB, 64 * MIB)


def test_a_group_v1_speaks_its_own_names(tmp_path: Path) -> None:
    member_of(tmp_path, "4:memory:/box", "0::/")
    group(tmp_path / "sys/fs/cgroup/memory", UNLIMITED_V1, 0, v1=True)
    group(tmp_path / "sys/fs/cgroup/memory/box", str(50 * MIB), 45 * MIB, v1=True, total_inactive_file=15 * MIB, inactive_file=1)
    assert host_memory(tmp_path).available == 20 * MIB


def test_in_a_container_the_mounted_group_is_ours(tmp_path: Path) -> None:
    member_of(tmp_path, "0::/system.slice/docker-4711.scope")
    group(tmp_path / "sys/fs/cgroup", str(32 * MIB), 30 * MIB)
    assert host_memory(tmp_path).available == 2 * MIB


def test_a_group_over_its_limit_leaves_nothing(tmp_path: Path) -> None:
    member_of(tmp_path, "0::/")
    group(tmp_path / "sys/fs/cgroup", str(32 * MIB), 40 * MIB)
    assert host_memory(tmp_path).available == 0


def test_nonsense_in_group_files_is_no_limit(tmp_path: Path) -> None:
    member_of(tmp_path, "0::/../../etc")
    group(tmp_path / "sys/fs/cgroup", "lots", 0)
    assert host_memory(tmp_path).group_limit is None


@pytest.fixture
def smi(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """An nvidia-smi of ours, alone on PATH: counts its calls and prints what <folder>/gpu and <folder>/apps say."""
    program = tmp_path / "nvidia-smi"
    program.write_text(
        f"""#!/bin/sh
echo "$*" >> {tmp_path}/calls
case "$1 $2" in
  "--query-gpu=index,name,memory.total,memory.free --format=csv,noheader,nounits") file=gpu;;
  "--query-compute-apps=pid,used_memory --format=csv,noheader,nounits") file=apps;;
  *) exit 2;;
esac
while read -r line; do echo "$line"; done < {tmp_path}/$file
"""
    )
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    node_memory.forget_gpus()
    yield tmp_path
    node_memory.forget_gpus()


def test_cards_are_read_and_the_answer_is_kept_a_while(smi: Path) -> None:
    (smi / "gpu").write_text("0, NVIDIA GeForce RTX 4090, 24564, 20480\n")
    assert gpus() == [Gpu(0, "NVIDIA GeForce RTX 4090", 24564 * MIB, 20480 * MIB)]
    assert gpus() == gpus()
    assert len((smi / "calls").read_text().splitlines()) == 1


def test_memory_of_each_process_is_summed_over_cards(smi: Path) -> None:
    (smi / "apps").write_text("4711, 1000\n4711, 500\n4712, [N/A]\n")
    assert gpu_bytes_by_pid() == {4711: 1500 * MIB}


def test_without_nvidia_smi_there_is_no_card(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    node_memory.forget_gpus()
    assert gpus() == []
    assert gpu_bytes_by_pid() == {}


@pytest.mark.parametrize("script", ["exit 9", "echo 'No devices were found'", "echo '0, A, B, C'"])
def test_an_nvidia_smi_that_fails_or_babbles_means_no_card(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, script: str) -> None:
    program = tmp_path / "nvidia-smi"
    program.write_text(f"#!/bin/sh\n{script}\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    node_memory.forget_gpus()
    assert gpus() == []
    node_memory.forget_gpus()
