import gc
import threading
import time

import pytest
import torch.distributed as dist

from tcomm.errors import ConfigError, RendezvousError
from tcomm.groups.stateless import creation
from tcomm.groups.stateless.addresses import bind_listen_socket
from tcomm.groups.stateless.creation import check_place, check_seconds, open_group
from tcomm.groups.stateless.stores import join_at
from tcomm.memory.liveness import my_identity


def _open_both(**options):
    """What both ranks of a group got, each in a thread."""
    opened = {}

    def run(rank):
        opened[rank] = open_group("127.0.0.1", 0, rank, 2, timeout=20.0, **options)

    threads = [threading.Thread(target=run, args=(rank,)) for rank in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return opened[0], opened[1]


def test_a_free_port_is_told_by_a_store_that_the_ranks_have():
    via = dist.HashStore()
    for _ in range(2):
        first, second = _open_both(name="g", via=via)
        assert first.prefix == second.prefix
        assert (first.point.port, first.point.serves) == (second.point.port, True)
        assert first.identities == (my_identity(),) * 2
        first.sealed.set("a", b"1")
        assert second.sealed.get("a") == b"1"
        assert via.num_keys() == 0


def test_groups_at_one_address_share_its_store_and_no_keys():
    listening = bind_listen_socket("127.0.0.1")
    port = listening.getsockname()[1]
    opened = {}

    def run(rank, name):
        handed = listening if (rank, name) == (0, "g0") else None
        opened[rank, name] = open_group("127.0.0.1", port, rank, 2, name, 20.0, handed)

    run_first = threading.Thread(target=run, args=(1, "g0"))
    run_first.start()
    run(0, "g0")
    run_first.join()
    others = [threading.Thread(target=run, args=(rank, f"g{n}")) for n in range(1, 6) for rank in range(2)]
    for thread in others:
        thread.start()
    for thread in others:
        thread.join()
    assert len({id(group.point) for (rank, _), group in opened.items() if rank == 0}) == 1
    assert len({group.prefix for group in opened.values()}) == 6
    opened[0, "g1"].sealed.set("a", b"1")
    assert not opened[1, "g2"].sealed.check(["a"])


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"rank": 2}, "rank 2 of 2 ranks"),
        ({"rank": -1}, "rank -1 of 2 ranks"),
        ({"port": 0}, "port 0 is a free port that the other ranks cannot know"),
        ({"timeout": 0}, "timeout is 0, which is not a positive number of seconds"),
    ],
)
def test_what_makes_no_sense_is_refused(options, told):
    usual = {"host": "127.0.0.1", "port": 1, "rank": 0, "world_size": 2, "name": "g", "timeout": 1.0}
    with pytest.raises(ConfigError, match=told):
        open_group(**usual | options)


def test_only_rank_0_listens():
    told = "rank 1 gave a listen_socket; rank 0 alone listens"
    with bind_listen_socket("127.0.0.1") as listening, pytest.raises(ConfigError, match=told):
        open_group("127.0.0.1", 1, 1, 2, "g", 1.0, listening)


def test_alone_a_socket_is_closed():
    listening = bind_listen_socket("127.0.0.1")
    opened = open_group("127.0.0.1", 1, 0, 1, "g", 1.0, listening)
    assert (opened.point, listening.fileno()) == (None, -1)


def test_a_port_that_is_not_told_is_not_waited_for():
    with pytest.raises(RendezvousError, match="rank 0 of group 'g' told no port by the store given"):
        open_group("127.0.0.1", 0, 1, 2, "g", 0.1, via=dist.HashStore())
    via = dist.HashStore()
    creation.SealedStore(via, context="address of g").set("tcomm/g/port/1", b"no number")
    with pytest.raises(RendezvousError, match="as the port of group 'g' is none: b'no number'"):
        open_group("127.0.0.1", 0, 1, 2, "g", 0.1, via=via)


def test_two_groups_of_one_name_that_one_process_opens_take_turns():
    listening = bind_listen_socket("127.0.0.1")
    port = listening.getsockname()[1]
    told = []

    def first():
        try:
            open_group("127.0.0.1", port, 0, 2, "g", 1.0, listening)
        except RendezvousError as error:
            told.append(str(error))

    thread = threading.Thread(target=first)
    thread.start()
    deadline = time.monotonic() + 1.0
    while not creation.join_at("127.0.0.1", port, 1.0).sealed(None, 1.0).check(["group/g/open"]):
        assert time.monotonic() < deadline
    with pytest.raises(RendezvousError, match="another group 'g' of this process still waits for its ranks"):
        open_group("127.0.0.1", port, 0, 2, "g", 0.1)
    thread.join()
    assert told[0].startswith("ranks [1] of 2 did not come to group 'g' at the store at 127.0.0.1:")


def test_a_place_and_seconds_are_numbers():
    check_place(0, 1)
    for rank, size in ((True, 2), (0, True), ("0", 1), (None, 1), (1, 1), (-1, 2), (0, 2.0)):
        with pytest.raises(ConfigError, match=f"rank {rank!r} of {size!r} ranks"):
            check_place(rank, size)
    assert check_seconds("timeout", 1.5) == 1.5
    for wrong in (None, "x", True, 0, -1.0, float("nan")):
        with pytest.raises(ConfigError, match=r"timeout is .* not a positive number of seconds"):
            check_seconds("timeout", wrong)


WRONG_ADDRESSES = [
    *[(host, 0) for host in (None, 5, "")],
    *[("127.0.0.1", port) for port in (None, "1", -1, 70000, True)],
]


@pytest.mark.parametrize(("host", "port"), WRONG_ADDRESSES)
def test_a_group_of_one_has_an_address_too(host, port):
    with pytest.raises(ConfigError, match=f"host {host!r}, port {port!r}; give an address"):
        open_group(host, port, 0, 1, "g", 5.0)
    assert open_group("127.0.0.1", 0, 0, 1, "g", 5.0).point is None


def _fails_at_once(member):
    """Rank 0 serves and fails; rank 1 comes a moment later."""
    if member.rank == 0:
        listening = bind_listen_socket("127.0.0.1")
        member.store.set("port", str(listening.getsockname()[1]))
        with pytest.raises(RendezvousError, match=r"ranks \[1\] of 2 did not come"):
            open_group("127.0.0.1", 0, 0, 2, "g", 0.3, listening)
        gc.collect()
        member.store.set("failed", "")
        member.meet("looked")
        return None
    while not member.store.check(["failed"]):
        time.sleep(0.01)
    store = join_at("127.0.0.1", int(member.store.get("port")), 1.5).sealed(None, 1.5)
    found = store.check(["anything"])
    member.meet("looked")
    return found


def test_who_serves_stays_a_moment_when_the_group_fails(on_ranks):
    assert on_ranks(2, _fails_at_once)[1] is False
