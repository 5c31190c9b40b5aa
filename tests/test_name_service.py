import resource
import socket
import sys

import pytest

MAPPED = ("::ffff:127.0.0.1", 1)
"""What a TCPStore looks up for each connection."""
TIMES = 20


def _waits(_=None):
    """How often the lookups of an address without a name made this thread wait for somebody."""
    before = resource.getrusage(resource.RUSAGE_THREAD).ru_nvcsw
    for _ in range(TIMES):
        assert socket.getnameinfo(MAPPED, socket.NI_NUMERICSERV) == ("::ffff:127.0.0.1", "1")
    return resource.getrusage(resource.RUSAGE_THREAD).ru_nvcsw - before


@pytest.mark.skipif(sys.platform != "linux", reason="glibc's name service")
def test_neither_the_tests_nor_their_ranks_ask_a_name_server(on_ranks):
    assert max(_waits(), *on_ranks(2, _waits)) < TIMES / 2
    with pytest.raises(socket.gaierror) as unknown:
        socket.getaddrinfo("nowhere.invalid", 1)
    assert unknown.value.errno == socket.EAI_NONAME
    assert socket.getaddrinfo("localhost", 1)
