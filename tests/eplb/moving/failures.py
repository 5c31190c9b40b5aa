"""A move of three layers in which one rank dies, stops or is late at a chosen point."""

import os
import signal
import time

import numpy as np

from tcomm.eplb.moving.rearrange import rearrange_expert_weights_inplace
from tcomm.errors import CommError
from tcomm.groups.moe.workspace import Workspace
from tests.eplb.moving.weights import Layers

SECONDS = 1.5
SIZE = 2
LAYER = 1
"""In the middle of which something happens."""


def maps(world_size):
    """Every rank gets what the next one has."""
    old = np.tile(np.arange(world_size * SIZE), (3, 1))
    return old, np.roll(old, -SIZE, axis=1)


def is_given(call, layer=LAYER):
    """Whether a call tells that the rows of that layer are there."""
    return call.op == "give_experts" and call.shape[0] == layer


def around_publish(before=None, after=None):
    """Have something done around the publication of the layer's rows, in this process."""
    publish = Workspace.publish

    def patched(self, epoch, call):
        if before is not None and is_given(call):
            before(self)
        publish(self, epoch, call)
        if after is not None and is_given(call):
            after(self)

    Workspace.publish = patched


def die(_=None):
    os.kill(os.getpid(), signal.SIGKILL)


def stop(_=None):
    os.kill(os.getpid(), signal.SIGSTOP)


def move(member, mover, group, on_layer=None):
    """Which layers are new, what of them is wrong, what was raised, and after how long."""
    old, new = maps(member.world_size)
    layers, done = Layers.filled(old, member.rank, SIZE), []

    def tell(layer):
        done.append(layer)
        if on_layer is not None:
            on_layer(layer)

    began, told = time.monotonic(), ()
    try:
        rearrange_expert_weights_inplace(
            old, new, layers.weights, group, mover=mover(layers.weights[0]), on_layer=tell
        )
    except CommError as error:
        told = type(error).__name__, error.peers, str(error)
    took = time.monotonic() - began
    news = [new[layer] if layer in done else old[layer] for layer in range(3)]
    wrong = [layers.wrong(layer, old[layer], news[layer]) for layer in range(3)]
    return done, wrong, told, took
