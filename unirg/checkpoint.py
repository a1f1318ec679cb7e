"""Checkpoints: folders of safetensors and JSON that are whole or not there, verified before anything is read of them.

    step-000050/
      weights-0000-000.safetensors     parameters by name; each rank wrote every so-many-th of them, in files of a GiB
      optimiser-0000-000.safetensors   the optimiser's tensors, `parameter/exp_avg`
      state.json                       the step and what else the stage goes on with
      checksums.json                   size and SHA-256 of every other file, written last
    latest                             the name of the newest

A sharded parameter is gathered, one at a time, and written whole: what one number of ranks wrote, any other reads, with
or without sharding. All ranks must see the folder. Every random choice of a stage follows from (seed, stage, step,
rank), and so do data order and learning rate: the step's number stands for them all.
"""

import contextlib
import hashlib
import json
import os
import shutil
from collections.abc import Callable, Collection, Iterable, Mapping
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from safetensors import safe_open
from torch.distributed.tensor import DTensor, distribute_tensor

from unirg import ranks, zero3
from unirg.distributed import whole_tensor
from unirg.errors import UserError
from unirg.run import sync, write_atomically

FILE_BYTES = 1 << 30
"""About what a rank holds of other ranks' shards before it writes them."""

Files = dict[str, dict[str, Any]]
"""Size in bytes and SHA-256 by file name."""


class NotSaved(Exception):
    """A checkpoint could not be written; the message says on which rank and why. What was there before is intact."""


def save(
    folder: Path,
    step: int,
    weights: Mapping[str, torch.Tensor],
    optimiser: torch.optim.Optimizer | None,
    state: Mapping[str, Any],
    *,
    keep: int = 2,
    needed: Collection[int] = (),
) -> None:
    """A checkpoint after `step` steps, as folder/step-000050, moved into place when it is on disk; `latest` names it.

    All ranks call it; `state` (JSON) is the first rank's. The last `keep` stay, and those of the steps `needed`. Raises
    NotSaved, on all ranks, where any cannot write.
    """
    part, whole = folder / f".{name_of(step)}.part", folder / name_of(step)
    if ranks.rank() == 0:
        _agree(_attempt(lambda: _fresh(part)))
    else:
        _agree(None)
    files: Files = {}
    failure = _write(part, "weights", weights.items(), files)
    if optimiser is not None:
        failure = _write(part, "optimiser", _optimiser_tensors(optimiser, weights), files, failure)
    shares = ranks.everyones((failure, files))
    failures = [f"rank {rank}: {words}" for rank, (words, _) in enumerate(shares) if words]
    if ranks.rank() == 0:
        every = {name: entry for _, own in shares for name, entry in own.items()}
        failure = ", ".join(failures) or _attempt(lambda: _put_in_place(part, whole, {"step": step, **state}, every))
        if failure:
            shutil.rmtree(part, ignore_errors=True)
        else:
            _prune(folder, step, keep, {name_of(other) for other in needed})
    _agree(failure if ranks.rank() == 0 else None)


def load(
    folder: Path,
    weights: Mapping[str, torch.Tensor],
    optimiser: torch.optim.Optimizer | None,
    *,
    step: int | None = None,
    warn: Callable[[str], None],
) -> dict[str, Any] | None:
    """Reads a checkpoint into `weights` and `optimiser` and returns its state; None where the folder has none.

    It is the one that `latest` names, or else the newest; one that is not whole is passed over, in words that go to
    `warn`, for the one before it. With `step` it is that one, of a stage's folder `best`, or else one before it. All
    ranks call it, and come to the same.

    Raises UserError where there are checkpoints and none is whole, ValueError where the one found is of another policy.
    """
    names: list[str] = ranks.everyones(_candidates(folder))[0]
    if step is not None:
        names = [name_of(step), *(name for name in sorted(names, reverse=True) if name < name_of(step))]
    problems = []
    for name in names:
        problem = "; ".join(words for words in ranks.everyones(_problem(folder / name)) if words)
        if problem:
            problems.append(f"{folder / name}: {problem}")
            warn(f"{problems[-1]}; not used")
            continue
        return _read(folder / name, weights, optimiser)
    if problems:
        stage = folder if step is None else folder.parent
        raise UserError(
            f"{folder}: no checkpoint is whole ({'; '.join(problems)}). Put one back from a copy; or remove "
            f"{stage}, and the same command trains the stage from its start"
        )
    return None


