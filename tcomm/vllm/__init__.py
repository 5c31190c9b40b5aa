"""The names of `vllm.distributed`, module for module. Definitions stand elsewhere."""
