import logging
import signal

import numpy as np
import pytest
import torch
import torch.distributed as dist

from tcomm.eplb.moving.rearrange import rearrange_expert_weights_inplace
from tcomm.errors import CollectiveMismatchError, ConfigError, UsageError
from tcomm.groups.parallel.coordinator import GroupCoordinator
from tcomm.groups.stateless.group import StatelessProcessGroup
from tests.eplb.moving.weights import EXAMPLE, Layers, random_maps
from tests.groups.all2all.worlds import told


class Log:
    """A mover that moves nothing and tells what it was asked for."""

    def __init__(self):
        self.asked = []

    def prepare(self, layer, moves, weights):
        self.asked.append(("prepare", layer))

    def commit(self, layer, moves, weights):
        self.asked.append(("commit", layer))

    def reserve(self, weights):
        self.asked.append(("reserve", len(weights)))

    def close(self):
        self.asked.append(("close",))


@pytest.fixture
def alone():
    """A group of one rank."""
    return StatelessProcessGroup(0, 1, dist.HashStore(), None)


def _weights(layers=1, size=2):
    return [[torch.arange(size * 3, dtype=torch.float32).view(size, 3)] for _ in range(layers)]


def test_layers_go_one_after_the_other_and_those_that_stay_ask_for_nothing(alone):
    mover, told_of = Log(), []
    old, new = [[0, 1], [0, 1], [0, 1]], [[1, 0], [0, 1], [1, 1]]
    rearrange_expert_weights_inplace(old, new, _weights(3), alone, mover=mover, on_layer=told_of.append)
    assert mover.asked == [("prepare", 0), ("commit", 0), ("prepare", 2), ("commit", 2)]
    assert told_of == [0, 1, 2]
    mover.asked.clear()
    rearrange_expert_weights_inplace(old, new, _weights(3), alone, True, mover=mover, on_layer=told_of.append)
    rearrange_expert_weights_inplace(old, old, _weights(3), alone, mover=mover, on_layer=told_of.append)
    assert mover.asked == [("reserve", 1)]
    assert told_of == [0, 1, 2, 0, 1, 2]


def test_an_expert_that_nobody_has_is_told_once_and_its_slot_stays(alone, caplog):
    weights = _weights()
    with caplog.at_level(logging.WARNING, "tcomm"):
        rearrange_expert_weights_inplace([[0, 1]], [[7, 0]], weights, alone)
    assert weights[0][0].tolist() == [[0, 1, 2]] * 2
    assert [r.message for r in caplog.records if "no rank has" in r.message] == [
        "no rank has these experts, whose slots keep what they have: layer 0: [7]"
    ]


def test_ctrl_c_comes_when_a_layer_is_new_and_has_been_told_of(alone):
    weights, heard = _weights(2), []

    def hear(layer):
        signal.raise_signal(signal.SIGINT)
        heard.append(layer)

    with pytest.raises(KeyboardInterrupt):
        rearrange_expert_weights_inplace([[0, 1]] * 2, [[1, 0]] * 2, weights, alone, on_layer=hear)
    assert heard == [0]
    assert [weight[0].tolist()[0][0] for weight in weights] == [3, 0]


