import torch

from tcomm.memory import regions
from tcomm.memory.base import SymmetricBuffer
from tcomm.memory.regions import Regions


def _buffers(memory, *bounds):
    """A region of one rank for each range of bytes of `memory`."""
    return [SymmetricBuffer(0, [memory[first:last]]) for first, last in bounds]


def test_a_place_has_the_number_of_its_region_and_the_bytes_into_it():
    memory = torch.zeros(100, dtype=torch.uint8)
    late, early = _buffers(memory, (50, 80), (10, 30))
    found = Regions()
    assert found.is_empty
    assert found.name(memory[10:]) == ""
    found.add(late, 7)
    assert not found.is_empty
    found.add(early, 9)
    names = {at: found.name(memory[at:]) for at in (0, 9, 10, 29, 30, 49, 50, 79, 80, 99)}
    assert {at: name for at, name in names.items() if name} == {
        10: "symmetric tensor of call #9 from byte 0 on",
        29: "symmetric tensor of call #9 from byte 19 on",
        50: "symmetric tensor of call #7 from byte 0 on",
        79: "symmetric tensor of call #7 from byte 29 on",
    }
    assert found.find(names[29]) == (early, 19)
    assert found.find("") is None
    found.clear()
    assert found.is_empty
    assert (found.name(memory[10:]), found.find(names[29])) == ("", None)


def test_few_names_are_kept(monkeypatch):
    monkeypatch.setattr(regions, "_MAX_NAMES", 4)
    memory = torch.zeros(100, dtype=torch.uint8)
    found = Regions()
    found.add(*_buffers(memory, (0, 50)), 1)
    for at in range(100):
        name = found.name(memory[at:])
        assert (found.find(name) is not None) == (at < 50)
        assert len(found._names) <= 4
        assert len(found._places) <= 4
