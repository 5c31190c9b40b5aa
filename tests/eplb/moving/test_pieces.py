import asyncio

import numpy as np
import pytest
import torch
import torch.distributed as dist

from tcomm.eplb.moving.pieces import (
    get_ep_ranks_with_experts_batch,
    move_from_buffer,
    move_to_buffer,
    transfer_layer,
    transfer_metadata,
)
from tcomm.errors import ConfigError
from tests.eplb.moving.weights import Layers, random_maps
from tests.groups.all2all.worlds import told

OLD, NEW = [0, 1, 2, 3, -1, 5], [3, 3, 0, 3, 1, 9]


def test_what_becomes_of_each_slot():
    first = transfer_metadata(3, OLD, NEW, 0)
    assert first.is_unchanged.tolist() == [False] * 3
    assert first.is_received_locally.tolist() == [False, False, True]
    assert first.recv_primary_mask.tolist() == [True, False, False]
    assert (first.recv_count, first.recv_expert_ids.tolist()) == (1, [3, -1, -1])
    assert first.recv_dst_rows.tolist() == [0, -1, -1]
    assert (first.recv_expert_ids.dtype, first.recv_dst_rows.dtype) == (np.int64, np.int32)
    second = transfer_metadata(3, np.array(OLD), np.array(NEW), 1)
    assert second.is_unchanged.tolist() == second.is_received_locally.tolist() == [True, False, False]
    assert (second.recv_count, second.recv_dst_rows.tolist()) == (1, [1, -1, -1])
    for rank in (2, -1):
        with pytest.raises(ConfigError, match=f"ep_rank={rank} is none of 2 ranks"):
            transfer_metadata(3, OLD, NEW, rank)


def test_who_has_experts_and_who_needs_them():
    have, need = get_ep_ranks_with_experts_batch([0, 1, 3, 9], 3, OLD, NEW)
    assert have == {0: [0], 1: [0], 3: [1], 9: []}
    assert need == {0: [], 1: [1], 3: [0], 9: [1]}
    with pytest.raises(ConfigError, match="for ranks of 4 slots"):
        get_ep_ranks_with_experts_batch([0], 4, OLD, NEW)


def _by_pieces(member):
    member.process_group()
    generator, size, wrong, kept, group = np.random.default_rng(3), 4, [], [], dist.group.WORLD
    for case in range(3):
        old, new = random_maps(generator, 2, 2, size)
        layers = Layers.filled(old, member.rank, size)
        buffers = [torch.empty_like(weight) for weight in layers.weights[1]]
        if case == 0:
            found = move_to_buffer(size, old[1], new[1], iter(layers.weights[1]), buffers, None, group)
        else:
            transfer = transfer_layer(torch.from_numpy(old), new, layers.weights, buffers, group, layer=1)
            found = asyncio.run(transfer)
        kept += layers.wrong(1, old[1], old[1])
        with torch.inference_mode(case == 1):
            move_from_buffer(iter(layers.weights[1]), buffers, *found, new[1], member.rank)
        wrong += layers.wrong(1, old[1], new[1])
        expected = transfer_metadata(size, old[1], new[1], member.rank)
        assert found[0].tolist() == expected.is_unchanged.tolist()
        assert found[2].recv_expert_ids.tolist() == expected.recv_expert_ids.tolist()
    for buffer in buffers:
        buffer.view(torch.uint8).fill_(1) if buffer.numel() else None
    layers = Layers.filled(old, member.rank, size)
    profile = transfer_layer(old, new, layers.weights, buffers, group, True, 0)
    stays = asyncio.run(profile)[0].all()
    touched = not any(buffer.view(torch.uint8).any() for buffer in buffers if buffer.numel())
    moved = asyncio.run(
        transfer_layer([[7, 8]], [[8, 7, 7, 8]], [[torch.full((2,), 5.0)]], [torch.zeros(2)], group,
                       rank_mapping={0: 0})
    )  # fmt: skip
    weights = layers.weights
    refused = [
        told(move_to_buffer, 3, old[0][:6], new[0][:6], weights[0], buffers, None, group)[1],
        told(move_to_buffer, size, old[0], new[0], weights[0], buffers[:-1], None, group)[1],
        told(transfer_layer, old, new, weights, buffers, group, layer=2)[1],
    ]
    return wrong, kept, bool(stays), touched, moved[2].recv_count, refused


def test_layers_move_in_pieces(on_ranks):
    for rank, (wrong, kept, stays, touched, count, refused) in enumerate(on_ranks(2, _by_pieces)):
        assert wrong == kept == []
        assert (stays, touched, count) == (True, True, 2 * rank)
        assert "weights of 4 slots for ranks of 3" in refused[0]
        assert "and those of the first layer" in refused[1]
        assert "layer 2 of maps [2, 8] and [2, 8] with weights of 2 layers" in refused[2]
