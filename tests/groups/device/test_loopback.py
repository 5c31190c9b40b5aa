"""A rank's messages to itself."""

import pytest
import torch

from tcomm.errors import CollectiveMismatchError, ConfigError
from tcomm.groups.device.loopback import Loopback


def test_messages_come_in_order_and_are_copies():
    loopback, x = Loopback(), torch.ones(2, 2).t()
    loopback.send(x)
    loopback.send(torch.tensor(3))
    x.zero_()
    with pytest.raises(CollectiveMismatchError, match=r"next message is float32 \[2, 2\]"):
        loopback.recv(torch.Size([4]), torch.float32)
    first = loopback.recv(torch.Size([2, 2]), torch.float32)
    assert first.eq(1).all()
    assert first.is_contiguous()
    assert loopback.recv(torch.Size([]), torch.int64).item() == 3
    loopback.send(x)
    loopback.clear()
    with pytest.raises(ConfigError, match="has sent nothing"):
        loopback.recv(torch.Size([2, 2]), torch.float32)
