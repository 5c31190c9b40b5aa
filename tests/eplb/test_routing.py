import numpy as np
import pytest
import torch

from tcomm.eplb import Shape, choose_slots, make_plan, share_thresholds, split_tokens
from tcomm.eplb.tensors import compute_logical_maps
from tcomm.errors import ConfigError
from tests.kernels.slot_choices import EXAMPLE, guarded, is_guarded, random_routing

every_engine = pytest.mark.parametrize("engine", ["", "cpu", "triton"])


def _example():
    return tuple(torch.tensor(EXAMPLE[name]) for name in ("topk", "map", "count"))


@every_engine
def test_the_example_is_routed_and_counted(engine):
    load = torch.tensor(EXAMPLE["load"])
    out = choose_slots(*_example(), expert_load=load, engine=engine)
    assert out.tolist() == EXAMPLE["out"]
    assert load.tolist() == EXAMPLE["counted"]


@every_engine
def test_an_engine_writes_where_it_is_told_and_counts_on(engine):
    routing = random_routing(3, 90, 8, 40, dtype=torch.int32, shares=True)
    out, out_around = guarded((90, 8), torch.int32, "cpu")
    load, load_around = guarded((9,), torch.int32, "cpu", 4)
    given = (routing.topk, routing.slots, routing.count)
    options = {"expert_load": load, "first_slot": 18, "salt": 5, "share": routing.share, "engine": engine}
    record, unpadded = torch.tensor(True), torch.tensor([50])
    for _ in range(2):
        found = choose_slots(*given, out=out, num_unpadded_tokens=unpadded, should_record=record, **options)
        assert found is out
    plain = choose_slots(*given, salt=5, share=routing.share, engine="cpu")
    assert torch.equal(out, plain)
    counts = np.bincount(plain[:50][plain[:50] >= 0], minlength=routing.num_slots)
    assert load.tolist() == (4 + 2 * counts[18:27]).tolist()
    record.fill_(False)
    choose_slots(*given, out=out, should_record=record, **options)
    assert load.tolist() == (4 + 2 * counts[18:27]).tolist()
    assert is_guarded(out_around)
    assert is_guarded(load_around)


@every_engine
def test_no_tokens(engine):
    load = torch.ones(4, dtype=torch.int32)
    out = choose_slots(torch.empty(0, 2, dtype=torch.int64), *_example()[1:], expert_load=load, engine=engine)
    assert out.shape == (0, 2)
    assert load.tolist() == [1, 1, 1, 1]


@every_engine
def test_a_map_may_be_the_first_places_of_a_wider_one(engine):
    routing = random_routing(5, 60, 4, 20, shares=True)
    wide = torch.full((20, 50), 7)
    wide[:, : routing.slots.shape[1]] = routing.slots
    view = wide[:, : routing.slots.shape[1]]
    for share in (None, routing.share):
        out = choose_slots(routing.topk, view, routing.count, share=share, engine=engine)
        plain = choose_slots(routing.topk, routing.slots, routing.count, share=share, engine="cpu")
        assert torch.equal(out, plain)


@every_engine
def test_ranks_with_a_choice_each_begin_at_different_replicas(engine):
    given = torch.tensor([[0]]), torch.tensor([[4, 5, 6]]), torch.tensor([3])
    found = [int(choose_slots(*given, salt=rank, engine=engine)) for rank in range(6)]
    assert found == [4, 5, 6] * 2


def test_the_example_of_thresholds():
    slots, count = torch.tensor([[0, 2], [1, -1]]), torch.tensor([2, 1])
    table = share_thresholds(np.array([0.25, 1, 0.75]), slots, count)
    assert table.tolist() == [[16384, 65536], [65536, 65536]]
    assert table.dtype == torch.int32
    # To nearest, and of whatever sum.
    assert share_thresholds(np.array([4.0, 1, 2]), slots, count)[0].tolist() == [43691, 65536]
    layers = share_thresholds(
        np.array([[0.25, 1, 0.75], [1.0, 1, 0]]), torch.stack([slots, slots]), torch.stack([count, count])
    )
    assert layers.tolist() == [[[16384, 65536], [65536, 65536]], [[65536, 65536], [65536, 65536]]]
    assert layers.is_contiguous()


@every_engine
def test_tokens_are_split_as_planned(engine):
    shape = Shape(32, 40, 1, 1, 8)
    load = 1000 / np.arange(1.0, 33)[None]
    plan = make_plan(load, shape)
    share = split_tokens(load, plan.phy2log, shape)
    slots, count = compute_logical_maps(torch.from_numpy(plan.phy2log), 32)
    table = share_thresholds(share, slots, count)
    made = np.random.default_rng(1)
    topk = torch.from_numpy(made.choice(32, (500, 2), p=load[0] / load.sum()))
    counter = torch.zeros(40, dtype=torch.int64)
    choose_slots(topk, slots[0], count[0], share=table[0], expert_load=counter, engine=engine)
    wanted = np.bincount(topk.reshape(-1), minlength=32)[plan.phy2log[0]] * share[0]
    # Four blocks of choices, and less than two choices off in each.
    assert np.abs(counter.numpy() - wanted).max() < 8
    assert counter[share[0] == 0].sum() == 0


