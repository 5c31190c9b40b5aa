import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tcomm.eplb.migration import Copy, LayerMoves, migration
from tcomm.eplb.moving.rows import LayerRows, check_layers, rows_to_give, write_rows
from tcomm.errors import ConfigError
from tests.eplb.moving.weights import ROW_NBYTES, Layers


def _layer(size=3):
    return Layers.filled([list(range(size))], 0, size).weights[0]


def test_weights_of_any_dtype_are_rows_of_bytes_in_their_own_memory():
    weights = _layer()
    rows = LayerRows.of(weights)
    assert rows.row_nbytes == (30, 7, 4, 3, 5, 0, 17)
    assert sum(rows.row_nbytes) == ROW_NBYTES
    assert rows.kinds[0] == "bfloat16[3, 5]"
    assert rows.offsets == (0, 96, 128, 144, 160, 176, 176)
    assert rows.nbytes == 176 + 3 * 17
    assert str(rows).startswith("bfloat16[3, 5], float8_e4m3fn[7], float32[], float8_e8m0fnu[3], ")
    views = rows.bytes_of(weights)
    assert [tuple(view.shape) for view in views] == [(3, n) for n in rows.row_nbytes]
    assert [view.data_ptr() for view in views] == [weight.data_ptr() for weight in weights]
    buffer = torch.zeros(rows.nbytes, dtype=torch.uint8)
    for number, view in enumerate(rows.views_of(buffer)):
        view.fill_(number + 1)
    assert buffer.bincount().tolist()[1:] == [3 * n for n in rows.row_nbytes]


@pytest.mark.parametrize(
    ("weights", "text"),
    [
        ([], "give a list of tensors, at least one"),
        (torch.zeros(3), "give a list of tensors, at least one"),
        ([torch.zeros(2), 3.0], "weight 1: takes a torch.Tensor, not float"),
        ([torch.tensor(1.0)], "needed contiguous [slots of a rank, ...]"),
        ([torch.zeros(2, 4)[:, ::2]], "is [2, 2] with strides [4, 2]"),
        ([torch.zeros(2), torch.zeros(3)], "weight 1 has 3 slots on cpu, and weight 0 2"),
        ([torch.zeros(2), torch.zeros(2, device="meta")], "weight 1 of a layer is on the meta device"),
        ([torch.zeros(0, 2)], "have no slots"),
        ([torch.zeros(2, 2, device="meta")], "weight 0 of a layer is on the meta device; load it first"),
    ],
)
def test_what_cannot_be_moved_is_refused(weights, text):
    with pytest.raises(ConfigError) as caught:
        LayerRows.of(weights)
    assert text in str(caught.value)


def test_other_weights_than_the_first_are_refused():
    with pytest.raises(
        ConfigError, match=r"the weights are float32\[4\] in 2 slots on cpu, and those of the"
    ):
        LayerRows.of([torch.zeros(2, 3)]).bytes_of([torch.zeros(2, 4)])


def test_layers_are_alike_and_each_has_memory_of_its_own():
    whole, empty = torch.zeros(6, 4), torch.zeros(2, 0)
    layers = [[whole[at : at + 2], empty] for at in (4, 0, 2)]
    assert check_layers(layers) == LayerRows.of(layers[0])
    assert check_layers([]) is None
    # Within a layer both are moved alike.
    assert check_layers([[whole[:2], whole[:2]]]) is not None
    for tied in (whole[:2], whole[1:3]):
        with pytest.raises(ConfigError, match="layers 1 and 2 share memory of their weights"):
            check_layers([*layers[:2], [tied, empty]])
    with pytest.raises(
        ConfigError, match=r"layer 1 are float32\[3\] in 2 slots on cpu, and those of layer 0"
    ):
        check_layers([[torch.zeros(2, 4)], [torch.zeros(2, 3)]])


def test_a_call_differs_with_layer_moves_and_weights():
    def signature(layer=0, expert=1, kind=torch.float32, algorithm="shared"):
        moves = LayerMoves((), (Copy(expert, 0, 1),), (), ())
        return LayerRows.of([torch.zeros(2, 4, dtype=kind)]).call("op", layer, moves, algorithm).signature

    told = [signature(), signature(layer=1), signature(expert=2), signature(kind=torch.int32)]
    assert len(set(told)) == 4
    assert signature() == told[0]


@given(st.integers(0, 10_000), st.integers(1, 4), st.integers(1, 4))
def test_what_is_given_is_what_is_written(seed, world, size):
    """With all ranks in one process: each takes rows that were given, and its slots end as the map says."""
    generator = np.random.default_rng(seed)
    old, new = (generator.integers(-1, 5, (1, world * size)) for _ in range(2))
    moves = migration(old, new, world).layers[0]
    whole = torch.from_numpy(old[0].copy() * 10).view(world, size, 1)
    staged = torch.full_like(whole, 99)
    for rank in range(world):
        for row in rows_to_give(moves, rank, size):
            staged[rank, row] = whole[rank, row]
    for rank in range(world):
        rows = LayerRows.of([whole[rank]]).bytes_of([whole[rank]])
        write_rows(
            rows, moves, rank,
            lambda copy: [staged.view(-1, 1)[copy.source].view(torch.uint8)],
        )  # fmt: skip
    has = old[0].tolist()
    wanted = [n if n >= 0 and n in has else has[slot] for slot, n in enumerate(new[0].tolist())]
    assert (whole.view(-1) // 10).tolist() == wanted


@pytest.mark.parametrize("made", [False, True])
@pytest.mark.parametrize("used", [False, True])
@pytest.mark.parametrize("kind", [torch.Tensor.clone, torch.nn.Parameter])
def test_weights_made_and_written_in_inference_mode_or_not(made, used, kind):
    with torch.inference_mode(made):
        weight = kind(torch.arange(4.0).view(2, 2))
    moves = LayerMoves((), (Copy(0, 0, 1),), (), ())
    with torch.inference_mode(used):
        rows = LayerRows.of([weight]).bytes_of([weight])
        write_rows(rows, moves, 0, lambda copy: [rows[0][copy.source]])
    assert weight.tolist() == [[0, 1], [0, 1]]
