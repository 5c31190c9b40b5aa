"""The maps and counters of one model, at addresses that never change."""

from __future__ import annotations

import dataclasses

import numpy as np
import torch

from tcomm.eplb.maps import logical_maps
from tcomm.eplb.moving.mover import WeightMover
from tcomm.eplb.shapes import IntArray
from tcomm.eplb.state.protocol import MixtureOfExperts
from tcomm.eplb.state.rearrangement import Rearrangement
from tcomm.eplb.state.statistics import EplbStats, LoadStatistics
from tcomm.eplb.state.windows import new_window, of_experts
from tcomm.errors import ConfigError
from tcomm.groups.parallel.coordinator import GroupCoordinator

__all__ = ["EplbLayerState", "EplbModelState"]


@dataclasses.dataclass(eq=False)
class EplbLayerState:
    """What one layer of a model reads and writes: views of the model's state."""

    expert_load_view: torch.Tensor
    """[P / G], or [P] and more: tokens of each slot in this forward pass."""
    logical_to_physical_map: torch.Tensor
    """[E, X]: the slots of each expert, filled up with -1."""
    logical_replica_count: torch.Tensor
    """[E]: how many they are."""
    should_record_tensor: torch.Tensor
    """bool []: whether tokens need to be counted at all."""


@dataclasses.dataclass(eq=False)
class EplbModelState:
    """The maps and counters of one model.

    The map in force is read and written here alone. A layer switches whole: its slots, the slots of each
    expert and their numbers; what was counted in its slots before is forgotten.
    """

    physical_to_logical_map: torch.Tensor
    """[L, P] int64: the expert in each slot; -1 in one that holds none."""
    logical_to_physical_map: torch.Tensor
    """[L, E, X] int64: the slots of each expert, rising, filled up with -1."""
    logical_replica_count: torch.Tensor
    """[L, E] int64: how many they are."""
    expert_load_pass: torch.Tensor
    """[L, P / G] or [L, P] int32: tokens of this rank's slots, or of all, in this forward pass."""
    expert_load_window: torch.Tensor
    """[window, L, P / G] or [window, L, P] int32: the passes before."""
    slots_per_rank: int
    """P / G; stays as it is when ranks come and go."""
    counts_own_slots: bool
    """Whether loads are counted for this rank's slots alone."""
    own_rank: int | None = None
    """Whose slots they are, by the numbers of the map in force; None: not known yet."""
    model: MixtureOfExperts | None = None
    model_name: str = ""
    physical_to_logical_map_buffer: torch.Tensor | None = None
    """Memory of the map, [L, most slots]; None: the map itself."""
    expert_load_pass_buffer: torch.Tensor | None = None
    """Memory of the pass, likewise; what the model is given."""
    last_expert_load: torch.Tensor | None = None
    """[L, E]: what the last plan was made for."""
    last_rearrangement: Rearrangement | None = None
    last_statistics: LoadStatistics | None = None
    """How even the last pass was that was looked at."""
    eplb_stats: EplbStats | None = None
    """What the last plan was made from."""
    mover: WeightMover | None = None
    """What moves this model's weights; made when it is first needed."""
    mover_group: GroupCoordinator | None = None
    """For whose ranks."""

    @classmethod
    def of_model(
        cls,
        model: MixtureOfExperts,
        phy2log: IntArray,
        *,
        name: str,
        window_size: int,
        most_slots: int,
        counts_own_slots: bool,
        device: torch.device,
    ) -> EplbModelState:
        """The state of a model whose slots hold what a map says, without any load.

        Args:
            model: the model.
            phy2log: [L, P]; -1 holds no expert.
            name: for the log.
            window_size: steps whose loads are kept.
            most_slots: as many as there may ever be.
            counts_own_slots: whether loads are counted for this rank's slots alone.
            device: of maps and counters.
        """
        num_layers, experts, local = len(phy2log), model.num_logical_experts, model.num_local_physical_experts
        width = local if counts_own_slots else most_slots

        def filled(shape: tuple[int, ...], value: int, dtype: torch.dtype = torch.int64) -> torch.Tensor:
            with torch.inference_mode(False):
                return torch.full(shape, value, dtype=dtype, device=device)

        slots = filled((num_layers, most_slots), -1)
        load_pass = filled((num_layers, width), 0, torch.int32)
        state = cls(
            physical_to_logical_map=slots,
            logical_to_physical_map=filled((num_layers, experts, most_slots - experts + 1), -1),
            logical_replica_count=filled((num_layers, experts), 0),
            expert_load_pass=load_pass,
            expert_load_window=new_window(window_size, load_pass[:, :0]),
            slots_per_rank=local,
            counts_own_slots=counts_own_slots,
            model=model,
            model_name=name,
            physical_to_logical_map_buffer=slots,
            expert_load_pass_buffer=load_pass,
        )
        state.adopt(phy2log)
        return state

    @property
    def title(self) -> str:
        """Its name, as a line of the log has it: with a space behind, or empty."""
        return f"{self.model_name} " if self.model_name else ""

    @property
    def num_ranks(self) -> int:
        """Ranks that share the slots of the map in force."""
        return self.physical_to_logical_map.shape[1] // self.slots_per_rank

    @property
    def num_experts(self) -> int:
        """Experts of a layer, E."""
        return self.logical_replica_count.shape[1]

    @property
    def counted(self) -> torch.Tensor:
        """What a model counts in: the memory of the pass, [L, P / G], or [L, most slots]."""
        return self.expert_load_pass if self.expert_load_pass_buffer is None else self.expert_load_pass_buffer

    def phy2log(self) -> IntArray:
        """The map in force, on the host: [L, P], a copy."""
        return self.physical_to_logical_map.to("cpu", torch.int64, copy=True).numpy()

    def layer(self, index: int, should_record: torch.Tensor) -> EplbLayerState:
        """What one layer is given."""
        return EplbLayerState(
            self.counted[index],
            self.logical_to_physical_map[index],
            self.logical_replica_count[index],
            should_record,
        )

    def record(self, step: int) -> None:
        """Keep the pass as step `step` of the window."""
        self.expert_load_window[step].copy_(self.expert_load_pass)

    def forget_pass(self) -> None:
        """Count from zero."""
        self.expert_load_pass.zero_()

    def expert_loads(self, rank: int) -> torch.Tensor:
        """Tokens of each expert over the window, as far as this rank counted them.

        Args:
            rank: this one, as long as nothing else is known.

        Returns:
            [L, E] int64 in host memory.
        """
        slots = self.physical_to_logical_map
        if self.counts_own_slots:
            first = (rank if self.own_rank is None else self.own_rank) * self.slots_per_rank
            slots = slots[:, first : first + self.slots_per_rank]
        return of_experts(self.expert_load_window, slots, self.num_experts)

    def check_room(self, num_slots: int) -> None:
        """Check that the maps can have that many slots where they are.

        Raises:
            ConfigError: when they cannot.
        """
        needed, there = num_slots - self.num_experts + 1, self.logical_to_physical_map.shape[2]
        room = self.expert_load_pass_buffer
        counted = num_slots if room is None or self.counts_own_slots else room.shape[1]
        if needed > there or num_slots > counted:
            raise ConfigError(
                f"{num_slots} slots of {self.num_experts} experts do not fit into maps for "
                f"{there + self.num_experts - 1}, which stay where they are because graphs may have captured "
                "them; set enable_elastic_ep and elastic_ep_max_dp_size, or give max_physical_experts, from "
                "the beginning"
            )

    def adopt(self, phy2log: IntArray) -> None:
        """Put a map in force whose weights are in the slots already, with as many slots as it has. Local.

        Args:
            phy2log: [L, P]; -1 holds no expert.

        Raises:
            ConfigError: when there is no room for so many slots.
        """
        num_slots = phy2log.shape[1]
        self.check_room(num_slots)
        room = self.physical_to_logical_map_buffer
        if room is None or room.shape[1] < num_slots:
            with torch.inference_mode(False):
                device = self.physical_to_logical_map.device
                room = torch.empty(phy2log.shape, dtype=torch.int64, device=device)
        self.physical_to_logical_map = room[:, :num_slots]
        if not self.counts_own_slots and self.expert_load_pass_buffer is not None:
            self.expert_load_pass = self.expert_load_pass_buffer[:, :num_slots]
        if self.expert_load_window.shape[2] != self.expert_load_pass.shape[1]:
            self.expert_load_window = new_window(len(self.expert_load_window), self.expert_load_pass)
        self.forget_pass()
        for layer, row in enumerate(phy2log):
            self.switch_layer(layer, row)

    def switch_layer(self, layer: int, slots: IntArray) -> None:
        """Put a layer's new map in force, where the old one is. Local.

        Args:
            layer: its number.
            slots: [P], the expert in each slot, which has its weights by now; -1 holds none.

        Raises:
            ConfigError: when an expert has more slots than the map has places.
        """
        places = self.logical_to_physical_map.shape[2]
        counts = np.bincount(slots[slots >= 0], minlength=self.num_experts)
        if counts.max(initial=0) > places:
            raise ConfigError(
                f"expert {counts.argmax()} of layer {layer} has {counts.max()} slots, and {places} places"
            )
        log2phy, counts = logical_maps(slots[None], self.num_experts, places)
        self.physical_to_logical_map[layer].copy_(torch.from_numpy(slots))
        self.logical_to_physical_map[layer].copy_(torch.from_numpy(log2phy[0]))
        self.logical_replica_count[layer].copy_(torch.from_numpy(counts[0]))
        self.expert_load_window[:, layer].zero_()

    def tell_model(self) -> None:
        """Tell a model that wants to know it how many slots there are. Local."""
        tell = getattr(self.model, "update_physical_experts_metadata", None)
        if tell is not None:
            tell(self.physical_to_logical_map.shape[1], self.slots_per_rank)

    def close(self) -> None:
        """Give back what moves weights. Not collective; may be called twice."""
        mover, self.mover, self.mover_group = self.mover, None, None
        if mover is not None:
            mover.close()
