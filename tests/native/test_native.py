"""The C++ of the operators, CPU and CUDA, under sanitizers: built without Python and run; and what nvcc says."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import pytest

HERE = Path(__file__).parent
CSRC = HERE.parents[1] / "csrc"

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


# Kernels that may use local memory, and why. `kernel: reason`.
LOCAL_MEMORY_ALLOWED: dict[str, str] = {}


ARCHS = ["75", "80", "90", "120"]
SOURCES = [*sorted(CSRC.glob("cuda/*.cu")), HERE / "block_kernels.cu"]


FLAGS = "-Xptxas=-v -Werror=all-warnings"


def said_while_building() -> dict[tuple[str, str], str]:
    """By source and chip: what nvcc said where the extension was built with ``CUDAFLAGS`` as above, from the log that
    ``D2NET_BUILD_LOG`` names; a warning would have ended that build."""
    said: dict[tuple[str, str], str] = {}
    if "D2NET_BUILD_LOG" in os.environ:
        log = Path(os.environ["D2NET_BUILD_LOG"]).read_text()
        for part in log.split("Building CUDA object ")[1:]:
            source, arch = part.splitlines()[0].rpartition("/")[2].removesuffix(".o"), ""
            for line in part.splitlines():
                if found := re.search(r"Compiling entry function .* for 'sm_(\d+)'", line):
                    arch = found[1]
                said[source, arch] = said.get((source, arch), "") + line + "\n"
    return said


@pytest.fixture(scope="module")
def reports(tmp_path_factory) -> Iterator[dict[tuple[str, str], Future[str]]]:
    """What nvcc says of every source for every chip that it knows, compiled here unless the extension's build has said
    it; as many at once as there are cores."""
    nvcc = shutil.which("nvcc")
    if nvcc is None:
        pytest.skip("needs nvcc")
    known = subprocess.run([nvcc, "--list-gpu-arch"], capture_output=True, text=True).stdout
    folder, built = tmp_path_factory.mktemp("cubin"), said_while_building()

    def report(source: Path, arch: str) -> str:
        if (source.name, arch) in built:
            return built[source.name, arch]
        # An object for the device alone: the host's half is the same for all.
        target = ["-cubin", f"-arch=sm_{arch}", str(source), "-o", str(folder / f"{source.stem}-{arch}.cubin")]
        command = [nvcc, "-std=c++17", "-O3", *FLAGS.split(), f"-I{CSRC}", *target]
        result = subprocess.run(command, capture_output=True, text=True)
        assert result.returncode == 0, (result.stdout + result.stderr)[-8000:]
        return result.stdout + result.stderr

    pool = ThreadPoolExecutor(os.cpu_count())
    yield {
        (source.name, arch): pool.submit(report, source, arch)
        for source in SOURCES
        for arch in ARCHS
        if f"compute_{arch}" in known
    }
    pool.shutdown(cancel_futures=True)


@pytest.mark.parametrize("arch", ARCHS)
@pytest.mark.parametrize("source", SOURCES, ids=lambda path: path.name)
def test_nvcc_compiles_without_warnings_spills_or_local_memory(source, arch, reports):
    if (source.name, arch) not in reports:
        pytest.skip(f"this nvcc knows no sm_{arch}")
    report = reports[source.name, arch].result()
    kernels = re.findall(
        r"Function properties for (\S+)\s+(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads",
        report,
    )
    assert kernels, report[-4000:]
    for name, *bytes_used in kernels:
        ours = "cub" not in name.split("d2net")[0]  # CUB tunes its own
        if ours and not any(kernel in name for kernel in LOCAL_MEMORY_ALLOWED):
            assert bytes_used == ["0", "0", "0"], f"{name}: stack frame, spill stores and loads {bytes_used}"
