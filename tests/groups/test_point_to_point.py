import itertools
import logging
import time

import pytest
import torch

import tcomm
from tcomm.errors import (
    CapabilityError,
    CollectiveMismatchError,
    ConfigError,
    GroupClosedError,
    PeerTimeoutError,
)
from tcomm.memory import shm
from tcomm.memory.control import Word
from tests.groups.test_verbs import on_gloo

ENGINES = [("", ""), ("triton", "triton"), ("cpu", "triton"), ("triton", ""), ("torch", "torch")]


def _rows(rank, *shape, dtype=torch.float32):
    return (torch.arange(torch.Size(shape).numel()).view(shape) + 100 * rank).to(dtype)


def _ring(member, algorithms):
    """Around a ring, strided at both ends; even ranks by the first algorithm, odd ranks by the second."""
    comm, world = on_gloo(member), member.world_size
    algorithm = algorithms[member.rank % 2]
    following, previous = (member.rank + 1) % world, (member.rank - 1) % world
    for turn in range(3):
        wide = torch.zeros(3, 4)
        out = wide[:, ::2].t()
        if member.rank == 0:
            assert comm.send(_rows(turn, 3, 2).t(), following, algorithm=algorithm) is None
            assert comm.recv(out, previous, algorithm=algorithm) is out
        else:
            assert comm.recv(out, previous, algorithm=algorithm) is out
            comm.send(_rows(member.rank + turn, 3, 2).t(), following, algorithm=algorithm)
        assert out.equal(_rows(previous + turn, 3, 2).t())
        assert wide[:, 1::2].eq(0).all()
    comm.barrier()
    comm.close()


@pytest.mark.parametrize(("world_size", "algorithms"), [*((2, pair) for pair in ENGINES), (3, ("", ""))])
def test_send_and_receive_around_a_ring(on_ranks, world_size, algorithms):
    on_ranks(world_size, _ring, algorithms)


def _among_collectives(member, algorithms):
    """Every pair exchanges between all-reduces, which alone advance the epoch."""
    comm = member.communicator()
    algorithm = algorithms[member.rank % 2]
    peers = [peer for peer in range(member.world_size) if peer != member.rank]
    words = comm._arena.channel.words
    comm.barrier()
    for turn in range(12):
        epoch = words[Word.EPOCH]
        for peer in peers:
            comm.send(_rows(member.rank + turn, turn), peer, algorithm=algorithm)
        for peer in peers:
            assert comm.recv(torch.zeros(turn), peer, algorithm=algorithm).equal(_rows(peer + turn, turn))
        assert words[Word.EPOCH] == epoch
        total = comm.all_reduce(torch.ones(5 + turn))
        assert total.eq(member.world_size).all()
    comm.close()


@pytest.mark.parametrize(
    ("world_size", "algorithms"), [(2, ("", "")), (2, ("triton", "")), (3, ("cpu", "")), (4, ("", ""))]
)
def test_messages_and_collectives_alternate_without_touching_each_other(on_ranks, world_size, algorithms):
    on_ranks(world_size, _among_collectives, algorithms)


def _asynchronous(member):
    comm = member.communicator()
    peer = 1 - member.rank
    x = [torch.full((1000,), float(number + 10 * member.rank)) for number in range(4)]
    sends = [comm.send(part, peer, async_op=True) for part in x]
    summed = comm.all_reduce(torch.ones(3), async_op=True)
    outs = [torch.zeros(1000) for _ in range(4)]
    receives = [comm.recv(out, peer, async_op=True) for out in outs]
    comm.send(torch.ones(2), peer)
    assert comm.recv(torch.zeros(2), peer).tolist() == [1.0, 1.0]
    assert [work.wait() is part for work, part in zip(sends, x, strict=True)] == [True] * 4
    assert [work.wait() is out for work, out in zip(receives, outs, strict=True)] == [True] * 4
    assert summed.wait().tolist() == [2.0] * 3
    assert [out.unique().tolist() for out in outs] == [[n + 10.0 * peer] for n in range(4)]
    comm.close()


