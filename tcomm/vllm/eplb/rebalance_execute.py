"""`vllm.distributed.eplb.rebalance_execute`. Its functions are not there yet."""
