"""A measurement whose collective gives wrong results, for a check that has to notice."""

from tcomm.cli import bench
from tcomm.groups.communicator import Communicator


def broken_measure(request):
    right = Communicator._run

    def wrong(self, verb, *args):
        out = right(self, verb, *args)
        if verb == "all_reduce":
            out[0] += 1
        return out

    Communicator._run = wrong
    with Communicator(timeout=60.0) as comm:
        return [bench._measure(comm, request, n, out) for n in request.sizes for out in request.outs]
