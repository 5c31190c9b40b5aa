import importlib.util

import pytest

from tcomm.errors import CapabilityError
from tcomm.memory import nvshmem_bitcode
from tcomm.memory.nvshmem_bitcode import choose_architecture, find_bitcode
from tests.memory.fake_nvshmem import install

WHEEL = [75, 80, 89, 90, 100]


@pytest.mark.parametrize(
    ("capability", "chosen"),
    [
        (75, 75),
        (80, 80),
        (86, 80),
        (87, 80),
        (89, 89),
        (90, 90),
        (100, 100),
        (103, 100),
        (120, None),
        (70, None),
    ],
)
def test_the_highest_architecture_of_the_same_major_is_taken(capability, chosen):
    assert choose_architecture(capability, WHEEL) == chosen


def test_what_the_environment_names_is_taken(tmp_path):
    home = install(tmp_path / "home", "3.7.2")
    found = find_bitcode(86, home)
    assert (str(found.path), found.version) == (f"{home}/lib/libnvshmem_device_sm_80.bc", "3.7.2")
    assert found.link_options == {
        "extern_libs": {"libnvshmem_device": f"{home}/lib/libnvshmem_device_sm_80.bc"}
    }


def test_bitcode_comes_from_beside_the_library_that_is_loaded(tmp_path, monkeypatch):
    loaded, installed = tmp_path / "loaded", tmp_path / "installed"
    install(loaded, "3.4.5")
    install(installed, "3.8.0")
    monkeypatch.setattr(nvshmem_bitcode, "_installed_directories", lambda: [installed / "lib"])
    maps = tmp_path / "maps"
    maps.write_text(
        "7f00-7f01 r--p 0 00:1 1 /lib/libc.so.6\n"
        f"7f02-7f03 r-xp 0 00:1 2     {loaded}/lib/libnvshmem_host.so.3\n"
    )
    assert find_bitcode(90, maps=str(maps)).version == "3.4.5"
    assert find_bitcode(90, maps=str(tmp_path / "missing")).version == "3.8.0"


def test_the_older_single_file_is_taken_where_no_architecture_fits(tmp_path):
    home = install(tmp_path / "home", architectures=(), old=True)
    assert find_bitcode(90, home).path.name == "libnvshmem_device.bc"
    other = install(tmp_path / "other", architectures=(80,), old=True)
    assert find_bitcode(90, other).path.name == "libnvshmem_device.bc"
    assert find_bitcode(86, other).path.name == "libnvshmem_device_sm_80.bc"


def test_what_is_missing_is_told_with_the_places_and_the_remedy(tmp_path, monkeypatch):
    home = install(tmp_path / "home")
    with pytest.raises(CapabilityError) as caught:
        find_bitcode(120, home)
    assert str(caught.value) == (
        "no NVSHMEM bitcode for sm_120: looked for libnvshmem_device_sm_N.bc of its major, N at most 120, "
        f"and libnvshmem_device.bc in {home}/lib (has libnvshmem_device_sm_80.bc, "
        "libnvshmem_device_sm_90.bc); install it with `pip install tcomm[nvshmem]`, or name its directory in "
        "TCOMM_NVSHMEM_HOME"
    )
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(CapabilityError, match="in no NVSHMEM is loaded or installed; install it"):
        find_bitcode(90, maps=str(tmp_path / "missing"))


def test_a_version_that_nothing_tells_is_refused(tmp_path):
    home = install(tmp_path / "home")
    (tmp_path / "home" / "include" / "non_abi" / "nvshmem_version.h").unlink()
    with pytest.raises(CapabilityError, match=r"the version of the NVSHMEM in .* is unknown"):
        find_bitcode(90, home)
