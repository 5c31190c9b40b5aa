import pytest

from tcomm.errors import ConfigError
from tcomm.groups.all2all import making
from tcomm.groups.all2all.choice import BACKENDS
from tcomm.groups.all2all.gather import AgRsAll2AllManager
from tcomm.groups.all2all.making import make_manager
from tcomm.groups.stateless.group import StatelessProcessGroup


def test_a_manager_by_name():
    group = StatelessProcessGroup(rank=0, world_size=1, store=None, socket=None)
    made = make_manager("allgather_reducescatter", group)
    assert (type(made), made.cpu_group, made.tcp_store_group) == (AgRsAll2AllManager, group, None)
    assert make_manager("naive", group, group).tcp_store_group is group
    with pytest.raises(
        ConfigError, match="all2all backend 'mori' is unknown; give one of allgather_reducesc"
    ):
        make_manager("mori", group)


@pytest.mark.parametrize("backend", BACKENDS)
def test_every_name_has_its_manager(backend, monkeypatch):
    seen = []
    monkeypatch.setattr(making, "resolve_obj_by_qualname", lambda name: seen.append(name) or (lambda g: g))
    assert make_manager(backend, "group") == "group"
    assert seen == [BACKENDS[backend]]
