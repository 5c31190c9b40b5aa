"""How experts are balanced between ranks."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Literal, get_args

from tcomm.errors import ConfigError

__all__ = ["EPLBCommunicator", "EPLBConfig", "as_eplb_config"]

EPLBCommunicator = Literal["torch_nccl", "torch_gloo", "torch_xccl", "nixl", "pynccl"]
"""What moves the weights of experts."""


@dataclass(kw_only=True)
class EPLBConfig:
    """Settings of expert load balancing.

    Raises:
        ConfigError: when they make no sense, alone or together.
    """

    window_size: int = 1000
    """Steps over which the load of experts is recorded."""
    step_interval: int = 3000
    """Steps from one rearrangement to the next."""
    num_redundant_experts: int = 0
    """Copies of experts beyond the first, over all ranks."""
    log_balancedness: bool = False
    """Log how even the load was."""
    log_balancedness_interval: int = 1
    """Steps from one such line to the next."""
    use_async: bool = False
    """Rearrange beside the forward pass, in a thread."""
    policy: str = "default"
    """What decides where experts go."""
    communicator: EPLBCommunicator | None = None
    """What moves the weights; None: what suits them."""
    enable_migration_batching: bool = False
    """Move the weights of many experts together."""

    def __post_init__(self) -> None:
        for name in ("window_size", "step_interval", "log_balancedness_interval"):
            value = getattr(self, name)
            if type(value) is not int or value <= 0:
                raise ConfigError(f"{name} must be greater than 0. Given: {value!r}")
        redundant = self.num_redundant_experts
        if type(redundant) is not int or redundant < 0:
            raise ConfigError(f"num_redundant_experts={redundant!r} is wrong; give an integer of 0 or more")
        for name in ("log_balancedness", "use_async", "enable_migration_batching"):
            if type(getattr(self, name)) is not bool:
                raise ConfigError(f"{name}={getattr(self, name)!r} is wrong; give True or False")
        if not isinstance(self.policy, str):
            raise ConfigError(f"policy={self.policy!r} is wrong; give a string")
        if self.communicator not in (None, *get_args(EPLBCommunicator)):
            known = ", ".join(get_args(EPLBCommunicator))
            raise ConfigError(f"communicator={self.communicator!r} is none of {known}")
        if self.use_async and self.policy != "default":
            raise ConfigError(
                f"Async EPLB is only supported with the default policy. Given: policy={self.policy!r}"
            )
        if self.use_async and self.communicator in {"torch_nccl", "pynccl"}:
            raise ConfigError(
                f"Async EPLB cannot move weights by {self.communicator}, whose kernels wait for those of the "
                "forward pass; give another communicator, or None"
            )

    @property
    def migration_batching_enabled(self) -> bool:
        """Whether the weights of many experts move together."""
        return self.enable_migration_batching


def as_eplb_config(given: object) -> EPLBConfig:
    """What was given as an `EPLBConfig`: itself, or made of a dict of its fields; the default for None.

    Raises:
        ConfigError: when it is something else, or a dict with a key that is no field.
    """
    if given is None:
        return EPLBConfig()
    if isinstance(given, EPLBConfig):
        return given
    if not isinstance(given, dict):
        raise ConfigError(f"eplb_config={given!r} is wrong; give an EPLBConfig, or a dict of its fields")
    known = [field.name for field in fields(EPLBConfig)]
    if unknown := [key for key in given if key not in known]:
        raise ConfigError(f"eplb_config has no {unknown[0]!r}; its fields are {', '.join(known)}")
    return EPLBConfig(**given)
