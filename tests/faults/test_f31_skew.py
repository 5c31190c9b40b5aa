"""F31: ranks run other versions or other settings. A table shows which, and nobody has a group."""

import os

import torch

from tcomm.groups import setup
from tcomm.groups.stateless import creation
from tests.faults.meeting import create
from tests.faults.worlds import failure_of


def _settings(member):
    if member.rank == 1:
        os.environ["TCOMM_STAGING_BYTES"] = "4096"
        setup.torch.__version__ = "1.0"
    failure = failure_of(member.communicator)
    os.environ.pop("TCOMM_STAGING_BYTES", None)
    setup.torch.__version__ = "2.0"
    with member.communicator("again") as comm:
        assert comm.all_reduce(torch.ones(1)).item() == 2.0
    return failure


def test_f31_communicators_show_the_settings_that_differ(world):
    for failure in world(2, _settings):
        assert failure.kind == "GroupMismatchError"
        assert "  torch:\n    rank 0: '2." in failure.text
        assert "    rank 1: '1.0'" in failure.text
        assert "  TCOMM_STAGING_BYTES:\n    rank 0: '8388608'\n    rank 1: '4096'" in failure.text
        assert failure.text.endswith("make them the same")
        assert failure.seconds < 5.0


def _versions(member):
    if member.rank == 1:
        creation.installed_version = lambda: "0.0.1"
        creation.VERSION = 99
    failure = failure_of(create, member, member.rank, 2)
    member.meet("failed")
    return failure


def test_f31_stateless_groups_show_the_versions_that_differ(world):
    for failure in world(2, _versions):
        assert failure.kind == "GroupMismatchError"
        assert "the ranks of group 'g' have different settings\n  tcomm:\n    rank 0: '" in failure.text
        assert "    rank 1: '0.0.1'" in failure.text
        assert "  messages:\n    rank 0: '1'\n    rank 1: '99'" in failure.text
        assert failure.seconds < 15.0, "long before the deadline"


def _secrets(member):
    os.environ["TCOMM_SECRET"] = f"of rank {member.rank}"
    failure = failure_of(create, member, member.rank, 2, timeout=0.7)
    member.meet("failed")
    return failure


def test_f31_ranks_with_other_secrets_are_told(world):
    first, second = world(2, _secrets)
    assert second.kind == "GroupMismatchError"
    assert "was not written by a process with this one's TCOMM_SECRET" in second.text
    assert first.kind == "GroupMismatchError"
    assert "rank 1 came to 'a group with another TCOMM_SECRET'" in first.text
