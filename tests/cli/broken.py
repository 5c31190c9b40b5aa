"""A measurement whose collective gives wrong results, for a check that has to notice."""

from tcomm.cli import bench
from tcomm.cli.contenders import Tcomm
from tcomm.groups.communicator import Communicator


def broken_measure(request: bench.BenchRequest):
    right = Tcomm.all_reduce

    def wrong(self):
        out = right(self)
        out[0] += 1
        return out

    Tcomm.all_reduce = wrong
    with Communicator(timeout=60.0) as comm:
        return bench.rows_of(bench.measure(comm, request, request.sizes[0], request.outs[0]))
