"""`vllm.distributed.eplb.rebalance_execute`."""

from tcomm.eplb.moving.batches import (
    MigrationFlow,
    schedule_migration_batches,
    schedule_migration_batches_for_layers,
)
from tcomm.eplb.moving.pieces import (
    RecvMetadata,
    TransferMetadata,
    get_ep_ranks_with_experts_batch,
    move_from_buffer,
    move_to_buffer,
    transfer_layer,
)
from tcomm.eplb.moving.rearrange import rearrange_expert_weights_inplace

__all__ = [
    "MigrationFlow",
    "RecvMetadata",
    "TransferMetadata",
    "get_ep_ranks_with_experts_batch",
    "move_from_buffer",
    "move_to_buffer",
    "rearrange_expert_weights_inplace",
    "schedule_migration_batches",
    "schedule_migration_batches_for_layers",
    "transfer_layer",
]
