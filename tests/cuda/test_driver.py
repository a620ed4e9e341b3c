"""The driver's functions through ctypes, against a libcuda over host memory: values arrive exactly, failures speak."""

from __future__ import annotations

import struct
from pathlib import Path

import numpy as np
import pytest

from tests.cuda import stub
from tfqc.backends.cuda_int4.runtime.libcuda import Driver, DriverError, NoDriverError

GRID = (70000, 3, 1)


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return stub.build(tmp_path_factory.mktemp("stub"))


@pytest.fixture
def driver(library: Path, monkeypatch: pytest.MonkeyPatch) -> Driver:
    monkeypatch.setenv("TFQC_LIBCUDA", str(library))
    driver = Driver.load()
    driver.device()
    return driver


def test_a_device_tells_what_it_is(driver: Driver) -> None:
    device = driver.device()
    assert (device.name, device.arch, device.multiprocessors) == ("Stub 0", "sm_86", 46)
    assert (device.memory, device.ghz, driver.version()) == (8 << 30, 1.5, "13.2")


@pytest.mark.parametrize(
    ("capability", "arch"), [(80, "sm_80"), (89, "sm_89"), (90, "sm_90a"), (100, "sm_100"), (120, "sm_120a")]
)
def test_chips_with_instructions_of_their_own_are_named_so(
    driver: Driver, monkeypatch: pytest.MonkeyPatch, capability: int, arch: str
) -> None:
    stub.tell(monkeypatch, capability=capability)
    assert driver.device().arch == arch


def test_there_are_as_many_devices_as_it_says(driver: Driver, monkeypatch: pytest.MonkeyPatch) -> None:
    stub.tell(monkeypatch, devices=3)
    assert (driver.devices(), driver.device(2).name, driver.device(2).context) == (3, "Stub 2", 4098)
    with pytest.raises(DriverError, match=r"^CUDA fails while opening GPU 3: error 101 "):
        driver.device(3)


def test_arguments_of_a_launch_arrive_exactly(driver: Driver, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    stub.tell(monkeypatch, log=tmp_path / "log")
    function = driver.module(b"image").function("tfqc_kernel", 49152)
    pointers = [2**64 - 16, 0, 2**47 + 8, 1]
    function.launch(GRID, 256, [*pointers, np.int32(2**31 - 1)], stream=2**40)
    prepared = [function.prepared((1, 1, 1), 32, [*pointers[:count], -count]) for count in (0, 1, 2)]
    for launch in reversed(prepared):
        launch()
        launch(7)
    lines = (tmp_path / "log").read_text().splitlines()
    many = " ".join(map(str, pointers))
    begin = "tfqc_kernel grid 70000 3 1 block 256 1 1 shared 49152 stream"
    assert lines[0] == f"{begin} 1099511627776 arguments {many} 2147483647"
    begin = "tfqc_kernel grid 1 1 1 block 32 1 1 shared 49152 stream"
    assert lines[1:3] == [f"{begin} {stream} arguments {2**64 - 16} 0 -2" for stream in (0, 7)]
    assert lines[5:] == [f"{begin} {stream} arguments 0" for stream in (0, 7)]


@pytest.mark.parametrize("wrong", [[-1, 0], [2**64, 0], [0, 2**31], [0.5, 0]])
def test_arguments_that_do_not_fit_are_refused(driver: Driver, wrong: list[int]) -> None:
    function = driver.module(b"image").function("tfqc_kernel")
    with pytest.raises(struct.error):
        function.prepared(GRID, 32, wrong)


def test_arrays_go_there_and_come_back(driver: Driver) -> None:
    array = np.arange(12, dtype=np.int32).reshape(3, 4)
    memory = driver.allocate(array.nbytes)
    memory.write(array.T)
    assert np.array_equal(memory.read(array.T), np.ascontiguousarray(array.T))
    memory.fill(77)
    assert (memory.read(array) == 0x4D4D4D4D).all()
    with pytest.raises(DriverError, match=r"^49 bytes do not fit into 48 of the GPU's memory"):
        memory.write(np.zeros(49, np.uint8))
    memory.free()


def test_events_are_some_time_apart(driver: Driver) -> None:
    first, second = driver.event(), driver.event()
    first.record()
    second.record(5)
    assert second.since(first) == 0.25
    with pytest.raises(DriverError, match=r"^CUDA fails while waiting for an event: error 400 "):
        driver.event().since(first)


@pytest.mark.parametrize(
    ("entry", "doing"),
    [
        ("cuModuleLoadData", "loading kernels"),
        ("cuMemAlloc_v2", "allocating 64 bytes"),
        ("cuLaunchKernel", "launching kernel tfqc_kernel"),
        ("cuCtxSynchronize", "waiting for kernels"),
        ("cuCtxSetCurrent", "taking Stub 0 into use"),
    ],
)
def test_a_failure_says_what_was_done_and_why(
    driver: Driver, monkeypatch: pytest.MonkeyPatch, entry: str, doing: str
) -> None:
    stub.tell(monkeypatch, fail=entry)
    with pytest.raises(DriverError) as caught:
        driver.device()
        driver.allocate(64).free()
        driver.module(b"image").function("tfqc_kernel").launch((1, 1, 1), 32, [0])
        driver.synchronize()
    assert str(caught.value) == f"CUDA fails while {doing}: CUDA_ERROR_LAUNCH_FAILED (unspecified launch failure)."


def test_what_a_device_cannot_do_is_refused(driver: Driver) -> None:
    with pytest.raises(DriverError, match="giving kernel tfqc_kernel 204800 bytes of shared memory: error 1 "):
        driver.module(b"image").function("tfqc_kernel", 200 * 1024)
    with pytest.raises(DriverError, match="loading kernels: error 200 "):
        driver.module(b"")
    with pytest.raises(DriverError, match="allocating 17179869184 bytes: error 2 "):
        driver.allocate(16 << 30)


def test_without_a_driver_one_sentence_says_so(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("TFQC_LIBCUDA", str(tmp_path / "libcuda.so"))
    with pytest.raises(NoDriverError) as caught:
        Driver.load()
    assert str(caught.value) == "There is no NVIDIA driver on this machine, so no GPU."


def test_without_a_device_one_sentence_says_so(library: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TFQC_LIBCUDA", str(library))
    stub.tell(monkeypatch, devices=0)
    with pytest.raises(NoDriverError, match=r"^There is an NVIDIA driver on this machine, but it finds no GPU\.$"):
        Driver.load()


def test_a_driver_that_does_not_start_or_is_too_old_says_so(library: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TFQC_LIBCUDA", str(library))
    stub.tell(monkeypatch, fail="cuInit")
    with pytest.raises(DriverError, match=r"^CUDA fails while starting the driver: CUDA_ERROR_LAUNCH_FAILED "):
        Driver.load()
    monkeypatch.setenv("TFQC_LIBCUDA", "libc.so.6")
    with pytest.raises(DriverError, match=r"^NVIDIA's driver is too old: it has no cuInit\.$"):
        Driver.load()
