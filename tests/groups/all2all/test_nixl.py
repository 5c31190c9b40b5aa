import pytest
import torch
import torch.distributed as dist

from tcomm.groups.all2all.nixl import NixlEPAll2AllManager
from tcomm.groups.stateless.group import StatelessProcessGroup
from tests.groups.all2all.worlds import told
from tests.groups.moe.test_elastic import EACH, H, M, _step


def _kwargs(ranks):
    return {
        "max_num_tokens_per_dp_rank": M,
        "token_hidden_size": H,
        "num_global_experts": EACH * ranks,
        "num_ep_ranks": ranks,
    }


def _group(member, ranks, generation):
    """The ranks of a group that grows or shrinks, as an engine makes it anew."""
    store = dist.PrefixStore(f"group/{generation}", member.store)
    return StatelessProcessGroup(member.rank, ranks, store, None, store_timeout=20)


def _scale(member):
    rank, found = member.rank, []
    stores = StatelessProcessGroup(rank, 3, dist.PrefixStore("all", member.store), None)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TCOMM_NIXL_EP_MAX_NUM_RANKS", "4")
        if rank < 2:
            manager = NixlEPAll2AllManager(_group(member, 2, 0), stores)
            refused = [told(manager.query_active_mask), told(manager.get_handle, {"num_ep_ranks": 2})]
            refused.append(told(manager.get_handle, _kwargs(3)))
            buffer = manager.get_handle(_kwargs(2))
            found += [manager.get_handle({}) is buffer, _step(buffer, rank, 2)[0] < 0.1]
            found.append(manager.query_active_mask().tolist() == [0, 0])
            manager.destroy()
            grown = NixlEPAll2AllManager(_group(member, 3, 1), stores)
            grown.stage_ep_size()
            found += [buffer.num_ranks == 2, _step(buffer, rank, 2)[0] < 0.1]
            grown.commit_ep_size()
            found.append(grown.get_handle({}) is buffer)
        else:
            refused = []
            grown = NixlEPAll2AllManager(_group(member, 3, 1), stores)
            buffer = grown.get_handle(_kwargs(3))
        found += [buffer.num_ranks == 3, _step(buffer, rank, 3)[0] < 0.1, grown.max_sms_used() == 0]
        with grown.mask_remote_ranks():
            mask = grown.query_active_mask().tolist()
            found.append(mask == [int(r != rank) for r in range(3)])
        member.meet("before it shrinks")
        if rank < 2:
            shrunk = NixlEPAll2AllManager(_group(member, 2, 2), stores)
            shrunk.stage_ep_size()
            found.append(buffer.num_ranks == 3)
            found.append(shrunk.query_active_mask().tolist() == [0, 0])
            shrunk.commit_ep_size()
            found += [buffer.num_ranks == 2, _step(buffer, rank, 2)[0] < 0.1]
            # And by the handle alone.
        NixlEPAll2AllManager.destroy_buffer()
        NixlEPAll2AllManager.destroy_buffer()
        found.append(NixlEPAll2AllManager._buffer is None)
    return found, refused


def test_one_buffer_serves_groups_that_grow_and_shrink(on_ranks):
    for rank, (found, refused) in enumerate(on_ranks(3, _scale)):
        assert found == [True] * (15 if rank < 2 else 5)
        if rank < 2:
            texts = [text for _, text in refused]
            assert "there is no buffer; call get_handle() first" in texts[0]
            assert (
                "'max_num_tokens_per_dp_rank', 'token_hidden_size', 'num_global_experts'] missing" in texts[1]
            )
            assert "6 experts on 3 ranks, in a group of 2 and at most 4" in texts[2]


def _by_the_handle(member):
    """Without stages; the store of the group itself."""
    stores = dist.PrefixStore("by handle", member.store)
    group = StatelessProcessGroup(member.rank, 2, stores, None)
    if member.rank == 0:
        alone = NixlEPAll2AllManager(StatelessProcessGroup(0, 1, stores, None))
        alone.support_fault_tolerance = True
        buffer = alone.get_handle(_kwargs(1))
        sizes = [buffer.num_ranks]
        both = NixlEPAll2AllManager(group)
        sizes.append(both.get_handle({}).num_ranks)
    else:
        both = NixlEPAll2AllManager(group)
        both.support_fault_tolerance = True
        sizes = [both.get_handle(_kwargs(2)).num_ranks]
    assert (both.query_fault().item(), both.query_fault().dtype) == (False, torch.bool)
    right = _step(both.get_handle({}), member.rank, 2)[0] < 0.1
    masks = both.get_handle({}).masks
    masks.survivors.faults.append((2, (1,)))
    assert masks.on_timeout == "mask"
    assert both.query_fault().item()
    both.clean_buffers()
    assert not both.query_fault()
    member.meet("before it shrinks")
    if member.rank == 0:
        sizes.append(alone.get_handle({}).num_ranks)
    NixlEPAll2AllManager.destroy_buffer()
    return sizes, right


def test_a_handle_connects_and_disconnects(on_ranks):
    assert on_ranks(2, _by_the_handle) == [([1, 2, 1], True), ([2], True)]


def test_what_it_does_not_offer():
    manager = NixlEPAll2AllManager(StatelessProcessGroup(0, 1, None, None))
    for method in ("dispatch", "combine"):
        with pytest.raises(NotImplementedError, match="use get_handle"):
            getattr(manager, method)(torch.ones(1))
    assert manager.support_fault_tolerance is False
    assert manager.destroy() is None
    for method in ("stage_ep_size", "commit_ep_size", "mask_remote_ranks"):
        with pytest.raises(AssertionError, match="there is no buffer"):
            getattr(manager, method)()
