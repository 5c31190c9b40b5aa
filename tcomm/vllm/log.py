"""The logger that users of the flat namespace find in it."""

from tcomm.groups.helpers.loggers import init_logger

__all__ = ["logger"]

logger = init_logger("tcomm.vllm")
