"""Groups that torch.distributed does not know of, made from an address and a store."""