def test_asynchronous_messages_keep_the_order_of_the_calls(on_ranks):
    on_ranks(2, _asynchronous)


def _views(member):
    comm = member.communicator()
    z = torch.tensor([1 + 2j, 3 - 4j])
    sent = [z.conj(), z.conj().imag, torch.tensor(7.0), torch.ones(1).expand(4), torch.zeros(3, 0, 2)]
    for x, algorithm in itertools.product(sent, ("cpu", "triton")):
        if member.rank == 0:
            comm.send(x, 1, algorithm=algorithm)
        else:
            out = torch.zeros(x.shape, dtype=x.dtype)
            assert comm.recv(out, 0, algorithm=algorithm).equal(x.resolve_conj().resolve_neg())
    into = torch.zeros(2, dtype=torch.complex64)
    if member.rank == 0:
        comm.send(z, 1)
    else:
        assert comm.recv(into.conj(), 0).equal(z)
        assert into.equal(z.conj())
    with torch.inference_mode():
        if member.rank == 0:
            comm.send(torch.ones(4), 1)
        else:
            assert comm.recv(torch.zeros(4), 0).eq(1).all()
    comm.close()


def test_views_are_sent_and_received_by_their_values(on_ranks):
    on_ranks(2, _views)


def _bad_calls(comm):
    x, other = torch.ones(4, 2), 1 - comm.rank
    ranks = "is not a rank of this group; ranks are 0 to 1"
    with torch.inference_mode():
        inference = torch.ones(3)
    return [
        (lambda: comm.send(x, comm.rank), f"dst={comm.rank} of send is this rank itself; name another"),
        (lambda: comm.send(x, -1), f"dst=-1 of send {ranks}"),
        (lambda: comm.send(x, [1]), f"dst=[1] of send {ranks}"),
        (lambda: comm.recv(x, 7), f"src=7 of recv {ranks}"),
        (lambda: comm.recv(x, comm.rank), f"src={comm.rank} of recv is this rank itself; name another"),
        (lambda: comm.send([1.0], other), "send takes a torch.Tensor, not list"),
        (lambda: comm.send(torch.eye(3).to_sparse(), other), "send takes a dense tensor, not one of layout"),
        (lambda: comm.recv(torch.ones(4, 2, requires_grad=True), other), "recv would lose the gradient"),
        (lambda: comm.recv(torch.ones(1).expand(4), other), "out= of recv has several elements in one place"),
        (lambda: comm.recv(inference, other), "out= of recv was made in inference mode"),
        (lambda: comm.send(x, other, timeout="never"), "timeout 'never' is neither seconds nor one of "),
        (lambda: comm.recv(x, -2, async_op=True), f"src=-2 of recv {ranks}"),
    ]


def _refuses_and_goes_on(member):
    comm = member.communicator()
    if member.rank == 0:
        comm.send(torch.ones(4, 2), 1)
        for call, message in _bad_calls(comm):
            with pytest.raises(ConfigError) as caught:
                call()
            assert str(caught.value).startswith(message), str(caught.value)
        for verb in (comm.send, comm.recv):
            with pytest.raises(CapabilityError) as caught:
                verb(torch.ones(3), 1, algorithm="two_shot")
            assert str(caught.value) == (
                f"algorithm 'two_shot' is not known for {verb.__name__}; give one of cpu, triton, torch, "
                "cpu:mailbox, triton:mailbox, torch:none"
            )
        comm.send(torch.ones(3), 1)
    else:
        assert comm.recv(torch.zeros(4, 2), 0).eq(1).all()
        assert comm.recv(torch.zeros(3), 0).eq(1).all()
    comm.close()


def test_a_bad_argument_sends_and_receives_nothing(on_ranks):
    on_ranks(2, _refuses_and_goes_on)


