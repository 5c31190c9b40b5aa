"""What a rank says of its GPU, with a driver that a fake stands in for."""

import ctypes
import sys
import types

import pytest
import torch

from tcomm.memory import probe
from tcomm.memory.probe import describe_device, host_identity


class NVMLError(Exception):
    pass


class FabricInfo(ctypes.Structure):
    _fields_ = [("version", ctypes.c_uint), ("clusterUuid", ctypes.c_char * 16), ("cliqueId", ctypes.c_uint)]


def _nvml(links=18, version=6, cluster=b"", broken=False):
    module = types.ModuleType("pynvml")

    def link_state(handle, link):
        if link >= links:
            raise NVMLError("no such link")
        return 1

    def fabric(handle, info):
        if broken:
            raise NVMLError("not supported")
        info._obj.clusterUuid = cluster
        info._obj.cliqueId = 3

    def by_uuid(uuid):
        assert uuid == "GPU-12"
        return "handle"

    module.NVMLError = NVMLError
    module.nvmlInit = lambda: None
    module.nvmlSystemGetDriverVersion = lambda: "580.1"
    module.nvmlDeviceGetHandleByUUID = by_uuid
    module.nvmlDeviceGetNvLinkState = link_state
    module.nvmlDeviceGetNvLinkVersion = lambda handle, link: version
    module.nvmlDeviceGetMaxPcieLinkGeneration = lambda handle: 5
    module.nvmlDeviceGetMaxPcieLinkWidth = lambda handle: 16
    module.c_nvmlGpuFabricInfoV_t = FabricInfo
    module.nvmlGpuFabricInfo_v2 = 2
    module.nvmlDeviceGetGpuFabricInfoV = fabric
    return module


@pytest.fixture
def describe(monkeypatch):
    def make(nvml, **options):
        properties = types.SimpleNamespace(
            name="NVIDIA H100 80GB HBM3", major=9, minor=0, uuid="12", multi_processor_count=132
        )
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
        monkeypatch.setitem(sys.modules, "pynvml", nvml)
        return describe_device(torch.device("cuda", 0), "it is shared", {2: "writing: no"})

    return make


def test_a_report_says_what_torch_and_nvml_say(describe):
    report = describe(_nvml(cluster=b"\x01\x02"))
    assert (report.name, report.arch, report.num_sms) == ("NVIDIA H100 80GB HBM3", "sm_90", 132)
    assert (report.link, report.link_gbps, report.driver) == ("nvlink4", 450.0, "580.1")
    assert (report.fabric, report.host) == ("0102/3", host_identity())
    assert (report.unreachable, report.no_multicast, report.uuid) == (
        {2: "writing: no"},
        "it is shared",
        "12",
    )


@pytest.mark.parametrize(
    ("nvml", "link", "gbps"),
    [
        (_nvml(links=0), "pcie5", 16 * 3.938),
        (_nvml(version=7), "nvlink5", 900.0),
        (_nvml(links=12, version=4), "nvlink3", 300.0),
        (_nvml(version=99), "nvlink", 0.0),
    ],
)
def test_links_are_counted_and_named(describe, nvml, link, gbps):
    report = describe(nvml)
    assert (report.link, report.link_gbps) == (link, gbps)
    assert report.fabric == ""


def test_without_nvml_the_report_says_less(describe, caplog):
    with caplog.at_level("INFO", "tcomm"):
        report = describe(None)
    assert (report.link, report.link_gbps, report.driver) == ("", 0.0, "")
    assert "links of 12 are not known and taken for slow ones, because NVML cannot be asked" in caplog.text
    report = describe(_nvml(broken=True))
    assert (report.link, report.fabric) == ("nvlink4", "")


def test_a_pattern_is_of_one_writer_one_reader_and_one_time():
    seen = {
        tuple(probe._pattern(w, r, n).tolist()) for w in range(4) for r in range(4) for n in (5, 6, 1 << 63)
    }
    assert len(seen) == 48
    assert all(word >= 0 and words.count(word) == 1 for words in seen for word in words)