def clear(folder: Path) -> None:
    """Removes the checkpoints of a finished stage: its `final` folder is what is needed from then on."""
    for old in (*folder.glob("step-*"), *folder.glob(".*.part"), folder / "best"):
        shutil.rmtree(old, ignore_errors=True)
    (folder / "latest").unlink(missing_ok=True)


def best_steps(folder: Path) -> set[int]:
    """The steps whose policies a folder's checkpoints name as their best so far; one that is damaged names none."""
    found = set()
    for path in folder.glob("step-*/state.json"):
        with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
            found.add(json.loads(path.read_bytes())["best_step"])
    return found - {None}


def name_of(step: int) -> str:
    """The folder's name of the checkpoint after `step` steps."""
    return f"step-{step:06d}"


def _agree(failure: str | None) -> None:
    """Raises NotSaved on all ranks where any has failed."""
    if failures := [words for words in ranks.everyones(failure) if words]:
        raise NotSaved("; ".join(failures))


def _attempt(action: Callable[[], None]) -> str | None:
    """None where it was done, else the system's words (a full disk, a quota, a folder that may not be written)."""
    try:
        action()
    except OSError as error:
        return f"{error.strerror or error}" + (f": {error.filename}" if error.filename else "")
    return None


def _fresh(part: Path) -> None:
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir(parents=True)


def _write(
    part: Path,
    kind: str,
    tensors: Iterable[tuple[str, torch.Tensor]],
    files: Files,
    failure: str | None = None,
) -> str | None:
    """Writes this rank's share of the tensors and adds its files to `files`; returns what went wrong. A rank that
    cannot write goes on gathering: the others wait for it."""
    pending: dict[str, torch.Tensor] = {}
    count = 0

    def flush() -> None:
        nonlocal failure, count
        name = f"{kind}-{ranks.rank():04d}-{count:03d}.safetensors"
        # As bytes, not by `save_file`: these are what the checksum is of, whatever the disk makes of them.
        data = safetensors.torch.save(pending)
        failure = _attempt(lambda: _on_disk(part / name, data))
        files[name] = _entry(data)
        pending.clear()
        count += 1

    for place, (name, tensor) in enumerate(tensors):
        whole = whole_tensor(tensor)
        if failure is None and place % ranks.world() == ranks.rank():
            pending[name] = whole.detach().cpu().contiguous()
            if sum(kept.nbytes for kept in pending.values()) >= FILE_BYTES:
                flush()
    if pending and failure is None:
        flush()
    return failure


def _optimiser_tensors(
    optimiser: torch.optim.Optimizer, weights: Mapping[str, torch.Tensor]
) -> Iterable[tuple[str, torch.Tensor]]:
    for name, parameter in weights.items():
        apart = zero3.is_apart(parameter)
        for key, value in zero3.moments(parameter) if apart else optimiser.state.get(parameter, {}).items():
            yield f"{name}/{key}", value


def _on_disk(path: Path, data: bytes) -> None:
    with path.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def _entry(data: bytes) -> dict[str, Any]:
    return {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}


def _put_in_place(part: Path, whole: Path, state: Mapping[str, Any], files: Files) -> None:
    """The two JSON files, the folder's own entries on disk, the rename, `latest`."""
    text = json.dumps(state).encode()
    _on_disk(part / "state.json", text)
    _on_disk(part / "checksums.json", json.dumps(files | {"state.json": _entry(text)}, indent=1).encode())
    sync(part)
    shutil.rmtree(whole, ignore_errors=True)
    part.rename(whole)
    sync(whole.parent)
    write_atomically(whole.parent / "latest", whole.name + "\n")


