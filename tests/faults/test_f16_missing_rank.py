"""F16: a rank never arrives. The error names it, and the address that was tried."""

from tcomm.groups.stateless.addresses import bind_listen_socket
from tcomm.groups.stateless.gloo import stateless_init_torch_distributed_process_group
from tcomm.groups.stateless.group import StatelessProcessGroup
from tests.faults.worlds import failure_of


def _some_come(member, kind, absent):
    size = member.world_size + 1
    if member.rank == 0 and absent:
        listening = bind_listen_socket("127.0.0.1")
        port = listening.getsockname()[1]
        member.store.set("port", str(port))
    else:
        listening, port = None, int(member.store.get("port"))
    # Ranks 0 and 1 of 3, or 1 and 2 of them.
    rank = member.rank + (absent == 0)
    if kind == "stateless":
        failure = failure_of(
            StatelessProcessGroup.create, "127.0.0.1", port, rank, size, store_timeout=1, listen_socket=listening
        )
    else:
        failure = failure_of(
            stateless_init_torch_distributed_process_group,
            "127.0.0.1", port, rank, size, "gloo", timeout=1, listen_socket=listening,
        )  # fmt: skip
    member.meet("failed")
    return failure, port


def test_f16_missing_ranks_are_named_with_the_address_on_every_rank(world):
    for kind, name in {"stateless": "stateless", "gloo": "torch"}.items():
        told = world(2, _some_come, kind, 2)
        for failure, port in told:
            assert failure.kind == "RendezvousError"
            assert failure.text == (
                f"ranks [2] of 3 did not come to group {name!r} at the store at 127.0.0.1:{port} within "
                f"{failure.text.split(' within ')[1].split(' s;')[0]} s; check that they run, and with the same "
                "address, or give a longer store_timeout="
            )
            assert 0.5 < failure.seconds < 3.0
        assert told[0][0].text == told[1][0].text


def _nobody_listens(member):
    with bind_listen_socket("127.0.0.1") as listening:
        port = listening.getsockname()[1]
    failure = failure_of(
        StatelessProcessGroup.create, "127.0.0.1", port, member.rank + 1, 3, store_timeout=0.5
    )
    return failure, port


def test_f16_without_rank_0_the_address_that_was_tried_is_told(world):
    for failure, port in world(2, _nobody_listens):
        assert failure.kind == "RendezvousError"
        assert failure.text.startswith(
            f"rank 0 is missing: nobody accepts connections at 127.0.0.1:{port} after 0.5 s (Connection refused)"
        )
        assert failure.seconds < 2.0
