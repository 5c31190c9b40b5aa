"""What a rank says it is calling, and the 32 bits that stand for it.

Ranks compare signatures before a collective takes effect. The description behind a signature lies in
the rank's control page, so that a disagreement can be shown as a table of what each rank called.
"""

from __future__ import annotations

import functools
import zlib

import msgspec

__all__ = ["CallDescription", "decode_description"]

_encoder = msgspec.msgpack.Encoder()


class CallDescription(msgspec.Struct, frozen=True, dict=True):
    """One call of one rank, in the part that all ranks must share and the part that may differ."""

    op: str
    """The verb, such as `all_reduce`."""
    dtype: str = ""
    """Element type as torch spells it, without the `torch.` in front."""
    shape: tuple[int, ...] = ()
    """Shape as given; for verbs whose sizes differ by rank, the dimensions that must agree."""
    reduce: str = ""
    """Reduce operation; empty where nothing is reduced."""
    root: int = -1
    """Rank that sends or receives alone; -1 where there is none."""
    dim: int = 0
    """Dimension along which parts are put together or taken apart, not negative."""
    sizes: tuple[int, ...] = ()
    """Rows of every rank, where they may differ and every rank gives all of them."""
    contents: str = ""
    """What it holds, where several tensors travel together in it."""
    algorithm: str = ""
    """Engine and algorithm, forced or chosen, such as `cpu:one_shot_pull`."""
    send_splits: tuple[int, ...] = ()
    """Rows for each destination; not part of the signature, checked pair by pair."""
    recv_splits: tuple[int, ...] = ()
    """Rows from each source; not part of the signature."""

    def encode(self) -> bytes:
        """Canonical bytes of the whole description (msgpack)."""
        return _encoder.encode(self)

    @functools.cached_property
    def signature(self) -> int:
        """32 bits over all that the ranks must share."""
        shared = (
            self.op, self.dtype, self.shape, self.reduce, self.root, self.dim, self.sizes, self.contents,
            self.algorithm,
        )  # fmt: skip
        return zlib.crc32(_encoder.encode(shared))

    def __str__(self) -> str:
        """One line of the table in a mismatch error."""
        words = [self.op]
        if self.dtype:
            words += [self.dtype, f"[{', '.join(map(str, self.shape))}]"]
        if self.reduce:
            words.append(self.reduce)
        if self.root >= 0:
            words.append(f"root={self.root}")
        if self.dim:
            words.append(f"dim={self.dim}")
        if self.sizes:
            words.append(f"sizes={list(self.sizes)}")
        if self.contents:
            words.append(f"of {self.contents}")
        if self.send_splits or self.recv_splits:
            words.append(f"send={list(self.send_splits)} recv={list(self.recv_splits)}")
        if self.algorithm:
            words.append(f"via {self.algorithm}")
        return " ".join(words)


_decoder = msgspec.msgpack.Decoder(CallDescription)


def decode_description(data: bytes) -> CallDescription | None:
    """The description in `data`, or None where it holds none that makes sense."""
    try:
        return _decoder.decode(data)
    except (msgspec.DecodeError, msgspec.ValidationError):
        return None
