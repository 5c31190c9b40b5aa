import random

import msgspec
import pytest

from tcomm.errors import ConfigError
from tcomm.presets import PRESETS, named_reports, named_topology
from tcomm.topology import DeviceReport, Topology, kind_of, rank_list, sm_of, vote


def _reports(count, **changes):
    """H100s of one node, with fields of rank r replaced by changes["r<r>"]."""
    reports = named_reports(f"h100x{count}")
    for rank, fields in changes.items():
        reports[int(rank[1:])] = msgspec.structs.replace(reports[int(rank[1:])], **fields)
    return reports


def _reasons(topology):
    names = [f for f in Topology.__struct_fields__ if f.startswith("no_") and f != "nodes"]
    return {name: getattr(topology, name) for name in (*names, "shares_device") if getattr(topology, name)}


def test_a_healthy_node_has_no_reasons():
    topology = vote(_reports(8))
    assert _reasons(topology) == {}
    assert (topology.kind, topology.arch, topology.link, topology.link_gbps, topology.num_sms) == (
        "h100", "sm_90", "nvlink4", 450.0, 132,
    )  # fmt: skip
    assert (topology.world_size, topology.num_nodes, topology.ranks_per_node) == (8, 1, 8)


@pytest.mark.parametrize("field", ["no_multicast", "no_nvshmem", "no_symmetric_memory", "no_kernels"])
@pytest.mark.parametrize("rank", [0, 5, 7])
def test_the_no_of_one_rank_is_the_no_of_all_and_names_it(field, rank):
    topology = vote(_reports(8, **{f"r{rank}": {field: "it is broken"}}))
    assert _reasons(topology) == {field: f"rank {rank}: it is broken"}


def test_equal_reasons_are_told_once_with_all_their_ranks():
    old, off = {"no_nvshmem": "3.3 is too old"}, {"no_nvshmem": "it is not installed"}
    assert vote(_reports(8, r0=old, r1=old, r2=old, r5=old, r3=off)).no_nvshmem == (
        "ranks 0 to 2 and 5: 3.3 is too old; rank 3: it is not installed"
    )


@pytest.mark.parametrize(
    ("ranks", "told"),
    [
        ([3], "rank 3"),
        ([0, 2], "ranks 0 and 2"),
        ([0, 1], "ranks 0 and 1"),
        ([0, 1, 2, 3, 6, 7], "ranks 0 to 3, 6 and 7"),
        (range(8), "ranks 0 to 7"),
    ],
)
def test_ranks_are_listed_briefly(ranks, told):
    assert rank_list(ranks) == told


def test_a_peer_that_cannot_be_written_is_named_whoever_noticed():
    lost = {"unreachable": {3: "it read back zeros"}}
    one_way = vote(_reports(4, r1=lost))
    assert one_way.nodes == (0, 0, 0, 0)
    assert one_way.no_peer_access == "rank 1 cannot write to rank 3: it read back zeros"
    both = vote(_reports(4, r1=lost, r3={"unreachable": {1: "no P2P"}}))
    assert both.no_peer_access == (
        "rank 1 cannot write to rank 3: it read back zeros; rank 3 cannot write to rank 1: no P2P"
    )


def test_ranks_of_one_host_should_reach_one_another():
    topology = vote(_reports(2, r0={"unreachable": {1: "no P2P"}}, r1={"unreachable": {0: "no P2P"}}))
    assert topology.nodes == (0, 1)
    assert topology.no_peer_access.startswith("rank 0 cannot write to rank 1: no P2P; rank 1 cannot")


def test_ranks_of_two_hosts_are_two_nodes_and_that_is_no_fault():
    topology = named_topology("2xh100x4")
    assert topology.nodes == (0, 0, 0, 0, 1, 1, 1, 1)
    assert topology.no_peer_access == ""


def test_reaching_one_another_takes_two_whoever_of_them_fails():
    for rank in (0, 1):
        fields = [{"host": str(r), "unreachable": {1 - r: "refused"} if r == rank else {}} for r in range(2)]
        topology = vote(_reports(2, r0=fields[0], r1=fields[1]))
        assert topology.nodes == (0, 1)
        assert topology.no_peer_access == f"rank {rank} cannot write to rank {1 - rank}: refused"


def test_a_rank_may_fail_to_write_to_its_own_memory():
    topology = vote(_reports(2, r1={"unreachable": {1: "it read back zeros"}}))
    assert topology.no_peer_access == "rank 1 cannot write to its own memory: it read back zeros"


