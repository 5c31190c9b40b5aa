"""What becomes of a group on GPUs when something goes wrong, over device memory that a fake made."""

import os
import signal
import threading
import time

import pytest
import torch

from tcomm.errors import (
    CapabilityError,
    CollectiveMismatchError,
    GroupClosedError,
    PeerLostError,
    PeerTimeoutError,
)
from tcomm.kernels import bound
from tcomm.kernels.all_reduce import LAUNCHERS
from tcomm.memory import device_arena as device_arena_module
from tcomm.memory.base import SymmetricBuffer
from tcomm.memory.call_notes import CallNotes
from tcomm.memory.channel import Channel
from tcomm.memory.control import CONTROL_BYTES, ControlPage, ErrorKind, HostWord, PoisonCode, Word
from tcomm.memory.device_channel import DeviceChannel
from tcomm.memory.probe import prove_access
from tcomm.memory.runtime import StreamOrder
from tcomm.signature import CallDescription
from tests.faults.worlds import failure_of
from tests.kernels.test_all_reduce import use_tiles
from tests.memory.fake_symm_mem import (
    FakeRuntime,
    FakeSymmetricMemory,
    LyingMemory,
    device_arena,
    on_device,
)


def _reduce(arena, numel=5, timeout=20.0, name="one_shot_push"):
    return LAUNCHERS[name](torch.ones(numel), arena, timeout=timeout)


# A rank that never comes -----------------------------------------------------------------------------


def _never_comes(member, name):
    host = member.arena(name="host")
    arena = device_arena(member, host=host.channel)
    assert _reduce(arena)[0] == 3
    if member.rank == 2:
        member.meet("over")
        late = failure_of(_reduce, arena)
    else:
        late = failure_of(_reduce, arena, timeout=0.5, name=name)
        again = failure_of(_reduce, arena)
        assert (again.kind, again.peers) == (late.kind, late.peers)
        assert again.seconds < 0.2
        member.meet("over")
    arena.close()
    host.close("done")
    return late.kind, late.peers, late.seconds, late.text, late.seq, late.op


@pytest.mark.parametrize("name", ["one_shot_push", "one_shot_ll", "two_shot"])
def test_a_rank_that_never_comes_is_named_within_the_deadline_and_the_group_is_over(on_ranks, name):
    *waited, late = on_ranks(3, _never_comes, name)
    for kind, peers, seconds, text, seq, op in waited:
        assert (kind, peers, seq, op) == ("PeerTimeoutError", (2,), 2, "all_reduce")
        assert seconds < 1.5
        assert "rank 2 is silent" in text or "the others gave up" in text or "given up at call #2" in text
    assert any("timed out on a GPU after 0.5 s" in text for _, _, _, text, _, _ in waited)
    assert late[0] == "PeerTimeoutError"
    assert "the others gave up waiting for this rank, 2" in late[3]


def _silent_between_hosts(member):
    arena = device_arena(member)
    if member.rank == 0:
        found = failure_of(_reduce, arena, timeout=0.4)
        assert arena.channel._watch is None
        assert (found.kind, found.peers) == ("PeerTimeoutError", (1,)), found
        assert "rank 1 is silent" in found.text
    member.meet("over")
    arena.close()


def test_without_host_memory_deadlines_on_the_device_are_all_there_is(on_ranks):
    on_ranks(2, _silent_between_hosts)


# A rank that is gone ---------------------------------------------------------------------------------


def _killed(member):
    host = member.arena(name="host")
    arena = device_arena(member, host=host.channel)
    _reduce(arena)
    member.meet("one call")
    if member.rank == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    lost = failure_of(_reduce, arena, timeout=None)
    again = failure_of(_reduce, arena, timeout=None)
    assert (again.kind, again.seconds < 0.2) == ("PeerLostError", True)
    # The host's own calls of the group are over, too.
    with pytest.raises(PeerLostError):
        host.channel.begin(CallDescription("barrier"), 1.0)
    arena.close()
    host.close("done")
    return lost


def test_a_killed_rank_ends_waits_without_a_deadline_within_two_seconds(on_ranks):
    outcomes = on_ranks(3, _killed, check=False)
    assert outcomes[1].exitcode == -signal.SIGKILL
    for rank in (0, 2):
        lost = outcomes[rank].value
        assert lost is not None, outcomes[rank].error
        assert (lost.kind, lost.peers, lost.op, lost.seq) == ("PeerLostError", (1,), "all_reduce", 2)
        assert lost.seconds < 2.0
        assert "killed by SIGKILL" in lost.text or "gone" in lost.text


