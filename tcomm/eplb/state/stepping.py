"""Step by step: what is counted, when experts are rearranged, and by which loads."""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from tcomm.eplb.policies import policy_named
from tcomm.eplb.state.background import Background
from tcomm.eplb.state.model_state import EplbLayerState, EplbModelState
from tcomm.eplb.state.protocol import MixtureOfExperts
from tcomm.eplb.state.single import model_may_be_left_out
from tcomm.errors import ConfigError, UsageError
from tcomm.groups.parallel.eplb_config import EPLBConfig
from tcomm.groups.parallel.parallel_config import ParallelConfig

__all__ = ["Stepping", "checked_load"]

Loads = torch.Tensor | Sequence[torch.Tensor] | None


class Stepping(Background):
    """What a state does in each step. Attributes are those of `EplbState`."""

    parallel_config: ParallelConfig | None
    _is_recording = True
    _is_single = False

    def _prepare(self, config: EPLBConfig, device: torch.device) -> None:
        self._config, self.device, self._is_single = config, device, False
        self.policy_name = config.policy
        self.policy = policy_named(config.policy)
        self.expert_load_window_step, self.expert_load_window_size = 0, config.window_size
        self.expert_rearrangement_step, self.expert_rearrangement_step_interval = 0, config.step_interval
        self.num_steps = 0
        self.is_async = config.use_async
        self.rearrange_event = threading.Event()
        self.async_worker = None
        self.cuda_device_index = device.index if device.type == "cuda" else None
        with torch.inference_mode(False):
            self.should_record_tensor = torch.ones((), dtype=torch.bool, device=device)
            most = torch.iinfo(torch.int32).max
            count = 1 if self.parallel_config is None else max(1, self.parallel_config.num_ubatches)
            self.num_unpadded_tokens_tensors = list(
                torch.full((count,), most, dtype=torch.int32, device=device).unbind()
            )

    def _begin_anew(self) -> None:
        self.expert_rearrangement_step = self.num_steps = 0
        self._update_recording()

    def _update_recording(self) -> None:
        left = self.expert_rearrangement_step_interval - self.expert_rearrangement_step
        wanted = self._config.log_balancedness or left <= self.expert_load_window_size
        if wanted != self._is_recording:
            self._is_recording = wanted
            self.should_record_tensor.fill_(wanted)

    @model_may_be_left_out
    def step(
        self,
        model: MixtureOfExperts | bool | None = None,
        is_dummy: bool = False,
        is_profile: bool = False,
        log_stats: bool = False,
    ) -> None:
        """Take note of a forward pass, and rearrange experts when it is time. **Collective** at times.

        All ranks step equally often; a rank without tokens makes dummy steps.

        Args:
            model: of a state that was built for one; may be left out.
            is_dummy: the pass had no real tokens: they do not count.
            is_profile: only take the memory that a rearrangement takes; this is no step.
            log_stats: log how even the load of the pass was, each `log_balancedness_interval` steps. The
                same on every rank.

        Raises:
            CollectiveMismatchError: on every rank, when one has stepped more often than another; names it.
            CommError: as `rearrange` does.
        """
        self._use(model)
        if is_profile:
            self._reserve()
            return
        states = self.model_states.values()
        if is_dummy:
            for state in states:
                state.forget_pass()
        if log_stats and self.expert_rearrangement_step % self._config.log_balancedness_interval == 0:
            self._tell_statistics()
        if not is_dummy:
            for state in states:
                state.record(self.expert_load_window_step)
                state.forget_pass()
            self.expert_load_window_step = (self.expert_load_window_step + 1) % self.expert_load_window_size
        self._count_step()

    def _count_step(self) -> None:
        self._step_beside()
        self.num_steps += 1
        self.expert_rearrangement_step += 1
        is_due = self.expert_rearrangement_step >= self.expert_rearrangement_step_interval
        if is_due and not self._is_busy:
            self.expert_rearrangement_step = 0
            self._update_recording()
            self.rearrange()
        else:
            self._update_recording()

    @model_may_be_left_out
    def rearrange(
        self,
        model: MixtureOfExperts | bool | None = None,
        is_profile: bool = False,
        execute_shuffle: bool = True,
        global_expert_load: Loads = None,
        rank_mapping: Mapping[int, int] | None = None,
        *,
        global_expert_loads: Loads = None,
        use_last_expert_load: bool = False,
    ) -> torch.Tensor | list[torch.Tensor] | None:
        """Rearrange experts by the load of the window, layer by layer. **Collective.**

        A layer's weights and map change together. Where something fails in the middle, the layers before
        have their new map and the others the old one, on every rank alike.

        Args:
            model: of a state that was built for one; may be left out.
            is_profile: only take the memory that it takes.
            execute_shuffle: with False, experts stay where they are, and ranks that join, in `recv_state`,
                are told loads and maps.
            global_expert_load: [L, E] int64, or a list of one for each model, the same on every rank; None:
                what was counted.
            rank_mapping: the new rank of each old one, -1 for one that leaves. As many as the group has
                ranks: the group is that before, of which some leave. Otherwise it is the new one.
            global_expert_loads: another name of `global_expert_load`.
            use_last_expert_load: go by what the last rearrangement went by.

        Returns:
            With `execute_shuffle=False` the loads: one for a state that was built for one model, else a list.

        Raises:
            UsageError: when a load is no int64 [L, E], or is given without being needed.
            ConfigError: when loads, numbers of slots and ranks, or the mapping make no sense.
            CollectiveMismatchError: on every rank, when they are at different steps or have other loads or
                maps; nothing has changed.
            PeerLostError, PeerTimeoutError: when a rank is gone or late; names it, and says which layers are
                new.
        """
        given = global_expert_load if global_expert_loads is None else global_expert_loads
        self._use(model)
        self._refuse_while_busy("rearrange")
        if is_profile:
            self._reserve()
            return None
        loads = self._given_loads(given, use_last_expert_load)
        if not execute_shuffle:
            if loads is not None:
                raise UsageError("a load was given, and is not needed with execute_shuffle=False")
            shared = self._share(self._is_single)
            return shared[0] if self._is_single else shared
        if loads is None:
            loads = self._gather_loads(rank_mapping)
        if self.is_async and rank_mapping is None:
            self._begin_beside(loads)
            return None
        for state, load in zip(self.model_states.values(), loads, strict=True):
            self._rearrange_model(state, load, rank_mapping)
        if rank_mapping is not None:
            self._begin_anew()
        return None

    def prepare_forward(
        self, model_config: Any, num_unpadded_tokens: int, ubatch_slices: Sequence[Any] | None = None
    ) -> None:
        """Say how many tokens of the coming batch are real, for layers to count those alone.

        Args:
            model_config: not looked at: all models have the same tokens.
            num_unpadded_tokens: tokens of the batch; the rest is padding, behind them.
            ubatch_slices: of its micro-batches, each a slice of tokens or with such a `token_slice`; None:
                it has one.

        Raises:
            ConfigError: when there are more micro-batches than the config has.
        """
        del model_config
        tensors = self.num_unpadded_tokens_tensors
        slices = [slice(0, num_unpadded_tokens)] if ubatch_slices is None else list(ubatch_slices)
        if len(slices) > len(tensors):
            raise ConfigError(f"{len(slices)} micro-batches were given; the config has {len(tensors)}")
        for tensor, part in zip(tensors, slices, strict=False):
            tokens = getattr(part, "token_slice", part)
            tensor.fill_(max(0, min(num_unpadded_tokens, tokens.stop) - tokens.start))

    def layer_state(self, layer: int, model_config: Any = None) -> EplbLayerState:
        """What one layer of a model reads and writes: views that stay where they are.

        Args:
            layer: its number.
            model_config: of the model; None: of the only one.

        Raises:
            UsageError: when there is no such model.
        """
        return self._state_of(model_config).layer(layer, self.should_record_tensor)

    def _state_of(self, model_config: Any) -> EplbModelState:
        if model_config is None:
            return self._only
        found = self.model_states.get(str(model_config.compute_hash()))
        if found is None:
            raise UsageError("no model was added with this model_config; call add_model")
        return found

    def _use(self, model: Any) -> None:
        """Take note of the model that the caller named."""
        if model is None:
            return
        if self._is_single and self._only.model is None:
            self._only.model = model
        if all(state.model is not model for state in self.model_states.values()):
            raise UsageError("this model is not one whose experts the state balances; call add_model")

    def _given_loads(self, given: Loads, use_last: bool) -> list[torch.Tensor] | None:
        states = list(self.model_states.values())
        if use_last and given is None:
            last = [state.last_expert_load for state in states]
            if any(load is None for load in last):
                raise UsageError("there is no last load yet: experts were not rearranged before")
            return [load for load in last if load is not None]
        if given is None:
            return None
        loads = [given] if isinstance(given, torch.Tensor) else list(given)
        if len(loads) != len(states):
            raise UsageError(f"{len(loads)} loads were given for {len(states)} models")
        return [checked_load(load, state) for load, state in zip(loads, states, strict=True)]


def checked_load(load: object, state: EplbModelState) -> torch.Tensor:
    """A load that was given, in host memory.

    Raises:
        UsageError: when it is no int64 [L, E].
    """
    wanted = list(state.logical_replica_count.shape)
    if not isinstance(load, torch.Tensor) or load.dtype != torch.int64 or list(load.shape) != wanted:
        what = f"{load.dtype} {list(load.shape)}" if isinstance(load, torch.Tensor) else type(load).__name__
        raise UsageError(
            f"global_expert_load is {what}; give int64 {wanted}: tokens of each expert of each layer"
        )
    return load.cpu()
