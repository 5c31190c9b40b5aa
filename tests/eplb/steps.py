"""Layers in the middle of a search, for tests of its steps."""

import numpy as np

from tcomm.eplb.layers import Layers
from tcomm.eplb.maps import holders, replica_counts


def layers_of(phy2log, load, num_gpus, held_by=None):
    """As a search would have them; moves cost something where `held_by`, a map [L, P], is given."""
    phy2log, load = np.array(phy2log), np.array(load, float)
    rows, experts = load.shape
    layers = Layers(
        index=np.arange(rows), phy2log=phy2log, counts=replica_counts(phy2log, experts), load=load,
        slot_load=np.empty(phy2log.shape), gpu_load=np.empty((rows, num_gpus)), hottest=np.zeros(rows, int),
        peak=np.empty(rows), spent=np.zeros(rows, int),
        past_pairs=np.zeros(rows, bool),
        held=None if held_by is None else holders(np.array(held_by), experts, num_gpus),
    )  # fmt: skip
    layers.weigh()
    layers.look()
    return layers
