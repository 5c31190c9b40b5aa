"""The state of expert balancing: loads over the last steps, maps, and when they change."""

from tcomm.eplb.state.model_state import EplbLayerState, EplbModelState
from tcomm.eplb.state.protocol import MixtureOfExperts
from tcomm.eplb.state.rearrangement import Rearrangement
from tcomm.eplb.state.state import EplbState
from tcomm.eplb.state.statistics import EplbStats, LoadStatistics

__all__ = [
    "EplbLayerState",
    "EplbModelState",
    "EplbState",
    "EplbStats",
    "LoadStatistics",
    "MixtureOfExperts",
    "Rearrangement",
]