def _leaves(member):
    host = member.arena(name="host")
    arena = device_arena(member, host=host.channel)
    _reduce(arena)
    if member.rank == 1:
        arena.close()
        host.close("it had enough")
        member.meet("over")
        return None
    lost = failure_of(_reduce, arena, timeout=None)
    member.meet("over")
    arena.close()
    host.close("done")
    return lost


def test_a_rank_that_leaves_is_named_with_its_reason(on_ranks):
    lost, _ = on_ranks(2, _leaves)
    assert (lost.kind, lost.peers) == ("PeerLostError", (1,))
    assert "rank 1 left: it had enough" in lost.text


def _aborted_before_a_call(member):
    """The watch finds the peer gone while nothing waits: the next call says so before it is launched."""
    host = member.arena(name="host")
    arena = device_arena(member, host=host.channel)
    if member.rank == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    time.sleep(1.2)
    launched = sum(bound.launches.values())
    lost = failure_of(_reduce, arena)
    assert sum(bound.launches.values()) == launched
    grown = failure_of(arena.grow, 1 << 21, 5.0)
    assert grown.kind == "PeerLostError"
    arena.close()
    host.close("done")
    return lost


def test_the_next_call_after_the_watch_saw_a_death_is_not_launched(on_ranks):
    outcomes = on_ranks(2, _aborted_before_a_call, check=False)
    lost = outcomes[0].value
    assert lost is not None, outcomes[0].error
    assert (lost.kind, lost.peers) == ("PeerLostError", (1,))
    assert lost.seconds < 0.2


def _grows_over_an_error(member):
    """One rank has an error to tell when staging is made: it comes along, and tells it afterwards."""
    with on_device(member) as arena:
        if member.rank == 0:
            _put_down(arena.channel, ErrorKind.MISMATCH, 1)
            with pytest.raises(CollectiveMismatchError):
                arena.grow(1 << 21, 5.0)
        else:
            arena.grow(1 << 21, 5.0)
        assert arena.staging.layout.nbytes == 1 << 21
        assert _reduce(arena)[0] == 2


def test_growing_raises_what_is_known_behind_it_so_that_nobody_waits(on_ranks):
    on_ranks(2, _grows_over_an_error)


def _dropped(member):
    host = member.arena(name="host")
    arena = device_arena(member, host=host.channel)
    names = {thread.name for thread in threading.enumerate()}
    assert "tcomm-watch-device" in names
    arena.close()
    host.close("done")
    assert "tcomm-watch-device" not in {thread.name for thread in threading.enumerate()}


def test_the_watch_ends_with_its_arena(on_ranks):
    on_ranks(1, _dropped)


# Ranks that call different things --------------------------------------------------------------------


def _mismatch(member, with_host):
    host = member.arena(name="host") if with_host else None
    arena = device_arena(member, host=None if host is None else host.channel)
    texts = []
    for round_ in range(2):
        assert _reduce(arena)[0] == 3
        found = failure_of(_reduce, arena, numel=4 + (member.rank == 1))
        assert (found.kind, found.op, found.seq) == ("CollectiveMismatchError", "all_reduce", 2 + 3 * round_)
        texts.append((found.text, found.peers))
        # And the words on the device are clean again, so that the next error is told, too.
        assert _reduce(arena)[0] == 3
    assert int(arena.control.local.view(torch.int64)[Word.ERROR_KIND]) == ErrorKind.NONE
    member.meet("over")
    arena.close()
    if host is not None:
        host.close("done")
    return texts


def test_a_mismatch_shows_what_every_rank_called_and_the_group_stays_usable(on_ranks):
    (first, _), (second, _), (third, _) = on_ranks(3, _mismatch, True)
    lines = first[0].split("\n")
    assert lines[0] == "call #2 of group 'device' on GPUs: the ranks called different things"
    assert [line.split("all_reduce float32 ")[1][:3] for line in lines[1:4]] == ["[4]", "[5]", "[4]"]
    assert lines[4] == "make the ranks call the same thing; the group stays usable"
    assert first[0] == second[0] == third[0]
    assert (first[1], second[1], third[1]) == ((1,), (0, 2), (1,))


