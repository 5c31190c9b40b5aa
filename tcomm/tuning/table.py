"""Tuning tables: rows of JSON, each with the measurement that put it there."""

from __future__ import annotations

import hashlib
import importlib.resources
import pathlib
from collections.abc import Sequence

import msgspec

from tcomm.errors import ConfigError

__all__ = ["Row", "Table", "decode_table", "joined", "load_table"]

_FORMAT = 1


class Row(msgspec.Struct, frozen=True):
    """Use `algorithm` for messages up to `max_nbytes`, when `min_ranks` to `max_ranks` take part."""

    op: str
    """The verb."""
    algorithm: str
    """`engine:algorithm`."""
    max_nbytes: int | None
    """Largest message of this row, in bytes of one rank's input; null: no bound."""
    min_ranks: int = 2
    """Smallest world of this row."""
    max_ranks: int = 16
    """Largest world of this row."""
    piece_nbytes: int = 0
    """Cut a message into pieces of this size; 0: as large as fits."""
    measured_us: dict[str, float] = {}
    """Median microseconds of each candidate where this row was measured, by algorithm."""
    measured_at: str = ""
    """Ranks and bytes of that measurement."""
    device: str = ""
    """Kind of GPU that this row is for, as `Topology.kind` says it; empty: host memory."""

    @property
    def engine(self) -> str:
        """`cpu` or `triton`."""
        return self.algorithm.partition(":")[0]

    def covers(self, op: str, engine: str, world_size: int, nbytes: int, device: str = "") -> bool:
        """Whether this row speaks of such a call, by that engine (empty: any) on that kind of device."""
        return (
            (self.op, self.device) == (op, device)
            and engine in ("", self.engine)
            and self.min_ranks <= world_size <= self.max_ranks
            and (self.max_nbytes is None or nbytes <= self.max_nbytes)
        )


class Table(msgspec.Struct, frozen=True):
    """Rows of one kind of machine or several; the first that covers a call decides."""

    format: int
    """Version of this file format."""
    machine: str
    """Where it was measured."""
    versions: str
    """Of torch, Triton and Python, there."""
    date: str
    """Of the measurement."""
    command: str
    """That measured it."""
    rows: tuple[Row, ...]
    """In order of precedence."""

    def pick(self, op: str, engine: str, world_size: int, nbytes: int, device: str = "") -> Row | None:
        """The first row that covers such a call, or None; arguments as of `Row.covers`."""
        for row in self.rows:
            if row.covers(op, engine, world_size, nbytes, device):
                return row
        return None

    def encode(self) -> bytes:
        """Canonical bytes, the same for the same table."""
        return msgspec.json.encode(self)

    @property
    def digest(self) -> str:
        """Hash of the canonical bytes."""
        return hashlib.blake2b(self.encode(), digest_size=8).hexdigest()


def decode_table(data: bytes, source: str) -> Table:
    """The table in `data`.

    Raises:
        ConfigError: when it is none; names `source` and the field.
    """
    try:
        table = msgspec.json.decode(data, type=Table)
    except (msgspec.DecodeError, msgspec.ValidationError) as error:
        raise ConfigError(f"{source} is not a tuning table: {error}") from error
    if table.format != _FORMAT:
        raise ConfigError(f"{source} is a tuning table of format {table.format}; this tcomm reads {_FORMAT}")
    return table


def joined(tables: Sequence[Table]) -> Table:
    """One table of the rows of several, in that order."""
    if len(tables) == 1:
        return tables[0]
    return Table(
        _FORMAT,
        "; ".join(table.machine for table in tables),
        "; ".join(table.versions for table in tables),
        "; ".join(table.date for table in tables),
        "; ".join(table.command for table in tables),
        tuple(row for table in tables for row in table.rows),
    )


def load_table(path: str = "") -> Table:
    """The table at `path`, or those that come with tcomm, one after another.

    Raises:
        ConfigError: when there is none, or it cannot be read.
    """
    if not path:
        folder = importlib.resources.files("tcomm.tuning") / "tables"
        files = sorted((f for f in folder.iterdir() if f.name.endswith(".json")), key=lambda f: f.name)
        return joined([decode_table(f.read_bytes(), f"{f.name}, which comes with tcomm,") for f in files])
    try:
        data = pathlib.Path(path).read_bytes()
    except OSError as error:
        raise ConfigError(f"tuning table {path!r} cannot be read: {error.strerror}") from error
    return decode_table(data, path)
