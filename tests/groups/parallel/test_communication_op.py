import torch

from tcomm.groups.parallel import communication_op as ops
from tcomm.groups.parallel import environment
from tests.groups.parallel.engine import engine, numbers


def _verbs(member):
    with engine(member, tp=2):
        x = numbers(2, 4, offset=10.0 * member.rank)
        both = [numbers(2, 4), numbers(2, 4, offset=10.0)]
        assert torch.equal(ops.tensor_model_parallel_all_reduce(x), sum(both))
        assert torch.equal(ops.tensor_model_parallel_all_gather(x), torch.cat(both, -1))
        assert torch.equal(ops.tensor_model_parallel_all_gather(x, 0), torch.cat(both, 0))
        assert torch.equal(ops.tensor_model_parallel_reduce_scatter(x), sum(both).chunk(2, -1)[member.rank])
        assert torch.equal(ops.tensor_model_parallel_reduce_scatter(x, 0), sum(both).chunk(2, 0)[member.rank])
        gathered = ops.tensor_model_parallel_gather(x, 1, 0)
        assert gathered is None if member.rank == 0 else torch.equal(gathered, torch.cat(both, 0))
        sent = {"x": x} if member.rank == 1 else None
        assert torch.equal(ops.broadcast_tensor_dict(sent, 1)["x"], both[1])


def test_the_verbs_of_the_tensor_parallel_group(on_ranks):
    on_ranks(2, _verbs)


def test_without_torch_distributed_a_dict_stays():
    contents = {"x": 1}
    assert ops.broadcast_tensor_dict(contents) is contents
    assert ops.broadcast_tensor_dict() is None


def _compiled(member):
    """Whole graphs, of several shapes, after the groups were made again."""
    found = []

    def block(x):
        whole = ops.tensor_model_parallel_all_gather(ops.tensor_model_parallel_all_reduce(x * 2) + 1)
        return ops.tensor_model_parallel_reduce_scatter(whole, 0)

    with engine(member, tp=2) as groups:
        for _ in range(2):
            torch.compiler.reset()
            compiled = torch.compile(block, fullgraph=True, backend="aot_eager", dynamic=True)
            for rows in (2, 4):
                x = numbers(rows, 3, offset=member.rank)
                found.append(torch.equal(compiled(x), block(x)))
            environment.destroy_model_parallel()
            groups.initialize_model_parallel(2)
    return found


def test_they_compile_whole(on_ranks):
    assert on_ranks(2, _compiled) == [[True] * 4] * 2
