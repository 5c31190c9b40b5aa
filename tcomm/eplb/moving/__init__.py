"""The weights of experts, moved between the ranks of a group from one map to the next."""

from tcomm.eplb.moving.communicator import EplbCommunicator
from tcomm.eplb.moving.making import make_mover
from tcomm.eplb.moving.mover import WeightMover
from tcomm.eplb.moving.rearrange import rearrange_expert_weights_inplace

__all__ = ["EplbCommunicator", "WeightMover", "make_mover", "rearrange_expert_weights_inplace"]
