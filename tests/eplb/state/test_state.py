import pytest
import torch

from tcomm.eplb.state.state import EplbState
from tests.eplb.state.toy import ModelConfig, Toy, config, expert_group, skewed_choices


def _runs_on(member, shape):
    """Outputs before and after a rearrangement that steps bring about, and what happened."""
    with expert_group(member) as group:
        model = Toy(group, layers=3, experts=6, redundant=2)
        given = config(step_interval=4)
        if shape == "one model":
            state = EplbState.build(model, torch.device("cpu"), given, ep_group=group)
        else:
            state = EplbState(given, torch.device("cpu"), ep_group=group)
            state.add_model(model, ModelConfig())
        model.fill(state.physical_to_logical_map)
        addresses = [x.data_ptr() for x in (state.logical_to_physical_map, state.logical_replica_count)]
        tokens = torch.randn(6, 4, generator=torch.Generator().manual_seed(member.rank))
        choices = skewed_choices(6, 3, 6, member.rank)
        before, old = model(tokens, choices), state.physical_to_logical_map.clone()
        state.step()
        after = model(tokens, choices)
        new = state.physical_to_logical_map
        size = model.num_local_physical_experts
        mine = new[:, member.rank * size : (member.rank + 1) * size].tolist()
        assert addresses == [x.data_ptr() for x in (model.log2phy, model.logcnt)]
        assert model.holds() == mine
        [only] = state.model_states.values()
        return torch.equal(before, after), torch.equal(old, new), new.tolist(), only.last_rearrangement


@pytest.mark.parametrize("world_size", [2, 4])
@pytest.mark.parametrize("shape", ["one model", "models"])
def test_tokens_come_out_the_same_wherever_experts_are(on_ranks, world_size, shape):
    results = on_ranks(world_size, _runs_on, shape)
    for same_bits, same_map, new, report in results:
        assert same_bits
        assert not same_map
        assert new == results[0][2]
        assert report.before < report.after <= report.bound + 1e-9
