"""The communicator of host memory: which devices it is for, and dictionaries of tensors."""

import msgspec
import pytest
import torch
import torch.distributed as dist

from tcomm.errors import ConfigError, DecodeError
from tcomm.groups.device import CpuCommunicator
from tests.groups.verbs import unequal_bits

SENT = {
    "a": torch.arange(6.0).reshape(2, 3).t(),
    "empty": torch.empty(0, 3, dtype=torch.int32),
    "scalar": torch.tensor(3, dtype=torch.uint8),
    "half": torch.ones(5, dtype=torch.bfloat16),
}


def _wrong_entries(got):
    """What differs from `SENT`."""
    found = [] if list(got) == list(SENT) else [f"keys {list(got)}"]
    found += [key for key, want in SENT.items() if unequal_bits(got[key], want)]
    return found + [f"{key} is not contiguous" for key in SENT if not got[key].is_contiguous()]


def _dictionaries(member):
    member.process_group()
    device = CpuCommunicator(dist.group.WORLD, unique_name="pp:0")
    told, wrong = "", []
    if member.rank == 0:
        try:
            device.send_tensor_dict({"a": torch.ones(1), "n": 3}, 1)
        except RuntimeError as error:
            told = str(error)
        device.send_tensor_dict(SENT, 1)
        device.send_tensor_dict({})
    else:
        wrong = _wrong_entries(device.recv_tensor_dict(0))
        wrong += list(device.recv_tensor_dict())
    supported = device.supports_tensor_dict
    device.destroy()
    by_torch = CpuCommunicator(dist.group.WORLD, unique_name="pp:1", use_kernels=False)
    if member.rank == 0:
        by_torch.send_tensor_dict({"x": torch.ones(2)})
    else:
        assert by_torch.recv_tensor_dict()["x"].tolist() == [1, 1]
    supported = supported, by_torch.supports_tensor_dict
    by_torch.destroy()
    return told, wrong, supported


def test_dictionaries_of_tensors(on_ranks):
    (told, _, supported), (_, wrong, _) = on_ranks(2, _dictionaries)
    assert told == "CpuCommunicator only supports sending tensors. 'n' is a int"
    assert supported == (True, False)
    assert wrong == []


@pytest.mark.parametrize(
    ("header", "why"),
    [
        (b"", "0 bytes are announced"),
        (b"\xc1", "recv_tensor_dict of group 'tp:0'"),
        (msgspec.msgpack.encode([("a", "float32", [-1])]), "is no tensor"),
        (msgspec.msgpack.encode([("a", "nn", [1])]), "is no tensor"),
    ],
)
def test_what_is_no_dictionary_is_refused(header, why):
    device = CpuCommunicator(None, unique_name="tp:0")
    device.send(torch.tensor([len(header)]))
    if header:
        device.send(torch.frombuffer(bytearray(header), dtype=torch.uint8))
    with pytest.raises(DecodeError, match=why):
        device.recv_tensor_dict()
    device.destroy()


def test_a_world_of_one_sends_itself_dictionaries():
    device = CpuCommunicator(None)
    device.send_tensor_dict(SENT)
    assert _wrong_entries(device.recv_tensor_dict()) == []
    assert not device.supports_tensor_dict
    device.destroy()


def test_it_is_for_the_cpu():
    with pytest.raises(ConfigError, match="CpuCommunicator is for cpu, not for cuda:0"):
        CpuCommunicator(None, "cuda:0")
