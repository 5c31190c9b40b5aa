import types

import pytest
import torch.distributed as dist

from tcomm.errors import ConfigError, PeerLostError, PeerTimeoutError
from tcomm.groups.stateless.rows import comm_error, gather_rows, has_cpu_backend


def _gather(member):
    member.process_group()
    group = dist.group.WORLD
    rows = gather_rows(group, bytes([member.rank] * member.rank), 16, 10.0)
    with pytest.raises(ConfigError, match="13 bytes do not fit a row of 16"):
        gather_rows(group, bytes(13), 16, 10.0)
    assert has_cpu_backend(group)
    if member.rank == 0:
        with pytest.raises(
            PeerTimeoutError, match=r"gather_rows: Timed out after 0\.2 s of waiting for the others"
        ):
            gather_rows(group, b"", 16, 0.2)
    else:
        member.meet("failed")
    if member.rank == 0:
        member.meet("failed")
    return rows


def test_rows_of_any_length_up_to_theirs(on_ranks):
    assert on_ranks(2, _gather) == [[b"", b"\x01"]] * 2


def test_a_group_without_a_backend_for_the_cpu():
    assert not has_cpu_backend(dist.ProcessGroup(0, 1))


def test_failures_of_gloo_name_the_ranks():
    group = types.SimpleNamespace(group_name="three", rank=lambda: 0)
    late = comm_error(RuntimeError("x.cc:1] Timed out waiting 5ms\nmore"), "op", group, 5.0, (1, 2))
    assert str(late) == "op: Timed out after 5 s of waiting for ranks 1, 2: x.cc:1] Timed out waiting 5ms"
    assert (type(late), late.peers, late.rank, late.group) == (PeerTimeoutError, (1, 2), 0, "three")
    lost = comm_error(RuntimeError("closed by peer"), "op", group, 5.0, (1,))
    assert str(lost) == "op: the connection was lost while waiting for rank 1: closed by peer"
    assert (type(lost), lost.peers) == (PeerLostError, (1,))
