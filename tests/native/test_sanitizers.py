"""The C++ of the operators, CPU and CUDA, under sanitizers: built without Python and run."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest

HERE = Path(__file__).parent

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module", params=["address", "thread"])
def sanitizer(request) -> str:
    return request.param


@pytest.fixture(scope="module")
def built(sanitizer, tmp_path_factory) -> Path:
    """The folder with both programs."""
    cmake = shutil.which("cmake")
    if cmake is None or shutil.which("c++") is None:
        pytest.skip("needs cmake and a C++ compiler: pip install cmake ninja")
    folder = tmp_path_factory.mktemp(sanitizer)
    for command in (
        [cmake, "-S", str(HERE), "-B", str(folder), f"-DSANITIZE={sanitizer}"],
        [cmake, "--build", str(folder), "--parallel", "2"],
    ):
        result = subprocess.run(command, capture_output=True, text=True)
        assert result.returncode == 0, result.stdout[-2000:] + result.stderr[-8000:]
    return folder


def test_operators_under_a_sanitizer(built):
    result = subprocess.run([built / "native_tests"], capture_output=True, text=True)
    assert result.returncode == 0, result.stdout[-2000:] + result.stderr[-8000:]


def test_a_fault_in_a_test_of_the_operators_is_reported(built, sanitizer):
    result = subprocess.run([built / "native_tests", "deliberate_fault"], capture_output=True, text=True)
    assert result.returncode == 1 and "FAILED: deliberate_fault" in result.stderr
    words = {"address": "AddressSanitizer: heap-buffer-overflow", "thread": "ThreadSanitizer: data race"}[sanitizer]
    assert re.search(rf"SUMMARY: {words} .*main\.cpp:\d+", result.stderr), result.stderr[-4000:]


ERROR = 3  # the exit status of `broken` when a launch threw; after that a sound kernel ran
RACE = "ThreadSanitizer: data race"
OUTSIDE = "AddressSanitizer: use-after-poison"


@pytest.mark.parametrize(
    ("kernel", "found_by", "words"),
    [
        ("missing_barrier", "thread", RACE),
        ("missing_syncwarp", "thread", RACE),
        ("blocks_write_one_place", "thread", RACE),
        ("distant_blocks_write_one_place", "thread", RACE),
        ("missing_fence", "thread", RACE),
        ("read_after_a_barrier", "thread", RACE),
        ("static_index", "address", OUTSIDE),
        ("dynamic_index", "address", OUTSIDE),
        ("global_index", "address", "AddressSanitizer: heap-buffer-overflow"),
    ],
)
def test_a_broken_kernel_is_reported_by_a_sanitizer(built, sanitizer, kernel, found_by, words):
    if sanitizer != found_by:
        pytest.skip(f"for the {found_by} sanitizer")
    result = subprocess.run([built / "broken", kernel], capture_output=True, text=True, timeout=60)
    assert result.returncode not in (0, ERROR)
    assert re.search(rf"SUMMARY: {words} .*broken\.cu:\d+ in {kernel}", result.stderr), result.stderr[-4000:]


@pytest.mark.parametrize(
    ("kernel", "words"),
    [
        (
            "skipped_barrier",
            r"threads 0-4 wait in __syncthreads at .*broken\.cu:\d+; thread 5 exited; threads 6-63 wait",
        ),
        ("different_barriers", r"threads 0-31 wait in __syncthreads at .*; threads 32-63 wait in __syncthreads at"),
        ("lane_left_out", r"threads 0-30 wait in a shuffle at .* for lanes 0xffffffff; thread 31 exited"),
        ("lane_not_named", r"thread 63 is not among the lanes that it names"),
        ("source_not_named", r"thread \d+ reads lane 20, which takes no part in the shuffle"),
    ],
)
def test_divergence_is_an_error_and_no_hang(built, kernel, words):
    result = subprocess.run([built / "broken", kernel], capture_output=True, text=True, timeout=60)
    assert result.returncode == ERROR, result.stderr[-4000:]
    assert re.match(rf"{kernel}, block \(0, 0, 0\) of 64 threads: .*{words}", result.stderr)


@pytest.mark.parametrize("seed", ["0", "1", "2"])
@pytest.mark.parametrize(
    ("kernel", "words"),
    [
        (
            "waits_for_a_later_block",
            r"block \(0, 0, 0\): thread 0 poll memory; threads 1-63 wait in __syncthreads at .*broken\.cu:\d+; "
            r"block \(1, 0, 0\): thread 0 poll memory; threads 1-63 wait in .*; 7 blocks have not begun",
        ),
        (
            "lock_in_a_warp",
            r"block \(0, 0, 0\): thread 0 .*wait in __syncwarp at .*; threads 2-63 exited; 0 blocks",
        ),
    ],
)
def test_polling_in_vain_is_an_error_and_no_hang(built, kernel, words, seed):
    first, second = (
        subprocess.run([built / "broken", kernel, seed], capture_output=True, text=True, timeout=60) for _ in range(2)
    )
    assert first.returncode == ERROR, first.stderr[-4000:]
    assert re.match(
        rf"{kernel}, block .* of 64 threads: thread \d has polled memory \d+ times, .*{words}", first.stderr
    )
    assert first.stderr == second.stderr  # a seed stands for one order


@pytest.mark.parametrize("seed", ["0", "1", "2"])
def test_a_block_may_wait_for_one_that_runs(built, seed):
    command = [built / "broken", "waits_for_an_earlier_block", seed]
    result = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert (result.returncode, result.stdout) == (0, "9\n"), result.stderr[-4000:]


def test_a_sound_kernel_is_not_reported_and_fresh_shared_memory_is_no_zero(built, sanitizer):
    sound = subprocess.run([built / "broken", "correct"], capture_output=True, text=True, timeout=60)
    assert (sound.returncode, sound.stdout) == (0, "1\n"), sound.stderr[-4000:]
    if sanitizer == "address":  # the other one has no way to fill it
        fresh = subprocess.run([built / "broken", "not_initialised"], capture_output=True, text=True, timeout=60)
        assert (fresh.returncode, fresh.stdout) == (0, f"{0x7B7B7B7B + 1}\n")
