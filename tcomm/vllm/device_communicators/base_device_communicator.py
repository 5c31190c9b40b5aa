"""`vllm.distributed.device_communicators.base_device_communicator`."""

from tcomm.groups.device import DeviceCommunicatorBase

__all__ = [
    "DeviceCommunicatorBase",
]