def _mismatch_and_timeout(member):
    comm = member.communicator(name="tp")
    if member.rank == 0:
        comm.send(torch.arange(3.0), 1)
    else:
        with pytest.raises(CollectiveMismatchError) as caught:
            comm.recv(torch.zeros(4), 0)
        assert "  rank 0 sent: float32 [3] (12 bytes)\n  rank 1 asked for: float32 [4] (16 bytes)" in str(
            caught.value
        )
    comm.barrier()
    if member.rank == 1:
        assert comm.recv(torch.zeros(3), 0).tolist() == [0.0, 1.0, 2.0]
        started = time.monotonic()
        with pytest.raises(PeerTimeoutError, match="the group stays usable"):
            comm.recv(torch.zeros(3), 0, timeout=0.2)
        assert time.monotonic() - started < 3.0
        work = comm.recv(torch.zeros(3), 0, async_op=True, timeout=10.0)
        with pytest.raises(PeerTimeoutError, match=r"after 0\.2 s; it goes on; rank 0 is silent"):
            work.wait(0.2)
    member.meet("waiting")
    if member.rank == 0:
        comm.send(torch.arange(3.0), 1)
    else:
        assert work.wait().tolist() == [0.0, 1.0, 2.0]
    assert comm.all_reduce(torch.ones(1)).item() == 2.0
    comm.close()
    with pytest.raises(GroupClosedError):
        comm.send(torch.arange(3.0), 1 - member.rank)
    with pytest.raises(GroupClosedError):
        comm.recv(torch.arange(3.0), 1 - member.rank)


def test_the_group_stays_usable_after_a_mismatch_and_after_a_deadline(on_ranks):
    on_ranks(2, _mismatch_and_timeout)


class _Lines(logging.Handler):
    def __init__(self):
        super().__init__()
        self.told = []

    def emit(self, record):
        self.told.append(record.getMessage())


def _by_torch(member, is_shared):
    if not is_shared:
        shm.why_unordered = lambda: "this test says so"
    lines = _Lines()
    logger = logging.getLogger("tcomm")
    logger.addHandler(lines)
    logger.setLevel(logging.INFO)
    comm = on_gloo(member, name="tp")
    algorithm = "torch" if is_shared else ""
    for numel in (3, 4, 3):
        if member.rank == 0:
            comm.send(torch.ones(numel), 1, algorithm=algorithm)
        else:
            assert comm.recv(torch.zeros(numel), 0, algorithm=algorithm).eq(1).all()
    if not is_shared:
        with pytest.raises(
            CapabilityError, match=r"'cpu', which was asked for, cannot do send .*the ranks share"
        ):
            comm.send(torch.ones(3), 1 - member.rank, algorithm="cpu")
    comm.close()
    return [line for line in lines.told if "send and recv" in line]


def test_what_goes_to_torch_says_why_once(on_ranks):
    told = "group 'tp': send and recv go to torch:gloo: "
    assert on_ranks(2, _by_torch, True) == [[f"{told}'torch' was asked for by name"]] * 2
    for lines in on_ranks(2, _by_torch, False):
        assert len(lines) == 1
        assert lines[0].startswith(f"{told}the ranks share no memory (rank 0: this test says so")


def _nobody_to_fall_back_to(member):
    comm = member.communicator(name="tp")
    with pytest.raises(CapabilityError) as caught:
        comm.send(torch.ones(3), 1 - member.rank, algorithm="torch")
    meta = torch.ones(3, device="meta")
    with pytest.raises(CapabilityError, match="no symmetric memory for meta tensors"):
        comm.recv(meta, 1 - member.rank)
    comm.close()
    return str(caught.value)


def test_without_a_process_group_torch_is_refused(on_ranks):
    told = (
        "'torch', which was asked for, cannot do send of torch.float32 (torch:none: there is no "
        "torch.distributed process group for cpu tensors behind this group)"
    )
    assert on_ranks(2, _nobody_to_fall_back_to) == [told] * 2


def test_a_world_of_one_has_nobody_to_send_to():
    with tcomm.Communicator() as comm, pytest.raises(ConfigError, match="dst=0 of send is this rank itself"):
        comm.send(torch.ones(3), 0)