@pytest.mark.parametrize(
    ("old", "new", "weights", "kind", "text"),
    [
        ([[0, 1]], [[0, 1, 2]], _weights(), UsageError, "[1, 2] and the new ones [1, 3]"),
        ([[0, 1]], [[1, 0]], _weights(2), UsageError, "weights of 2 layers and maps of 1"),
        ([[0, 1]], [[1, 0]], _weights(1, 3), UsageError, "maps of 2 slots for 1 ranks with 3 slots"),
        ([0, 1], [[1, 0]], _weights(), ConfigError, "the old expert indices are int64[2]; needed"),
        ([[0, 1]], [[1.0, 0]], _weights(), ConfigError, "the new expert indices are float64[1, 2]"),
        ([[0, 1]], [[1, -2]], _weights(), ConfigError, "the new expert indices contain -2"),
        ([[0, 1], [0]], [[1, 0]], _weights(), ConfigError, "the old expert indices are no map"),
        (np.array([[0, 2**64 - 9]], np.uint64), [[1, 0]], _weights(), ConfigError, "indices contain -9"),
        ([[0, 1]] * 2, [[1, 0]] * 2, _weights() * 2, ConfigError, "layers 0 and 1 share memory"),
        ([[0, 1]], [[1, 0]], [[]], ConfigError, "give a list of tensors, at least one"),
        ([[0, 1]], [[1, 0]], [[torch.zeros(3, 2).t()]], ConfigError, "needed contiguous [slots"),
        (
            [[0, 1]] * 2, [[1, 0]] * 2, [*_weights(), [torch.zeros(2, 3).double()]], ConfigError,
            "weights of layer 1 are float64[3] in 2 slots on cpu, and those of layer 0 float32[3]",
        ),
    ],
)  # fmt: skip
def test_wrong_arguments_are_refused_before_anybody_waits(alone, old, new, weights, kind, text):
    mover = Log()
    with pytest.raises(kind) as caught:
        rearrange_expert_weights_inplace(old, new, weights, alone, mover=mover)
    assert text in str(caught.value)
    assert mover.asked == []
    with pytest.raises(ConfigError, match="no expert parallel group"):
        rearrange_expert_weights_inplace([[0]], [[0]], _weights(), "ep", mover=mover)


def _groups(member):
    """By each kind of group; weights made in inference mode; a mapping; and maps that differ."""
    member.process_group()
    generator = np.random.default_rng(7)
    wrong = []
    stateless = StatelessProcessGroup(member.rank, 2, dist.PrefixStore("stateless", member.store), None)
    coordinator = GroupCoordinator.from_process_group(dist.group.WORLD, group_name="ep", timeout=20)
    for group in (dist.group.WORLD, stateless, coordinator):
        old, new = random_maps(generator, 2, 2, 3)
        with torch.inference_mode(group is stateless):
            layers = Layers.filled(old, member.rank, 3)
        rearrange_expert_weights_inplace(
            torch.tensor(old), torch.tensor(new, dtype=torch.int32), layers.weights, group, timeout=20
        )
        wrong += [layers.wrong(layer, old[layer], new[layer]) for layer in range(2)]
    # Rank 1 leaves; then it comes back as rank 0, and what was rank 0 is rank 1.
    start = np.array([[0, 1, 2, 3]])
    layers = Layers.filled(start, member.rank, 2)
    rearrange_expert_weights_inplace(start, [[3, 0]], layers.weights, coordinator, False, {0: 0, 1: -1})
    wrong.append(layers.wrong(0, start[0], np.array([3, 0, -1, -1])))
    layers = Layers.filled([[-1, -1, 5, 6]], member.rank, 2)
    rearrange_expert_weights_inplace([[5, 6]], [[6, 5, 6, 5]], layers.weights, coordinator, False, {0: 1})
    wrong.append(layers.wrong(0, np.array([-1, -1, 5, 6]), np.array([6, 5, 6, 5])))
    # Rank 1 wants other experts in layer 1.
    layers = Layers.filled(np.repeat(start, 2, 0), member.rank, 2)
    after = np.array([[1, 0, 3, 2], [2, 3, 1, 0] if member.rank else [2, 3, 0, 1]])
    mismatch = told(
        rearrange_expert_weights_inplace, np.repeat(start, 2, 0), after, layers.weights, coordinator
    )
    wrong += [layers.wrong(0, start[0], after[0]), layers.wrong(1, start[0], start[0])]
    example = [[torch.tensor(EXAMPLE["old"][member.rank * 3 :][:3], dtype=torch.int8)]]
    rearrange_expert_weights_inplace([EXAMPLE["old"]], [EXAMPLE["new"]], example, dist.group.WORLD)
    coordinator.destroy()
    return wrong, mismatch, example[0][0].tolist()


def test_groups_of_every_kind_move_and_different_maps_are_told(on_ranks):
    results = on_ranks(2, _groups)
    assert [result[2] for result in results] == [EXAMPLE["after"][:3], EXAMPLE["after"][3:]]
    for wrong, (kinds, text), _ in results:
        assert wrong == [[]] * len(wrong)
        assert CollectiveMismatchError.__name__ in kinds
        assert "take_experts" in text
        assert text.endswith("layers 0 to 0 have their new experts, and 1 to 1 keep the old ones")