def _prune(folder: Path, step: int, keep: int, needed: Collection[str]) -> None:
    # Later ones are of a run that was killed and now repeats itself: the one just written must outlast them.
    past = sorted(path for path in folder.glob("step-*") if path.name <= name_of(step))
    for old in past[:-keep]:
        if old.name not in needed:
            shutil.rmtree(old, ignore_errors=True)


def _candidates(folder: Path) -> list[str]:
    """Names of checkpoints in the order in which they are tried: `latest`, then the newest first."""
    names = sorted((path.name for path in folder.glob("step-*")), reverse=True)
    latest = folder / "latest"
    if latest.exists():
        named = latest.read_text(encoding="utf-8", errors="replace").strip() or "nothing"
        names = [named, *(name for name in names if name != named)]
    return names


def _problem(checkpoint: Path) -> str | None:
    """What is wrong with a checkpoint, as far as this rank looks: each reads its share of the files."""
    if not checkpoint.is_dir():
        return f"is not there{f' for rank {ranks.rank()}' if ranks.world() > 1 else ''}"
    if (checkpoint / "optimiser.pt").exists():
        return "was written by an earlier version, which goes on from it"
    try:
        listed: Files = json.loads((checkpoint / "checksums.json").read_bytes())
        for name in sorted(listed)[ranks.rank() :: ranks.world()]:
            path, expected = checkpoint / name, (listed[name]["bytes"], listed[name]["sha256"])
            if path.stat().st_size != expected[0]:
                return f"{name} has {path.stat().st_size} bytes, expected {expected[0]}"
            with path.open("rb") as file:
                if hashlib.file_digest(file, "sha256").hexdigest() != expected[1]:
                    return f"{name} is damaged (its SHA-256 is another)"
    except OSError as error:
        return f"{Path(error.filename or '').name} cannot be read ({error.strerror})"
    except (ValueError, KeyError, TypeError, AttributeError):
        return "checksums.json is damaged"
    return None if "state.json" in listed else "checksums.json is damaged"


@torch.no_grad()
def _read(
    checkpoint: Path, weights: Mapping[str, torch.Tensor], optimiser: torch.optim.Optimizer | None
) -> dict[str, Any]:
    listed = json.loads((checkpoint / "checksums.json").read_bytes())
    owners: dict[str, dict[str, Any]] = {"weights": {}, "optimiser": {}}
    for file in sorted(listed):
        if (kind := file.split("-")[0]) in owners:
            opened = safe_open(checkpoint / file, framework="pt")
            owners[kind] |= dict.fromkeys(opened.keys(), opened)
    if odd := sorted(set(weights) ^ set(owners["weights"])):
        raise ValueError(f"{checkpoint}: does not fit the policy: {len(odd)} tensors differ, such as {odd[0]}")
    for name, parameter in weights.items():
        value = owners["weights"][name].get_tensor(name)
        if zero3.is_apart(parameter):
            zero3.put_weight(parameter, value)
        else:
            parameter.copy_(_placed(value, parameter))
    if optimiser is not None:
        optimiser.state.clear()
        for entry, opened in owners["optimiser"].items():
            name, _, key = entry.rpartition("/")
            parameter, value = weights[name], opened.get_tensor(entry)
            if zero3.is_apart(parameter):
                zero3.put_moment(parameter, key, value)
                continue
            # A moment lies where its parameter lies; AdamW keeps its count of steps on the CPU.
            optimiser.state[parameter][key] = value if key == "step" else _placed(value, parameter)
    state: dict[str, Any] = json.loads((checkpoint / "state.json").read_bytes())
    return state


def _placed(value: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """A whole tensor on the device of `like`, and sharded as it is: each rank takes its part of what it has read."""
    if isinstance(like, DTensor):
        return distribute_tensor(value.to(like.device), like.device_mesh, like.placements, src_data_rank=None)
    return value.to(like.device)