def _refused(match, **changes):
    topk, slots, count = _example()
    given = {"topk_idx": topk, "logical_to_physical_map": slots, "logical_replica_count": count} | changes
    with pytest.raises(ConfigError, match=match):
        choose_slots(**given)


def test_wrong_choices_and_maps_are_refused():
    topk, slots, count = _example()
    _refused(r"topk_idx is list; give a tensor of two", topk_idx=[[0]])
    _refused(r"topk_idx is \[6\]; give a tensor of two", topk_idx=topk.view(-1))
    _refused(r"topk_idx is float32 \[3, 2\] on cpu; give int64 or int32", topk_idx=topk.float())
    _refused(r"topk_idx is int64 \[2, 3\] on cpu, not contiguous; give", topk_idx=topk.T)
    _refused(r"topk_idx has expert 3; give 0 to 2, or -1 for none", topk_idx=topk + 1)
    _refused(r"topk_idx has expert -2; give 0 to 2, or -1 for none", topk_idx=topk - 1)
    _refused(r"map is \[1, 3, 2\]; give .* one layer's", logical_to_physical_map=slots[None])
    _refused(r"a row of logical_to_physical_map is int32", logical_to_physical_map=slots.int())
    _refused(r"a row of logical_to_physical_map is .* not contiguous", logical_to_physical_map=slots.T)
    _refused(r"map is \[3, 0\]; give an expert and a place", logical_to_physical_map=slots[:, :0])
    _refused(
        r"logical_replica_count is int64 \[2\] on cpu; give int64 \[3\]", logical_replica_count=count[:2]
    )
    _refused(r"share is float32 \[3, 2\] on cpu; give int32 \[3, 2\]", share=slots.float())
    _refused(r"logical_replica_count is int64 \[3\] on meta", logical_replica_count=count.to("meta"))


def test_wrong_counters_and_options_are_refused():
    topk, load = _example()[0], torch.zeros(4, dtype=torch.int32)
    _refused(r"expert_load is int16 \[4\] on cpu; give int64 or int32", expert_load=load.short())
    _refused(r"expert_load is list; give a tensor", expert_load=[0])
    _refused(r"expert_load is int32 \[2, 2\]", expert_load=load.view(2, 2))
    for value in (-1, 1.0, True):
        _refused(rf"first_slot={value!r} is wrong; give", expert_load=load, first_slot=value)
        _refused(
            rf"num_unpadded_tokens={value!r} is wrong; give", expert_load=load, num_unpadded_tokens=value
        )
        _refused(rf"salt={value!r} is wrong; give an integer from 0 to 1048575, as", salt=value)
    _refused("salt=1048576 is wrong", salt=1 << 20)
    _refused(r"num_unpadded_tokens is int32 \[4\]", expert_load=load, num_unpadded_tokens=load)
    _refused(
        r"should_record is int32 \[1\] on cpu; give bool \[1\]", expert_load=load, should_record=load[:1]
    )
    _refused(r"should_record is bool; give a tensor", expert_load=load, should_record=True)
    _refused(r"out is int32 \[3, 2\] on cpu; give int64 \[3, 2\]", out=topk.int())
    _refused(r"out is topk_idx itself.*give other memory", topk_idx=topk, out=topk)
    _refused(r"engine='cuda' for choices on cpu; give 'triton', or 'cpu'", engine="cuda")
    assert load.tolist() == [0, 0, 0, 0]


def test_code_of_the_host_does_not_read_other_memory():
    with pytest.raises(ConfigError, match="engine='cpu' for choices on meta; give 'triton'"):
        choose_slots(*(x.to("meta") for x in _example()), engine="cpu")


def test_wrong_shares_are_refused():
    slots, count = torch.tensor([[0, 2], [1, -1]]), torch.tensor([2, 1])
    for share, match in (
        (np.ones((1, 3)), r"share \[1, 3\], map \[2, 2\] and count \[2\] do not fit; give \[L, P\]"),
        (np.array([1, np.nan, 1]), "a share is negative or not finite"),
        (np.array([1, -1.0, 1]), "a share is negative or not finite"),
        (np.ones(2), "the map has slot 2, and share is for 2 slots"),
        (np.array([1.0, 0, 1]), "the shares of expert 1 are all 0; give"),
    ):
        with pytest.raises(ConfigError, match=match):
            share_thresholds(share, slots, count)
