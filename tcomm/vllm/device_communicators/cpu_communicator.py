"""`vllm.distributed.device_communicators.cpu_communicator`."""

from tcomm.groups.device import (
    CpuCommunicator,
    DeviceCommunicatorBase,
)

__all__ = [
    "CpuCommunicator",
    "DeviceCommunicatorBase",
]
