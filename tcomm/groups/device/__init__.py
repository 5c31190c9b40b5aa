"""Device communicators: what groups of vllm.distributed call, over a `Communicator`."""

from tcomm.groups.device.base import DeviceCommunicatorBase
from tcomm.groups.device.cpu import CpuCommunicator
from tcomm.groups.device.cuda import CudaCommunicator

__all__ = ["CpuCommunicator", "CudaCommunicator", "DeviceCommunicatorBase"]
