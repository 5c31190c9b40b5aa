import pytest

from tcomm.errors import ConfigError
from tcomm.memory.rings import HEAD, RECEIVED, RING_SLOTS, SENT, TAIL, Pieces, RingLayout


def test_counts_and_slots_of_all_pairs_lie_apart():
    layout = RingLayout(3, 2, 256)
    words = [
        layout.word(kind, peer, lane)
        for kind in (HEAD, TAIL, SENT, RECEIVED)
        for peer in range(3)
        for lane in (0, 1)
    ]
    assert words == list(range(layout.words_at, layout.words_at + 8 * 24, 8))
    assert layout.words_at * 8 >= 2 * 3 * 8
    assert layout.slots_at >= words[-1] * 8 + 8
    assert layout.slots_at % 128 == 0
    slots = [
        layout.slot(source, lane, turn)
        for source in range(3)
        for lane in (0, 1)
        for turn in range(RING_SLOTS)
    ]
    assert slots == list(range(layout.slots_at, layout.nbytes, 256))
    assert layout.slot(1, 0, 5) == layout.slot(1, 0, 1)
    assert layout.nbytes == layout.slots_at + 3 * 2 * RING_SLOTS * 256


def test_rings_fit_into_what_there_is():
    smallest = RingLayout(4, 2, 128)
    assert RingLayout.within(smallest.nbytes, 4, 2) == smallest
    assert RingLayout.within(smallest.nbytes + 4 * 2 * 4 * 128 - 1, 4, 2) == smallest
    larger = RingLayout.within(1 << 20, 4, 2)
    assert larger.slot_nbytes % 128 == 0
    assert (1 << 20) - 4 * 2 * 4 * 128 < larger.nbytes <= 1 << 20
    with pytest.raises(ConfigError, match=f"give at least {smallest.nbytes}"):
        RingLayout.within(smallest.nbytes - 1, 4, 2)


@pytest.mark.parametrize(
    ("row", "width", "columns", "rows", "pieces"),
    [(48, 48, 1, 2, 3), (300, 128, 3, 1, 15), (128, 128, 1, 1, 5)],
)
def test_rows_are_cut_into_pieces(row, width, columns, rows, pieces):
    cut = Pieces(row, 128)
    assert (cut.width, cut.num_columns, cut.num_rows) == (width, columns, rows)
    assert cut.count(5) == pieces
    assert cut.count(0) == 0