def test_nodes_are_connected_sets_also_where_ranks_alternate():
    apart = {rank: {"host": str(rank % 2), "unreachable": dict.fromkeys(range(1 - rank % 2, 4, 2), "far")}
             for rank in range(4)}  # fmt: skip
    topology = vote(_reports(4, **{f"r{rank}": fields for rank, fields in apart.items()}))
    assert (topology.nodes, topology.ranks_per_node, topology.no_peer_access) == ((0, 1, 0, 1), 2, "")


def test_a_chain_is_one_node_that_is_not_whole():
    hosts = {f"r{r}": {"host": str(r)} for r in range(3)}
    hosts["r0"]["unreachable"], hosts["r2"]["unreachable"] = {2: "too far"}, {0: "too far"}
    topology = vote(_reports(3, **hosts))
    assert topology.nodes == (0, 0, 0)
    assert topology.no_peer_access == (
        "rank 0 cannot write to rank 2: too far; rank 2 cannot write to rank 0: too far"
    )


def test_many_missing_pairs_are_counted():
    none = {f"r{r}": {"unreachable": {p: "no P2P" for p in range(8) if p != r}} for r in range(8)}
    told = vote(_reports(8, **none)).no_peer_access
    assert told.count("cannot write") == 3
    assert told.endswith("; and 53 more")


def test_several_ranks_on_one_device_are_named():
    topology = vote(_reports(4, r1={"uuid": "GPU-0000"}, r3={"uuid": "GPU-0002"}))
    assert topology.shares_device == "ranks 0 and 1 share GPU-0000; ranks 2 and 3 share GPU-0002"
    assert vote(_reports(4, r1={"uuid": ""}, r2={"uuid": ""})).shares_device == ""


def test_the_weakest_of_mixed_ranks_counts():
    topology = named_topology("mixed")
    assert (topology.kind, topology.arch) == ("a100-pcie+h100-pcie", "sm_80")
    assert (topology.link, topology.link_gbps, topology.num_sms) == ("pcie4", 32.0, 108)
    reports = [*named_reports("h100x8")[:7], named_reports("a100x8")[7]]
    topology = vote(reports)
    assert topology.no_multicast == ("rank 7: sm_80 has no multicast instructions, sm_90 and later do")
    assert topology.no_kernels == topology.no_peer_access == ""
    newer = vote([named_reports("h100x8")[0], msgspec.structs.replace(named_reports("b200x8")[1])])
    assert (newer.arch, newer.no_multicast) == ("sm_90", "")


def test_gpus_of_two_makers_run_no_kernels_together():
    told = vote(_reports(4, r2={"arch": "gfx942"}, r3={"arch": "gfx942"})).no_kernels
    assert told == "rank 0 sm_90 and rank 2 gfx942: the ranks of one call need GPUs of one maker"
    assert vote(_reports(2, r1={"arch": ""})).no_kernels == "rank 1: its architecture is unknown"


@pytest.mark.parametrize(
    ("arch", "sm"), [("sm_90", 90), ("sm_90a", 90), ("sm_100", 100), ("sm_103a", 103), ("gfx942", 0), ("", 0)]
)
def test_architectures_have_numbers(arch, sm):
    assert sm_of(arch) == sm


@pytest.mark.parametrize(
    ("name", "link", "kind"),
    [
        ("NVIDIA H100 80GB HBM3", "nvlink4", "h100"),
        ("NVIDIA H100 PCIe", "pcie5", "h100-pcie"),
        ("NVIDIA H200", "nvlink4", "h200"),
        ("NVIDIA A100-SXM4-80GB", "nvlink3", "a100"),
        ("NVIDIA GB200", "nvlink5", "gb200"),
        ("NVIDIA L40S", "pcie4", "l40s-pcie"),
        ("AMD Instinct MI300X", "xgmi3", "mi300x"),
        ("Some New Thing", "", "some-new-thing"),
        ("", "", "unknown"),
    ],
)
def test_gpus_have_short_names(name, link, kind):
    assert kind_of(name, link) == kind


def test_reports_and_topologies_travel():
    for name in PRESETS:
        reports = named_reports(name)
        sent = [msgspec.msgpack.decode(msgspec.msgpack.encode(r), type=DeviceReport) for r in reports]
        assert sent == reports
        assert [msgspec.json.decode(msgspec.json.encode(r), type=DeviceReport) for r in reports] == reports
        topology = vote(sent)
        assert (topology, hash(topology)) == (named_topology(name), hash(named_topology(name)))
        assert topology.digest == named_topology(name).digest
    assert len({named_topology(name).digest for name in PRESETS}) == len(PRESETS)


