import numpy as np

from tcomm.eplb.packing import pack


def test_the_heaviest_goes_first_into_the_lightest_bin_that_is_not_full():
    bins, positions = pack(np.array([[1.0, 5, 4, 3], [2, 2, 2, 2]]), 2)
    # 5 | 4, then 3 beside 4, and 1 into what is left; equal ones in order, to the lowest bin.
    assert bins.tolist() == [[0, 0, 1, 1], [0, 1, 0, 1]]
    assert positions.tolist() == [[1, 0, 0, 1], [0, 0, 1, 1]]


def test_as_many_bins_as_items_keep_the_order():
    bins, positions = pack(np.array([[1.0, 9, 4]]), 3)
    assert bins.tolist() == [[0, 1, 2]]
    assert positions.tolist() == [[0, 0, 0]]


def test_a_full_bin_takes_no_more_though_it_is_light():
    bins, _ = pack(np.array([[9.0, 1, 1, 0, 0, 0]]), 2)
    assert bins.tolist() == [[0, 1, 1, 1, 0, 0]]
    nothing, _ = pack(np.zeros((1, 4)), 2)
    assert nothing.tolist() == [[0, 0, 1, 1]]


def test_weights_are_left_as_they_are():
    weights = np.array([[1.0, 2, 3, 4]])
    pack(weights, 2)
    assert weights.tolist() == [[1, 2, 3, 4]]


def test_items_without_weight_all_go_to_the_lowest_bin_that_is_not_full():
    # Bins 1 and 2 stay empty, and so are as light as bin 0 only until it has something.
    bins, _ = pack(np.array([[5.0, 0, 0, 0, 0, 0], [5, 4, 3, 2, 1, 0]]), 3)
    assert bins.tolist() == [[0, 1, 1, 2, 2, 0], [0, 1, 2, 2, 1, 0]]
