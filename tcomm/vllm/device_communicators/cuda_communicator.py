"""`vllm.distributed.device_communicators.cuda_communicator`."""

from tcomm.groups.device import (
    CudaCommunicator,
    DeviceCommunicatorBase,
)

__all__ = [
    "CudaCommunicator",
    "DeviceCommunicatorBase",
]
