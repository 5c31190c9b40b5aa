import dataclasses

import pytest

from tcomm.errors import UsageError
from tcomm.groups.moe.buffer_config import Config, check_nbytes, check_num_sms, config_for


def test_numbers_are_checked():
    assert config_for(2, 24) == Config(24)
    with pytest.raises(UsageError, match="Unsupported number of EP ranks: 0"):
        config_for(0, 20)
    for odd in (7, -2):
        with pytest.raises(AssertionError, match=f"The SM count must be even: {odd}"):
            check_num_sms(odd)
        with pytest.raises(UsageError, match="must be even"):
            Config(odd)
    assert check_num_sms(0) is None
    with pytest.raises(UsageError, match="num_max_nvl_chunked_recv_tokens=-1 of a Config"):
        dataclasses.replace(Config(), num_max_nvl_chunked_recv_tokens=-1)


def test_sizes_of_buffers():
    for good in (0, 128, (1 << 35) - 128):
        assert check_nbytes("num_nvl_bytes", good) is None
    for bad in (-128, 64, 1 << 35):
        with pytest.raises(AssertionError, match=f"num_nvl_bytes={bad}: give a multiple of 128 bytes, below"):
            check_nbytes("num_nvl_bytes", bad)


def test_hints_fit_the_checks():
    config = Config(20, 6, 256)
    nbytes = config.get_nvl_buffer_size_hint(7168 * 2, 8)
    assert nbytes == 8 * 10 * 256 * (7168 * 2 + 384)
    assert Config(2, 6, 1).get_nvl_buffer_size_hint(8, 1) == 512
    assert config.get_rdma_buffer_size_hint(7168 * 2, 16) == 0