def test_between_hosts_a_mismatch_says_what_this_rank_called(on_ranks):
    (first, _), (second, _), _ = on_ranks(3, _mismatch, False)
    assert "rank 0: all_reduce float32 [4]" in first[0]
    assert "rank 1: a call of signature " in first[0]
    assert "rank 2: not known here" in first[0]
    assert "rank 1: all_reduce float32 [5]" in second[0]


def test_a_note_of_a_call_is_found_by_its_signature_until_others_have_its_place():
    page = ControlPage(torch.zeros(CONTROL_BYTES, dtype=torch.uint8))
    notes = CallNotes(page)
    calls = [CallDescription("all_reduce", "float32", (n,)) for n in range(1, 50)]
    for seq, call in enumerate(calls, 1):
        notes.put(seq, call)
    assert notes.find(calls[48].signature) == (49, calls[48])
    assert notes.find(calls[0].signature) is None
    assert notes.at(20) == (calls[19].signature, calls[19])
    assert notes.at(17) is None
    long = CallDescription("all_gatherv", sizes=tuple(range(1000, 1100)))
    notes.put(50, long)
    signature, found = notes.at(50)
    assert (signature, found.op, found.sizes) == (long.signature, "all_gatherv", ())


# Peer access that is only promised -------------------------------------------------------------------


def _probe(member, liar):
    memory = (LyingMemory if member.rank == liar else FakeSymmetricMemory)(
        member.exchange("memory"), **({"about": [1]} if member.rank == liar else {})
    )

    def prove(arena):
        arena.unreachable = prove_access(member.exchange("probe"), arena.control, memory.settle, 20.0)

    arena = device_arena(member, memory, prove=prove)
    member.meet("over")
    arena.close()
    return arena.unreachable


def test_everybody_reaches_everybody_where_nobody_lies(on_ranks):
    assert on_ranks(3, _probe, 99) == [{}, {}, {}]


def test_peer_access_that_does_not_work_is_found_out(on_ranks):
    found = on_ranks(3, _probe, 0)
    assert found == [
        {1: "writing: 4 of 4 words that rank 0 wrote are wrong for rank 1"},
        {},
        {},
    ]


def _lies_about_reading(member):
    """Writes arrive, and what is read is of another place."""
    memory = FakeSymmetricMemory(member.exchange("memory"))
    arena = device_arena(member, memory)
    control = arena.control
    if member.rank == 0:
        true_peer = SymmetricBuffer.peer
        reads = torch.zeros_like(control.local)

        class OneWay(SymmetricBuffer):
            def peer(self, rank, shape=None, dtype=torch.uint8, offset=0):
                wrote = getattr(self, "wrote", False)
                self.wrote = wrote or rank == 1
                if rank == 1 and wrote:
                    return true_peer(SymmetricBuffer(0, [reads]), 0, shape, dtype, offset)
                return true_peer(self, rank, shape, dtype, offset)

        control = OneWay(0, [control.peer(r) for r in range(2)])
    found = prove_access(member.exchange("probe"), control, memory.settle, 20.0)
    arena.close()
    return found


def test_reading_is_proved_apart_from_writing(on_ranks):
    found = on_ranks(2, _lies_about_reading)
    assert found == [{1: "reading: 4 of 4 words that rank 1 wrote are wrong for rank 0"}, {}]


def _write_fails(member):
    memory = FakeSymmetricMemory(member.exchange("memory"))
    if member.rank == 1:

        def settle():
            raise RuntimeError("CUDA error: an illegal memory access was encountered\nmore")

        memory.settle = settle
    page = torch.zeros(2, CONTROL_BYTES, dtype=torch.uint8)
    return prove_access(member.exchange("probe"), SymmetricBuffer(member.rank, list(page)), memory.settle, 20)


def test_a_device_that_fails_at_it_reaches_nobody(on_ranks):
    why = "rank 1: writing to its peers failed: CUDA error: an illegal memory access was encountered"
    assert on_ranks(2, _write_fails) == [{1: why}, {0: why, 1: why}]


# Streams and captures --------------------------------------------------------------------------------


