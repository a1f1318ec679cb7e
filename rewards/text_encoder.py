"""What the rewards that run a text encoder share: loading, forwards within a token budget, results kept by text.

Everything runs in inference mode and float32. Texts are sorted by length, so that a forward pads little; the texts that
share a forward change one another's vectors by rounding alone, and so does oneDNN.

Shapes: B texts of one forward, T tokens, E hidden width.
"""

import hashlib
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, Generic, TypeVar

from unirg.scoring.contract import RewardError

if TYPE_CHECKING:
    import torch

TOKENS = {"cpu": 512, "cuda": 16384}  # padded tokens of one forward; on a CPU larger batches are slower
SHARES = "text encoders"
"""The `shares` of the rewards that run these models: they stand in one process and load each model once."""

Value = TypeVar("Value")


class Recent(Generic[Value]):
    """Values by key, of which the `limit` used last are kept."""

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self._kept: OrderedDict[Any, Value] = OrderedDict()

    def look_up(self, keys: Iterable[Any], compute: Callable[[list[Any]], Iterable[Value]]) -> dict[Any, Value]:
        """The value of every distinct key. `compute` is called once at most, with the keys that are not known, and
        answers one value for each in their order."""
        wanted = dict.fromkeys(keys)
        new = [key for key in wanted if key not in self._kept]
        computed = dict(zip(new, compute(new), strict=True)) if new else {}
        found = {key: computed[key] if key in computed else self._kept[key] for key in wanted}
        for key, value in found.items():
            self._kept[key] = value
            self._kept.move_to_end(key)
        while len(self._kept) > self.limit:
            self._kept.popitem(last=False)
        return found


@dataclass(frozen=True)
class Encoder:
    """A text encoder and its tokenizer on one device. `limit` is the longest text in tokens, the special ones included,
    `weights` what the weights are: a hub's commit, or the start of the files' SHA-256."""

    model: Any
    tokenizer: Any
    limit: int
    device: str
    weights: str

    def batches(self, ids: Sequence[Sequence[int]]) -> "Iterator[tuple[list[int], torch.Tensor]]":
        """Forwards over all texts, given as token ids: (rows of `ids`, their last hidden states (B, T, E)), the longest
        texts first. What lies beyond a text's own length is padding."""
        import torch

        # Wrapped around each forward, not around the whole: a generator would leave the mode on between its steps.
        for rows in batch_rows([len(row) for row in ids], TOKENS.get(self.device.partition(":")[0], TOKENS["cuda"])):
            longest = len(ids[rows[0]])
            ids_BT = torch.full((len(rows), longest), self.tokenizer.pad_token_id)
            mask_BT = torch.zeros((len(rows), longest), dtype=torch.long)
            for position, row in enumerate(rows):
                ids_BT[position, : len(ids[row])] = torch.tensor(ids[row])
                mask_BT[position, : len(ids[row])] = 1
            with torch.inference_mode():
                states_BTE = self.model(ids_BT.to(self.device), attention_mask=mask_BT.to(self.device))[0]
            yield rows, states_BTE


def batch_rows(lengths: Sequence[int], tokens: int) -> Iterator[list[int]]:
    """The rows of each forward, the longest first: as many as fit `tokens` when padded to the longest of them, and
    one where even that is too long."""
    order = sorted(range(len(lengths)), key=lambda row: -lengths[row])
    start = 0
    while start < len(order):
        fitting = max(1, tokens // max(1, lengths[order[start]]))
        yield order[start : start + fitting]
        start += fitting


@lru_cache(maxsize=8)
def load_encoder(name: str, layers: int, device: str) -> Encoder:
    """The first `layers` layers of a Hugging Face encoder: a folder, or a hub id that is downloaded or can be.

    Loaded once per process. Raises RewardError saying what is missing and where it is looked for.
    """
    import torch
    from transformers import AutoConfig, AutoModel, AutoTokenizer
    from transformers.utils import logging

    verbosity = logging.get_verbosity()
    try:
        config = AutoConfig.from_pretrained(name)
        available = config.num_hidden_layers
        if not 1 <= layers <= available:
            raise RewardError(f"encoder {name} has {available} layers; expected a layer from 1 to {available}")
        config.num_hidden_layers = layers
        logging.set_verbosity_error()  # else the layers that are left out are listed; what is missing is checked below
        model, found = AutoModel.from_pretrained(name, config=config, dtype=torch.float32, output_loading_info=True)
        tokenizer = AutoTokenizer.from_pretrained(name)
    except RewardError:
        raise
    except (OSError, ValueError, RuntimeError) as error:
        raise RewardError(
            f"encoder {name} cannot be loaded ({' '.join(str(error).split())}). Expected a folder with config.json, "
            f"model.safetensors and the tokenizer's files, or a hub id; fetch it with `hf download {name} --local-dir "
            "FOLDER` where there is a network, and give FOLDER as `model_folder`"
        ) from error
    finally:
        logging.set_verbosity(verbosity)
    if missing := sorted(key for key in found["missing_keys"] if not key.startswith("pooler.")):
        shown = ", ".join(missing[:3]) + (", ..." if len(missing) > 3 else "")
        raise RewardError(f"encoder {name} lacks {len(missing)} weights of its own configuration: {shown}")
    # RoBERTa counts positions from its padding id on, so that it has fewer than its table.
    offset = config.pad_token_id + 1 if config.model_type in ("roberta", "xlm-roberta", "camembert") else 0
    positions = getattr(config, "max_position_embeddings", None)  # absent where positions are relative
    limit = min(tokenizer.model_max_length, positions - offset if positions else tokenizer.model_max_length)
    weights = str(getattr(config, "_commit_hash", None) or fingerprint(Path(name)))
    return Encoder(for_inference(model, device), tokenizer, limit, device, weights)


def for_inference(model: "torch.nn.Module", device: str) -> "torch.nn.Module":
    """The model on `device`, dropout off; on a CPU its layers by oneDNN, in about half the time."""
    from .onednn_linear import use_onednn

    model = model.eval().to(device)
    return use_onednn(model) if device == "cpu" else model


def fingerprint(path: Path) -> str:
    """The first 16 hex digits of the SHA-256 of a file, or of a folder's weight files and config.json by name."""
    files = [path]
    if path.is_dir():
        endings = (".safetensors", ".bin", ".pth")
        files = sorted(file for file in path.iterdir() if file.suffix in endings or file.name == "config.json")
    digest = hashlib.sha256()
    for file in files:
        with file.open("rb") as stream:
            while block := stream.read(1 << 20):
                digest.update(block)
    return digest.hexdigest()[:16]
