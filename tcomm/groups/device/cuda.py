"""The device communicator of GPUs."""

from __future__ import annotations

from tcomm.groups.device.base import DeviceCommunicatorBase

__all__ = ["CudaCommunicator"]


class CudaCommunicator(DeviceCommunicatorBase):
    """Collectives on this rank's GPU, given as `device`. **Collective** to create.

    Calls are ordered by the current stream and do not wait for the GPU. What tcomm's kernels do not do, or
    all of it with `use_kernels=False`, goes to NCCL where `device_group` is one of NCCL. No GPU is touched
    before the first call.
    """

    device_types = ("cuda",)
