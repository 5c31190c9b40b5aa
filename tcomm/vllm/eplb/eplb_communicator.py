"""`vllm.distributed.eplb.eplb_communicator`."""

from tcomm.eplb.moving.communicator import EplbCommunicator
from tcomm.eplb.moving.creation import create_eplb_communicator

__all__ = ["EplbCommunicator", "create_eplb_communicator"]
