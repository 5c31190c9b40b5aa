"""`vllm.distributed.device_communicators.shm_broadcast`: objects from one writer to many readers."""

from tcomm.groups.queue.handle import Handle
from tcomm.groups.queue.message_queue import MessageQueue
from tcomm.groups.queue.ring import ShmRingBuffer

__all__ = ["Handle", "MessageQueue", "ShmRingBuffer"]
