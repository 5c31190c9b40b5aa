"""Groups in which managers are tried: DP replicas of TP ranks, one EP group over all of them."""

import contextlib

import torch.distributed as dist

from tcomm.groups.parallel import environment, parallel_state
from tcomm.groups.parallel.current_config import use_parallel_config
from tcomm.groups.parallel.parallel_config import ParallelConfig
from tcomm.groups.parallel.state import ParallelState, use


@contextlib.contextmanager
def replicas(member, dp, tp=1, pcp=1, backend="allgather_reducescatter", experts=True):
    """A state with such groups; `member` is a rank of all of them."""
    member.process_group()
    config = ParallelConfig(
        data_parallel_size=dp,
        data_parallel_rank=member.rank // (tp * pcp),
        tensor_parallel_size=tp,
        prefill_context_parallel_size=pcp,
        data_parallel_master_port=29_777,
        is_moe_model=True,
        enable_expert_parallel=experts,
        all2all_backend=backend,
        distributed_executor_backend="mp",
    )
    with use(ParallelState(timeout=20)) as state, use_parallel_config(config):
        environment.init_distributed_environment(backend="gloo", local_rank=member.rank)
        try:
            parallel_state.initialize_model_parallel(tp, 1, pcp)
            yield state
        finally:
            state.destroy()
            dist.destroy_process_group()


def told(call, *args, **kwargs):
    """Kinds and text of what a call raises."""
    try:
        call(*args, **kwargs)
    except Exception as error:
        return [kind.__name__ for kind in type(error).__mro__], str(error)
    return [], ""
