"""F16: a rank never arrives. The error names it, and the address that was tried."""

import re

from tcomm.groups.stateless.addresses import bind_listen_socket
from tcomm.groups.stateless.gloo import stateless_init_torch_distributed_process_group
from tcomm.groups.stateless.group import StatelessProcessGroup
from tests.faults.meeting import create
from tests.faults.worlds import failure_of

TOLD = (
    r"ranks \[2\] of 3 did not come to group '{}' at the store at 127\.0\.0\.1:\d+ within [0-9.]+ s; "
    "check that they run, and with the same address, or give a longer store_timeout="
)


def _one_is_missing(member):
    first = create(member, member.rank, 2, "both")
    stateless = failure_of(create, member, member.rank, 3, timeout=0.7)
    port = int(member.store.get("port"))
    member.meet("failed")
    gloo = failure_of(
        stateless_init_torch_distributed_process_group,
        "127.0.0.1", port, member.rank, 3, "gloo", timeout=0.7,
    )  # fmt: skip
    first.barrier()
    return stateless, gloo


def test_f16_who_did_not_come_is_named_with_the_address_on_every_rank(world):
    first, second = world(2, _one_is_missing)
    for name, *failures in zip(("g", "torch"), first, second, strict=True):
        for failure in failures:
            assert failure.kind == "RendezvousError"
            assert re.fullmatch(TOLD.format(name), failure.text), failure.text
            assert 0.4 < failure.seconds < 3.0
        assert failures[0].text == failures[1].text


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
            f"rank 0 is missing: nobody accepts connections at 127.0.0.1:{port} after 0.5 s "
            "(Connection refused)"
        )
        assert failure.seconds < 2.0
