"""Dividing things among ranks."""

from __future__ import annotations

from tcomm.config import EngineConfig
from tcomm.errors import ConfigError, UsageError

__all__ = ["divide", "ensure_divisibility", "get_pp_indices", "verify_group_size_divides_partition"]


def ensure_divisibility(numerator: int, denominator: int) -> None:
    """Check that a division leaves nothing over.

    Raises:
        UsageError: when it does.
        ZeroDivisionError: when the denominator is 0.
    """
    if numerator % denominator:
        raise UsageError(f"{numerator} is not divisible by {denominator}")


def divide(numerator: int, denominator: int) -> int:
    """The quotient of a division that leaves nothing over.

    Raises:
        UsageError: when it does.
        ZeroDivisionError: when the denominator is 0.
    """
    ensure_divisibility(numerator, denominator)
    return numerator // denominator


def get_pp_indices(num_hidden_layers: int, pp_rank: int, pp_size: int) -> tuple[int, int]:
    """The layers of a pipeline stage, as a half-open range.

    `TCOMM_PP_LAYER_PARTITION` gives the number of layers of each stage. Without it they are even; what is
    left over goes to the stages before the last, one each, from the back: the last has the output layers
    besides, and the first, which has the embedding, gets one only where all but the last do.

    Args:
        num_hidden_layers: of the model; fewer than stages leave stages empty.
        pp_rank: the stage.
        pp_size: number of stages.

    Raises:
        ConfigError: when there is no such stage, or the variable does not fit the stages and the layers.
    """
    if pp_size < 1 or not 0 <= pp_rank < pp_size or num_hidden_layers < 0:
        raise ConfigError(
            f"stage {pp_rank} of {pp_size} with {num_hidden_layers} layers: stages are 0 to pp_size - 1, and "
            f"there are no fewer than 0 layers"
        )
    sizes = _given_partition(num_hidden_layers, pp_size) or _even_partition(num_hidden_layers, pp_size)
    start = sum(sizes[:pp_rank])
    return start, start + sizes[pp_rank]


def _even_partition(layers: int, stages: int) -> list[int]:
    base, over = divmod(layers, stages)
    return [base + (stages - 1 - over <= stage < stages - 1) for stage in range(stages)]


def _given_partition(layers: int, stages: int) -> list[int]:
    text = EngineConfig.from_environment().pp_layer_partition
    if not text:
        return []
    try:
        sizes = [int(part) for part in text.split(",")]
    except ValueError:
        raise ConfigError(f"Invalid partition string: {text}; give integers, such as 5,5,6,4") from None
    if any(size < 0 for size in sizes):
        raise ConfigError(f"Invalid partition string: {text}; no stage has fewer than 0 layers")
    if len(sizes) != stages:
        raise ConfigError(f"len(partitions)={len(sizes)} does not match pp_size={stages}")
    if sum(sizes) != layers:
        raise ConfigError(f"sum(partitions)={sum(sizes)} does not match num_hidden_layers={layers}")
    return sizes


def verify_group_size_divides_partition(
    input_size_per_partition: int,
    group_size: int,
    layer_name: str | None = None,
    extra_suggestion: str = "",
) -> None:
    """Check that the input of one rank's part of a layer is whole quantisation groups.

    Args:
        input_size_per_partition: input features of the part.
        group_size: features of a group; -1 is one group for all.
        layer_name: for the message.
        extra_suggestion: a last sentence for the message.

    Raises:
        ConfigError: when it is not.
    """
    if group_size == 0 or input_size_per_partition % group_size:
        layer = f"layer {layer_name}" if layer_name else "a layer"
        told = (
            f"the input of one rank's part of {layer}, {input_size_per_partition}, is not divisible by a "
            f"group size of {group_size}; use another tensor parallel size or another group size"
        )
        raise ConfigError(f"{told}. {extra_suggestion}" if extra_suggestion else told)
