"""Weights whose rows tell the expert, so that any rank knows what any slot must hold; and maps for them."""

import dataclasses

import numpy as np
import torch

KINDS = (
    ((3, 5), torch.bfloat16),
    ((7,), torch.float8_e4m3fn),
    ((), torch.float32),
    ((3,), torch.float8_e8m0fnu),
    ((5,), torch.float4_e2m1fn_x2),
    ((0, 4), torch.float32),
    ((17,), torch.int8),
)
ROW_NBYTES = 30 + 7 + 4 + 3 + 5 + 0 + 17

EXAMPLE = {
    "old": [0, 1, 2, 3, -1, 5],
    "new": [3, 3, 0, 3, 1, 9],
    "after": [3, 3, 0, 3, 1, 5],
}
"""Of the document: two ranks with three slots each."""


def row(number, layer, expert):
    """The bytes of weight `number` of an expert."""
    shape, dtype = KINDS[number]
    nbytes = torch.Size(shape).numel() * dtype.itemsize
    generator = np.random.default_rng([number, layer, expert + 10_000])
    return torch.from_numpy(generator.integers(0, 256, nbytes, dtype=np.uint8))


def held(expert, slot):
    """Whose rows are in a slot: rows of its own where it holds no expert."""
    return expert if expert >= 0 else -2 - slot


def _zeros(shape, dtype):
    nbytes = torch.Size(shape).numel() * dtype.itemsize
    return torch.zeros(nbytes, dtype=torch.uint8).view(dtype).view(shape)


@dataclasses.dataclass
class Layers:
    """A rank's weights of all layers, each between two rows that nobody may touch."""

    rank: int
    size: int
    whole: list
    """[layer][weight]: [slots + 2, ...]"""

    @classmethod
    def filled(cls, old, rank, size, kinds=KINDS):
        whole = [[_zeros((size + 2, *shape), dtype) for shape, dtype in kinds] for _ in old]
        made = cls(rank, size, whole)
        for layer, experts in enumerate(np.asarray(old).tolist()):
            for number, weight in enumerate(made.whole[layer]):
                rows = weight.view(size + 2, -1).view(torch.uint8) if weight.numel() else None
                for at in range(size if rows is not None else 0):
                    slot = rank * size + at
                    rows[at + 1] = row(number, layer, held(experts[slot], slot))
        return made

    @property
    def weights(self):
        """[layer][weight]: [slots, ...], what is moved."""
        return [[weight[1:-1] for weight in layer] for layer in self.whole]

    def wrong(self, layer, old, new):
        """(weight, row) of all that a layer has otherwise than the new map says; old and new: [P]."""
        found = []
        for number, weight in enumerate(self.whole[layer]):
            if not weight.numel():
                continue
            rows = weight.view(self.size + 2, -1).view(torch.uint8)
            found += [(number, at) for at in (0, self.size + 1) if rows[at].any()]
            for at in range(self.size):
                slot = self.rank * self.size + at
                has = new[slot] if new[slot] >= 0 and new[slot] in old else old[slot]
                whose = held(has, slot)
                if not torch.equal(rows[at + 1], row(number, layer, whose)):
                    found.append((number, slot))
        return found


def random_maps(generator, num_layers, world_size, size, num_experts=6):
    """Two maps [L, P] with holes, experts that nobody has, duplicates on a rank, and layers that stay."""
    shape = (num_layers, world_size * size)
    old = generator.integers(-1, num_experts, shape)
    new = np.where(generator.random(shape) < 0.3, old, generator.integers(-1, num_experts + 1, shape))
    new[::3] = old[::3]
    return old, new