def test_a_digest_covers_every_field():
    topology = named_topology("h100x8")
    for name in Topology.__struct_fields__:
        value = getattr(topology, name)
        other = (*value, 7) if isinstance(value, tuple) else value + type(value)("1")
        assert msgspec.structs.replace(topology, **{name: other}).digest != topology.digest, name


def test_a_vote_does_not_depend_on_the_order_in_which_reasons_came():
    rng = random.Random(3)
    for _ in range(50):
        size = rng.randrange(2, 9)
        pairs = [(a, b) for a in range(size) for b in range(size) if a != b and rng.random() < 0.2]
        changes = {}
        for rank in range(size):
            peers = [b for a, b in pairs if a == rank]
            rng.shuffle(peers)
            changes[f"r{rank}"] = {"unreachable": dict.fromkeys(peers, "no"), "host": str(rng.randrange(2))}
        reports = _reports(size, **changes)
        mirrored = [
            msgspec.structs.replace(r, unreachable=dict(reversed(r.unreachable.items()))) for r in reports
        ]
        topology = vote(reports)
        assert topology == vote(mirrored)
        together = [
            (a, b) for a in range(size) for b in range(size)
            if a != b and topology.nodes[a] == topology.nodes[b]
        ]  # fmt: skip
        # What is not whole is never passed off as a node that is.
        assert topology.no_peer_access or not set(together) & set(pairs)


@pytest.mark.parametrize(
    ("reports", "told"),
    [
        ([], "a vote without reports; give one DeviceReport for every rank"),
        (_reports(2, r1={"unreachable": {2: "?"}}), "rank 1 reports on rank 2 of 2 ranks"),
    ],
)
def test_a_vote_that_makes_no_sense_is_refused(reports, told):
    with pytest.raises(ConfigError) as caught:
        vote(reports)
    assert str(caught.value) == told


@pytest.mark.parametrize(
    ("name", "nodes", "size", "arch", "kind", "multicast"),
    [
        ("h100x8", 1, 8, "sm_90", "h100", True),
        ("b200x8", 1, 8, "sm_100", "b200", True),
        ("h100x8-no-multicast", 1, 8, "sm_90", "h100", False),
        ("2xh100x8", 2, 16, "sm_90", "h100", True),
        ("2 x h100x8", 2, 16, "sm_90", "h100", True),
        ("pcie2", 1, 2, "sm_90", "h100-pcie", False),
        ("h200", 1, 1, "sm_90", "h200", False),
        ("h200x8", 1, 8, "sm_90", "h200", True),
        ("a100x8", 1, 8, "sm_80", "a100", False),
        ("v100x4", 1, 4, "sm_70", "v100", False),
        ("gb200x72", 1, 72, "sm_100", "gb200", True),
        ("4xgb200x4-no-multicast", 4, 16, "sm_100", "gb200", False),
        ("mixed", 1, 4, "sm_80", "a100-pcie+h100-pcie", False),
    ],
)
def test_topologies_have_names(name, nodes, size, arch, kind, multicast):
    topology = named_topology(name)
    assert (topology.num_nodes, topology.world_size) == (nodes, size)
    assert (topology.arch, topology.kind) == (arch, kind)
    assert (topology.no_multicast == "") == multicast
    assert (
        topology.no_peer_access == topology.no_nvshmem == topology.no_kernels == topology.shares_device == ""
    )


def test_a_domain_of_several_hosts_is_one_node():
    reports = named_reports("gb200x72")
    assert len({report.host for report in reports}) == 18
    assert len({report.fabric for report in reports}) == 1


@pytest.mark.parametrize(
    ("name", "told"),
    [
        ("h300x8", "topology 'h300x8' is unknown; give one of h100x8, b200x8, h100x8-no-multicast, 2xh100x8"),
        ("", "is unknown"),
        ("h100x0", "is unknown"),
        ("h100x8-no-manners", "each v100, a100, h100, h200, b200, gb200"),
        ("h100x16", "at most 8 GPUs of h100 reach one another by load and store; give more nodes, as in 2xh"),
        ("999xh100x8", "has 7992 ranks; give at most 1024"),
    ],
)
def test_an_unknown_topology_is_refused_with_those_that_are_known(name, told):
    with pytest.raises(ConfigError) as caught:
        named_topology(name)
    assert told in str(caught.value)
