"""`vllm.distributed.eplb.rebalance_algo`. Its functions are not there yet."""
