import logging

import pytest
import torch
import torch.distributed as dist

from tcomm.eplb.moving.making import make_mover
from tcomm.eplb.moving.messages import MessageMover
from tcomm.eplb.moving.mover import WeightMover
from tcomm.eplb.moving.rearrange import rearrange_expert_weights_inplace
from tcomm.eplb.moving.symmetric import SymmetricMover
from tcomm.eplb.moving.torch_communicators import TorchGlooCommunicator
from tcomm.errors import ConfigError
from tcomm.groups.stateless.group import StatelessProcessGroup
from tcomm.memory import shm
from tests.eplb.moving.weights import Layers
from tests.groups.all2all.worlds import told


class Lines(logging.Handler):
    def __init__(self):
        super().__init__(logging.INFO)
        self.lines = []
        logging.getLogger("tcomm").addHandler(self)
        logging.getLogger("tcomm").setLevel(logging.INFO)

    def emit(self, record):
        if "moves experts" in record.getMessage():
            self.lines.append(record.getMessage())


def _made(member):
    member.process_group()
    log, kinds, wrong = Lines(), [], []
    old, new = [[0, 1, 2, 3]], [[2, 2, 0, 3]]
    stateless = StatelessProcessGroup(member.rank, 2, dist.PrefixStore("stateless", member.store), None)
    refused = []
    for case in ("shared", "given", "apart"):
        layers = Layers.filled(old, member.rank, 2)
        if case == "apart":
            shm.why_unordered = lambda: "made up"
            refused = [told(make_mover, stateless, layers.weights[0], timeout=20)[1]]
        given = TorchGlooCommunicator(dist.group.WORLD, 20.0) if case == "given" else None
        mover = make_mover(dist.group.WORLD, layers.weights[0], timeout=20, communicator=given)
        assert isinstance(mover, WeightMover)
        kinds.append(type(mover))
        rearrange_expert_weights_inplace(old, new, layers.weights, dist.group.WORLD, mover=mover)
        wrong += layers.wrong(0, old[0], new[0])
        mover.close()
        layers = Layers.filled(old, member.rank, 2)
        rearrange_expert_weights_inplace(
            old, new, layers.weights, dist.group.WORLD, communicator=given, timeout=20
        )
        wrong += layers.wrong(0, old[0], new[0])
    return kinds, wrong, log.lines, refused


def test_the_mover_is_chosen_and_the_log_says_why(on_ranks):
    for kinds, wrong, lines, refused in on_ranks(2, _made):
        assert kinds == [SymmetricMover, MessageMover, MessageMover]
        assert wrong == []
        assert len(lines) == 6
        assert lines[0] == lines[1] == "group 'experts' moves experts through memory that its ranks share"
        assert "by messages of TorchGlooCommunicator: the caller gave a communicator" in lines[2]
        assert "made up" in lines[4]
        assert "nothing moves experts in group 'experts'" in refused[0]
        assert "share no memory" in refused[0]
        assert "StatelessProcessGroup" in refused[0]


def test_weights_are_looked_at_before_anybody_is_met():
    with pytest.raises(ConfigError, match="needed contiguous"):
        make_mover("no group", [torch.zeros(2, 2).t()])
    with pytest.raises(ConfigError, match="no expert parallel group"):
        make_mover("no group", [torch.zeros(2, 2)])
