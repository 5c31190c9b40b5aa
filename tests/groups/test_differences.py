import importlib.metadata

from tcomm.groups.differences import describe_differences, installed_version


def test_what_is_the_same_is_not_told():
    assert describe_differences("g", {0: {"a": "1"}, 2: {"a": "1"}}) == ""


def test_what_differs_is_told_of_each_rank_that_is_known():
    told = describe_differences("g", {2: {"a": "1", "b": "x"}, 0: {"a": "2", "b": "x", "c": "?"}})
    assert told.splitlines() == [
        "the ranks of group 'g' have different settings",
        "  a:",
        "    rank 0: '2'",
        "    rank 2: '1'",
        "  c:",
        "    rank 0: '?'",
        "    rank 2: '(unknown)'",
        "make them the same",
    ]


def test_the_version_is_that_of_the_package(monkeypatch):
    monkeypatch.setattr(importlib.metadata, "version", lambda name: f"{name} 9")
    assert installed_version.__wrapped__() == "tcomm 9"

    def fail(name):
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "version", fail)
    assert installed_version.__wrapped__() == "source"
