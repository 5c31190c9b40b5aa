"""Keeps tests from asking a name server.

A TCPStore looks up the name of every address that it connects to, for its log; that of ::ffff:127.0.0.1 is in
no file, so that each rank of each world would ask the network, and wait five seconds where an answer is lost.
"""

import contextlib
import ctypes
import os

SOURCES = b"files myhostname files"
"""Where names come from: this machine's own. The last to be asked says that a name is unknown; where there is
no myhostname, it would say that it is missing."""


def use_no_name_server() -> None:
    """In this process and those forked from it; programs that it starts give up after a second."""
    os.environ.setdefault("RES_OPTIONS", "timeout:1 attempts:1")
    with contextlib.suppress(AttributeError):  # Only glibc can be told.
        ctypes.CDLL(None)["__nss_configure_lookup"](b"hosts", SOURCES)