def _channel(runtime=None, settle=lambda: None):
    page = torch.zeros(CONTROL_BYTES // 8, dtype=torch.int64)
    return DeviceChannel("graphs", 0, 2, page, runtime or FakeRuntime(), settle, None)


_CALL = CallDescription("all_reduce", "float32", (4,))


def test_calls_on_one_stream_need_no_events_and_another_stream_waits():
    runtime = FakeRuntime()
    channel = _channel(runtime)
    assert [channel.begin(_CALL, 1.0) for _ in range(3)] == [1, 2, 3]
    assert runtime.waits == []
    runtime.stream = 2
    channel.begin(_CALL, 1.0)
    channel.begin(_CALL, 1.0)
    assert runtime.waits == [(2, 1)]
    runtime.stream = 1
    channel.begin(_CALL, 1.0)
    assert runtime.waits == [(2, 1), (1, 2)]


def test_whom_kernels_leave_out_is_changed_in_the_order_of_calls_and_in_no_capture():
    runtime = FakeRuntime()
    channel = _channel(runtime)
    channel.begin(_CALL, 1.0)
    runtime.stream = 2
    channel.leave_out(0b10)
    assert runtime.waits == [(2, 1)]
    assert channel._page[Word.LEFT_OUT] == 0b10
    runtime.captures = {2: 9}
    with pytest.raises(CapabilityError, match=r"ranks are left out from now on, \.\.\. call prepare"):
        channel.leave_out(0)


def test_streams_of_one_capture_wait_and_two_captures_at_once_are_refused():
    runtime = FakeRuntime()
    channel = _channel(runtime)
    runtime.captures = {5: 70, 6: 70, 7: 71}
    runtime.stream = 5
    channel.begin(_CALL, 1.0)
    runtime.stream = 6
    channel.begin(_CALL, 1.0)
    assert runtime.waits == [(6, 5)]
    runtime.stream = 7
    with pytest.raises(CapabilityError, match="'graphs' is used by two graphs that are captured at the same"):
        channel.begin(_CALL, 1.0)
    assert channel.calls == 2
    runtime.captures = {7: 71}
    channel.begin(_CALL, 1.0)
    assert runtime.waits == [(6, 5)]


def test_eager_calls_wait_for_the_last_eager_one_whatever_was_captured_between():
    runtime = FakeRuntime()
    order = StreamOrder(runtime, "graphs")
    for captured, stream in [(0, 1), (80, 5), (0, 1), (81, 5), (0, 2), (0, 1)]:
        runtime.captures = {5: captured}
        runtime.stream = stream
        order.enter()
    assert runtime.waits == [(2, 1), (1, 2)]


def test_a_call_cannot_wait_for_a_stream_that_is_captured_by_now():
    runtime = FakeRuntime()
    order = StreamOrder(runtime, "graphs")
    order.enter()
    runtime.captures, runtime.stream = {1: 80}, 2
    for _ in range(2):
        with pytest.raises(CapabilityError, match=r"on a stream that is captured now.*graph_capture\(\)"):
            order.enter()
    runtime.captures = {}
    order.enter()
    assert runtime.waits == [(2, 1)]


def test_what_a_capture_cannot_do_is_refused_with_the_way_out():
    runtime = FakeRuntime()
    runtime.captures = {1: 9}
    channel = _channel(runtime)
    for refused in (channel.synchronize, lambda: _compile(runtime), lambda: _grow(runtime)):
        with pytest.raises(CapabilityError, match=r"prepare\(max_nbytes, dtypes\)"):
            refused()


def _compile(runtime):
    class Arena:
        device = torch.device("cpu")
        launch_parts = (device_arena_module.LaunchPart(0),)
        rank = 0

    Arena.runtime = runtime

    class Kernel:
        __name__ = "new_kernel"
        arg_names = ()

    bound.compile_and_load(Kernel(), Arena(), (), {})


def _grow(runtime):
    arena = device_arena_module.DeviceArena.__new__(device_arena_module.DeviceArena)
    arena._is_closed, arena.runtime = False, runtime
    arena.grow(1 << 20, 1.0)


# The record ------------------------------------------------------------------------------------------


def _put_down(channel, kind, peer, expected=(3 << 32 | 7), seen=(3 << 32 | 8)):
    channel._record[HostWord.EXPECTED] = expected
    channel._record[HostWord.SEEN] = seen
    channel._record[HostWord.ERROR] = kind | peer << 8


def test_a_mismatch_of_a_gpu_is_raised_behind_the_call_and_never_in_front_of_it():
    channel = _channel()
    channel._waits_for_kernels = False
    for _ in range(4):
        channel.begin(_CALL, 1.0)
    _put_down(channel, ErrorKind.MISMATCH, 1)
    channel._page[Word.ERROR_KIND] = ErrorKind.MISMATCH
    epoch = channel.begin(_CALL, 1.0)
    channel.after_kernel(epoch)
    with pytest.raises(CollectiveMismatchError) as caught:
        channel.raise_recorded()
    assert "what was called from #3 to now has no result that can be relied on" in str(caught.value)
    assert (caught.value.seq, caught.value.peers) == (3, (1,))
    assert int(channel._page[Word.ERROR_KIND]) == 0
    channel.raise_recorded()
    assert channel.begin(_CALL, 1.0) == 6


def test_the_word_on_the_device_is_cleared_outside_of_captures_only():
    runtime = FakeRuntime()
    channel = _channel(runtime)
    channel.begin(_CALL, 1.0)
    channel._page[Word.ERROR_KIND] = ErrorKind.MISMATCH
    _put_down(channel, ErrorKind.MISMATCH, 1)
    runtime.captures = {1: 9}
    with pytest.raises(CollectiveMismatchError):
        channel.raise_recorded()
    assert int(channel._page[Word.ERROR_KIND]) == ErrorKind.MISMATCH
    runtime.captures = {}
    channel.begin(_CALL, 1.0)
    assert int(channel._page[Word.ERROR_KIND]) == ErrorKind.NONE


def test_a_timeout_is_raised_before_the_next_launch_and_stops_all_waits():
    channel = _channel()
    channel._waits_for_kernels = False
    channel.begin(_CALL, 2.0)
    _put_down(channel, ErrorKind.TIMEOUT, 1)
    for _ in range(2):
        with pytest.raises(PeerTimeoutError, match=r"all_reduce #3 .* after 2 s on rank 0: rank 1 is silent"):
            channel.begin(_CALL, 1.0)
    assert channel._record[HostWord.ABORT] == 1
    assert channel.calls == 1
    channel.close("the test is over")
    with pytest.raises(GroupClosedError):
        channel.begin(_CALL, 1.0)


def test_who_is_left_out_stops_its_own_waits_until_all_start_again():
    channel = _channel()
    channel._waits_for_kernels = False
    pages = [ControlPage(torch.zeros(CONTROL_BYTES, dtype=torch.uint8)) for _ in range(2)]
    host = channel._host = Channel("graphs", 0, pages, [None, None], 1)
    channel.begin(_CALL, 2.0)
    pages[1].words[Word.LEFT_OUT] = 1
    _put_down(channel, ErrorKind.TIMEOUT, 1)
    channel._page[Word.ERROR_KIND] = ErrorKind.TIMEOUT
    for _ in range(2):
        with pytest.raises(PeerTimeoutError, match="have gone on without this rank, 0, since call #1") as one:
            channel.begin(_CALL, 1.0)
    assert (one.value.op, one.value.peers) == ("all_reduce", (0,))
    assert (host.words[Word.MASKED], pages[1].words[Word.POISON_CODE]) == (2, 0)
    assert channel._record[HostWord.ABORT] == 1
    pages[1].words[Word.LEFT_OUT] = 0
    channel.start_again()
    assert not channel.record.any()
    assert int(channel._page[Word.ERROR_KIND]) == ErrorKind.NONE
    assert channel.begin(_CALL, 1.0) == 2
    # What was given up is over for good.
    host.give_up(PoisonCode.PEER_LOST, 1, 7)
    pages[1].words[Word.LEFT_OUT] = 1
    _put_down(channel, ErrorKind.TIMEOUT, 1)
    with pytest.raises(PeerLostError, match="was given up at call #7"):
        channel.begin(_CALL, 1.0)
    channel.start_again()
    with pytest.raises(PeerLostError, match="was given up at call #7"):
        channel.begin(_CALL, 1.0)


def test_synchronize_waits_for_the_device_and_then_reads_the_record():
    channel = _channel(settle=lambda: _put_down(channel, ErrorKind.TIMEOUT, 1))
    channel.raise_recorded()
    with pytest.raises(PeerTimeoutError):
        channel.synchronize()


def _interpreted_wait_of_one(member):
    """One rank's kernel waits for nobody; the clock of a wait begins with it."""
    use_tiles(64)
    with on_device(member) as arena:
        for _ in range(3):
            assert _reduce(arena, timeout=0.01)[0] == 1


def test_a_world_of_one_waits_for_nobody(on_ranks):
    on_ranks(1, _interpreted_wait_of_one)
