"""Whether the GPUs of a group have what an algorithm needs."""

from __future__ import annotations

from tcomm.algorithms import FAMILIES, REDUCING, Algorithm
from tcomm.memory.control import MAX_WORLD_SIZE
from tcomm.topology import Topology, sm_of
from tcomm.tuning.decision import Request

__all__ = ["refusal_of_nccl", "refusal_on_gpus"]

_OLDEST = 80


def refusal_on_gpus(algorithm: Algorithm, request: Request, topology: Topology) -> str:
    """Why `algorithm` cannot do it on these GPUs; empty when it can."""
    if algorithm.engine != "triton":
        return f"it works on host memory, and the tensors are on {request.device}"
    return (
        _refusal_of_world(request, topology)
        or _refusal_of_arch(algorithm, topology)
        or _refusal_of_nodes(algorithm, request, topology)
        or _refusal_of_links(algorithm, topology)
        or _refusal_of_order(algorithm, request)
        or algorithm.refusal(request.reduce, request.dtype)
    )


def refusal_of_nccl(topology: Topology) -> str:
    """Why NCCL cannot be used on these GPUs; empty when it can."""
    return f"{topology.shares_device}, which NCCL refuses" if topology.shares_device else ""


def _refusal_of_world(request: Request, topology: Topology) -> str:
    if topology.world_size != request.world_size:
        return f"the topology is that of {topology.world_size} ranks, and {request.world_size} take part"
    if request.world_size > MAX_WORLD_SIZE:
        return f"{request.world_size} ranks; a control page has room for {MAX_WORLD_SIZE}"
    return topology.no_symmetric_memory or topology.no_kernels or topology.no_peer_access


def _refusal_of_nodes(algorithm: Algorithm, request: Request, topology: Topology) -> str:
    if not algorithm.needs.several_nodes:
        apart = topology.num_nodes > 1
        return f"it reaches over one node, and the ranks are on {topology.num_nodes}" if apart else ""
    if topology.num_nodes == 1:
        return "it goes between nodes, and all ranks are on one"
    if not topology.ranks_per_node:
        return "it needs as many ranks on every node, and the nodes differ"
    if not topology.ranks_are_in_order:
        return f"it needs the ranks of a node one after another, and the ranks are on nodes {topology.nodes}"
    if request.op == "all_gatherv":
        return "it gathers equal parts only"
    return ""


def _refusal_of_arch(algorithm: Algorithm, topology: Topology) -> str:
    sm, needed = sm_of(topology.arch), algorithm.needs.min_sm
    # Kernels of loads and stores are compiled for GPUs of other makers too.
    if sm >= needed or (not sm and needed == _OLDEST):
        return ""
    return f"it needs sm_{needed} or later on every rank, and the weakest is {topology.arch}"


def _refusal_of_links(algorithm: Algorithm, topology: Topology) -> str:
    needs = algorithm.needs
    if needs.multicast and topology.no_multicast:
        return f"no multicast: {topology.no_multicast}"
    if needs.multicast and topology.shares_device:
        return f"no multicast: {topology.shares_device}"
    if needs.nvshmem and topology.no_nvshmem:
        return f"no NVSHMEM: {topology.no_nvshmem}"
    return ""


def _refusal_of_order(algorithm: Algorithm, request: Request) -> str:
    if request.deterministic and not algorithm.fixed_order and FAMILIES[request.op] in REDUCING:
        return "the switch adds in an order of its own, and deterministic results were asked for"
    return ""
