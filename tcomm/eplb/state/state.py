"""The state of expert balancing: counts loads, and rearranges experts when it is time."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Self, overload

import numpy as np
import torch

from tcomm.eplb.shapes import Shape, checked_map
from tcomm.eplb.state.elastic import receive_state
from tcomm.eplb.state.joining import Joining, build_initial_global_physical_to_logical_map
from tcomm.eplb.state.meeting import Meeting, checked_group
from tcomm.eplb.state.model_state import EplbModelState
from tcomm.eplb.state.protocol import MixtureOfExperts, check_model, check_weights
from tcomm.eplb.state.stepping import Stepping, checked_load
from tcomm.errors import ConfigError
from tcomm.groups.parallel.coordinator import GroupCoordinator
from tcomm.groups.parallel.eplb_config import EPLBConfig
from tcomm.groups.parallel.parallel_config import ParallelConfig
from tcomm.groups.parallel.parallel_state import get_ep_group

__all__ = ["EpConfigurationError", "EplbState"]


class EpConfigurationError(ConfigError, RuntimeError):
    """A model is not like the one that the state balances. A `RuntimeError` too, which callers may catch."""


class EplbState(Stepping):
    """Counts the load of experts, and rearranges them when it is time. `docs/eplb/state.md` has the whole.

    It comes in two shapes. `EplbState(parallel_config, device)` and `add_model` balance any number of models
    and count the tokens of all slots, [L, P]. `EplbState.build(model, device, parallel_config)`, or a
    constructor that is given the tensors themselves, is for one model and counts the tokens of this rank's
    slots, [L, P / G]; its maps are attributes.

    Args:
        parallel_config: whose `eplb_config` counts.
        device: of maps and counters.
        ep_group: the expert parallel group; None: `get_ep_group()` whenever it is needed.

    Attributes:
        model_states: of each model, by the hash of its config; "" where it was built for one.
        policy: what plans.
        expert_load_window_step, expert_load_window_size: where the next pass goes, and of how many.
        expert_rearrangement_step, expert_rearrangement_step_interval: steps since the last rearrangement
            fell due, and from one to the next.
        should_record_tensor: bool [] on the device: False while what is counted would be forgotten before
            it is looked at.
        is_async: whether experts are rearranged beside the forward pass.
        async_worker: what does that, once it has begun.
        rearrange_event: set while one is under way there.
        cuda_device_index: of the device; None on a host.

    Raises:
        ConfigError: when an argument makes no sense; names it.
    """

    @overload
    def __init__(
        self,
        parallel_config: ParallelConfig,
        device: torch.device,
        *,
        ep_group: GroupCoordinator | None = None,
    ) -> None: ...

    @overload
    def __init__(
        self,
        physical_to_logical_map: torch.Tensor,
        logical_to_physical_map: torch.Tensor,
        logical_replica_count: torch.Tensor,
        expert_load_pass: torch.Tensor,
        expert_load_window: torch.Tensor,
        expert_load_window_step: int = 0,
        expert_load_window_size: int = 0,
        expert_rearrangement_step: int = 0,
        expert_rearrangement_step_interval: int = 0,
        *,
        ep_group: GroupCoordinator | None = None,
    ) -> None: ...

    def __init__(self, *args: Any, ep_group: GroupCoordinator | None = None, **kwargs: Any) -> None:
        self._group = None if ep_group is None else checked_group(ep_group)
        self.model_states = {}
        if isinstance(args[0] if args else None, torch.Tensor) or "physical_to_logical_map" in kwargs:
            self._start_with_tensors(*args, **kwargs)
        else:
            self._start(*args, **kwargs)

    def _start(self, parallel_config: ParallelConfig, device: torch.device) -> None:
        if not isinstance(parallel_config, ParallelConfig):
            raise ConfigError(f"{parallel_config!r} is no ParallelConfig, and no tensor with a map")
        config = parallel_config.eplb_config
        self.parallel_config: ParallelConfig | None = parallel_config
        self._prepare(config, torch.device(device))
        interval = config.step_interval
        self.expert_rearrangement_step = max(0, interval - interval // 4)
        self._update_recording()

    def _start_with_tensors(
        self,
        physical_to_logical_map: torch.Tensor,
        logical_to_physical_map: torch.Tensor,
        logical_replica_count: torch.Tensor,
        expert_load_pass: torch.Tensor,
        expert_load_window: torch.Tensor,
        expert_load_window_step: int = 0,
        expert_load_window_size: int = 0,
        expert_rearrangement_step: int = 0,
        expert_rearrangement_step_interval: int = 0,
    ) -> None:
        self.parallel_config = None
        self._prepare(EPLBConfig(), physical_to_logical_map.device)
        self._is_single = True
        self.model_states[""] = EplbModelState(
            physical_to_logical_map, logical_to_physical_map, logical_replica_count, expert_load_pass,
            expert_load_window, slots_per_rank=expert_load_pass.shape[1], counts_own_slots=True,
        )  # fmt: skip
        self.expert_load_window_step = expert_load_window_step
        self.expert_load_window_size = expert_load_window_size or len(expert_load_window)
        self.expert_rearrangement_step = expert_rearrangement_step
        self.expert_rearrangement_step_interval = expert_rearrangement_step_interval
        self._update_recording()

    build_initial_global_physical_to_logical_map = staticmethod(build_initial_global_physical_to_logical_map)

    @classmethod
    def build(
        cls,
        model: MixtureOfExperts,
        device: torch.device,
        parallel_config: ParallelConfig,
        global_expert_load: torch.Tensor | None = None,
        old_global_expert_indices: torch.Tensor | None = None,
        rank_mapping: Mapping[int, int] | None = None,
        *,
        ep_group: GroupCoordinator | None = None,
        max_physical_experts: int | None = None,
    ) -> Self:
        """A state for one model, which is given views of it. **Collective** with a load, otherwise local.

        Args:
            model: the model.
            device: of maps and counters.
            parallel_config: its `eplb_config` counts.
            global_expert_load: as for `add_model`, as are the other arguments.
            old_global_expert_indices: see there.
            rank_mapping: see there.
            ep_group: as for the constructor.
            max_physical_experts: see `add_model`.

        Raises:
            ConfigError, CapabilityError, CommError: as the constructor and `add_model` do.
        """
        state = cls(parallel_config, device, ep_group=ep_group)
        state._is_single = True
        joining = Joining(global_expert_load, old_global_expert_indices, rank_mapping)
        state._add("", "", model, joining, max_physical_experts)
        return state

    def add_model(
        self,
        model: MixtureOfExperts,
        model_config: Any,
        global_expert_load: torch.Tensor | None = None,
        old_global_expert_indices: torch.Tensor | None = None,
        rank_mapping: Mapping[int, int] | None = None,
        *,
        model_name: str | None = None,
        max_physical_experts: int | None = None,
    ) -> None:
        """Balance the experts of a model too; it is given views. **Collective** with a load, otherwise local.

        With a load this rank joins others: their map is in force, and experts are rearranged at once, as the
        others do in `rearrange` with the same load and mapping.

        Args:
            model: the model.
            model_config: has `compute_hash()`, by which the model is known.
            global_expert_load: [L, E] int64, as `recv_state` gave it; None: this rank does not join.
            old_global_expert_indices: [L, P] with the slots of the old ranks, likewise.
            rank_mapping: the new rank of each old one; None: as many as before.
            model_name: for the log; None: `model_config.model` where there is one.
            max_physical_experts: slots that there may ever be; None: by `elastic_ep_max_dp_size` of the
                config, and without `enable_elastic_ep` as many as now.

        Raises:
            ConfigError: when model and group do not fit, the model was added before, or an argument is wrong.
            UsageError: when a load is no int64 [L, E].
            CommError: as `rearrange` does.
        """
        name = str(getattr(model_config, "model", "")) if model_name is None else model_name
        joining = Joining(global_expert_load, old_global_expert_indices, rank_mapping)
        self._add(str(model_config.compute_hash()), name, model, joining, max_physical_experts)

    def _add(
        self, key: str, name: str, model: MixtureOfExperts, joining: Joining, most_slots: int | None
    ) -> None:
        if key in self.model_states:
            raise ConfigError(f"a model with hash {key!r} was added before; each needs a config of its own")
        num_ranks = self.ep_group.world_size
        model = check_model(model, num_ranks)
        state = EplbModelState.of_model(
            model,
            joining.first_map(model),
            name=name,
            window_size=self.expert_load_window_size,
            most_slots=self._most_slots(model, num_ranks, most_slots),
            counts_own_slots=self._is_single,
            device=self.device,
        )
        load = None if joining.load is None else checked_load(joining.load, state)
        model.set_eplb_state(state.counted, state.logical_to_physical_map, state.logical_replica_count)
        check_weights(model, model.num_moe_layers, model.num_local_physical_experts)
        state.own_rank = self.ep_group.rank_in_group if load is None else None
        self.model_states[key] = state
        if load is not None:
            self._rearrange_model(state, load, joining.rank_mapping, joins=True)
            self._begin_anew()

    def _most_slots(self, model: MixtureOfExperts, num_ranks: int, given: int | None) -> int:
        now, config = model.num_physical_experts, self.parallel_config
        if given is None and config is not None and config.enable_elastic_ep:
            most_replicas = config.elastic_ep_max_dp_size or config.data_parallel_size
            ranks = -(-num_ranks * most_replicas // config.data_parallel_size)
            return max(now, ranks * model.num_local_physical_experts)
        if given is not None and given < now:
            raise ConfigError(f"max_physical_experts={given} is less than the {now} slots there are")
        return now if given is None else given

    @staticmethod
    def recv_state(*, ep_group: GroupCoordinator | None = None) -> tuple[Any, Any]:
        """Be told loads and maps, as a rank that joins. **Collective.**

        The others call `rearrange(execute_shuffle=False)`.

        Args:
            ep_group: of old and new ranks; None: `get_ep_group()`.

        Returns:
            The load, int64 [L, E], over all ranks, and the map in force, int64 [L, P] with the slots of the
            old ranks; lists of them where those who tell balance several models.

        Raises:
            CollectiveMismatchError: when ranks are on another errand.
            ConfigError: when every rank of the group joins.
        """
        told = receive_state(Meeting(get_ep_group() if ep_group is None else ep_group))
        return (told.loads[0], told.maps[0]) if told.is_single else (told.loads, told.maps)

    @classmethod
    def get_eep_state(
        cls, parallel_config: ParallelConfig, *, ep_group: GroupCoordinator | None = None
    ) -> tuple[list[torch.Tensor], list[torch.Tensor], dict[int, int]]:
        """`recv_state`, with what else a rank needs that joins behind the others. **Collective.**

        Args:
            parallel_config: whose number of redundant experts becomes that of the new ranks' slots.
            ep_group: as for `recv_state`.

        Returns:
            Loads, maps, and the mapping of ranks, by which each old rank keeps its number.
        """
        meeting = Meeting(get_ep_group() if ep_group is None else ep_group)
        told = receive_state(meeting)
        num_experts, num_slots = told.loads[0].shape[1], told.maps[0].shape[1]
        slots = told.slots_per_rank * meeting.num_ranks
        parallel_config.eplb_config.num_redundant_experts = slots - num_experts
        mapping = {rank: rank for rank in range(num_slots // told.slots_per_rank)}
        return told.loads, told.maps, mapping

    def validate_ep_configuration(self, new_model: MixtureOfExperts) -> None:
        """Check that a model can take the place of each one there is.

        Raises:
            EpConfigurationError: a RuntimeError, when one of its numbers of experts is another; names it.
        """
        for state in self.model_states.values():
            for name in _NUMBERS:
                ours, theirs = getattr(state.model, name, None), getattr(new_model, name, None)
                if ours != theirs:
                    raise EpConfigurationError(
                        f"{name} of the new model is {theirs}; {state.title or 'the model '}has {ours}"
                    )

    @classmethod
    def from_mapping(
        cls,
        model: MixtureOfExperts,
        model_config: Any,
        device: torch.device,
        parallel_config: ParallelConfig,
        physical_to_logical_map: torch.Tensor,
        *,
        ep_group: GroupCoordinator | None = None,
    ) -> Self:
        """A state for a model whose weights lie as a map says. Local.

        Args:
            model: the model.
            model_config: as for `add_model`.
            device: of maps and counters.
            parallel_config: as for the constructor.
            physical_to_logical_map: [L, P].
            ep_group: as for the constructor.

        Raises:
            ConfigError: as the constructor, `add_model` and `update_mapping` do.
        """
        state = cls(parallel_config, device, ep_group=ep_group)
        state.add_model(model, model_config)
        state.update_mapping(physical_to_logical_map, model_config)
        return state

    def update_mapping(self, physical_to_logical_map: torch.Tensor, model_config: Any = None) -> None:
        """Go by another map, in whose slots the weights lie already. Local, and the same on all ranks.

        Args:
            physical_to_logical_map: [L, P], with any number of slots that there is room for; -1 holds no
                expert, and every expert is somewhere.
            model_config: of the model; None: of the only one.

        Raises:
            ConfigError: when it is no such map.
        """
        self._refuse_while_busy("update_mapping")
        state = self._state_of(model_config)
        given = physical_to_logical_map.cpu().numpy()
        num_layers, num_slots = len(state.logical_replica_count), given.shape[-1] if given.ndim else 0
        num_ranks, rest = divmod(num_slots, state.slots_per_rank)
        if rest:
            raise ConfigError(
                f"physical_to_logical_map has {num_slots} slots; give a multiple of the "
                f"{state.slots_per_rank} that each rank has"
            )
        shape = Shape(state.num_experts, num_slots, num_gpus=max(1, num_ranks))
        phy2log = checked_map("physical_to_logical_map", given, num_layers, shape, whole=False)
        for layer, row in enumerate(phy2log):
            if lost := set(range(state.num_experts)) - set(row.tolist()):
                raise ConfigError(
                    f"physical_to_logical_map has no slot with expert {min(lost)} in layer {layer}"
                )
        had = state.num_ranks
        state.adopt(phy2log)
        state.own_rank = None
        if state.num_ranks != had:
            state.tell_model()

    def reconfigure_physical_expert_slots(self, model_config: Any, num_physical_experts: int) -> None:
        """Have slots of more ranks, or of fewer, behind the others. Local, and the same on all ranks.

        Args:
            model_config: of the model; None: of the only one.
            num_physical_experts: slots from now on. New ones are empty; of those that go every expert is
                somewhere else, too.

        Raises:
            ConfigError: as `update_mapping` does.
        """
        phy2log = self._state_of(model_config).phy2log()
        kept = phy2log[:, : max(0, num_physical_experts)]
        wide = np.full((len(kept), max(0, num_physical_experts)), -1, np.int64)
        wide[:, : kept.shape[1]] = kept
        self.update_mapping(torch.from_numpy(wide), model_config)

    def close(self) -> None:
        """End what runs beside, and give back what moves weights. Not collective; may be called twice."""
        try:
            if self.async_worker is not None:
                self.async_worker.stop()
            self._under_way = None
            self.rearrange_event.clear()
        finally:
            for state in self.model_states.values():
                state.close()


_NUMBERS = (
    "num_routed_experts", "num_redundant_experts", "num_physical_experts", "num_logical_experts",
    "num_expert_groups",
)  # fmt: skip
