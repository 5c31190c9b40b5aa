"""The names of `deep_ep`, so that code written for it runs by changing the import."""

from tcomm.groups.moe.buffer import Buffer
from tcomm.groups.moe.buffer_config import Config
from tcomm.groups.moe.overlap import EventOverlap

__all__ = ["Buffer", "Config", "EventOverlap"]
