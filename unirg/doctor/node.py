"""The node itself: versions of packages, GPUs, CPU cores and threads, memory."""

import os
import platform
import shutil
import sys
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path

import torch
from packaging.requirements import Requirement

from unirg.doctor.finding import Finding

EXTRAS = ("lora", "trl", "vllm", "zero3")
GIB = 1 << 30
SHM_GIB = 1
"""Less shared memory than this, and processes that hand tensors to each other (NCCL's, vLLM's) may die of it."""

TEMPORARY_GIB = 1
"""Less room than this for temporary files, and a compiled kernel or a worker's file may not fit."""


def check_versions() -> Iterator[Finding]:
    """Python, and every package that UniRG's metadata names, against the ranges that were tested together."""
    area = "versions"
    yield Finding(area, "ok", f"Python {platform.python_version()}, {sys.executable}")
    fine = []
    for line in metadata.requires("unirg") or []:
        required = Requirement(line)
        extra = required.marker is not None
        if required.marker is not None and not any(required.marker.evaluate({"extra": e}) for e in ("", *EXTRAS)):
            continue
        try:
            version = metadata.version(required.name)
        except metadata.PackageNotFoundError:
            if not extra:
                yield Finding(area, "fail", f"{required.name} is not installed, and {required} is needed: pip install")
            continue
        if version not in required.specifier:
            said = f"{required.name} {version} is installed; tested with {required.specifier}"
            yield Finding(area, "warn" if extra else "fail", said)
        else:
            fine.append(f"{required.name} {version}")
    yield Finding(area, "ok", ", ".join(dict.fromkeys(fine)))


def check_gpus() -> Iterator[Finding]:
    """Every GPU that torch sees computes rightly; and where there are GPUs that torch does not see, why."""
    area = "GPUs"
    devices = sorted(path.name for path in Path("/dev").glob("nvidia[0-9]*"))
    if not torch.cuda.is_available():
        if not devices and shutil.which("nvidia-smi") is None:
            yield Finding(area, "ok", "none: runs use the CPU")
        elif torch.version.cuda is None:
            what = (
                f"{', '.join(devices) or 'nvidia-smi'} is there, and torch {torch.__version__} is a build without CUDA"
            )
            yield Finding(area, "fail", f"{what}; install a CUDA build of the same version")
        else:
            hidden = os.environ.get("CUDA_VISIBLE_DEVICES")
            why = f"CUDA_VISIBLE_DEVICES is '{hidden}'" if hidden is not None else "is the driver older than CUDA's?"
            yield Finding(area, "fail", f"torch (CUDA {torch.version.cuda}) sees no GPU of {devices}: {why}")
        return
    for index in range(torch.cuda.device_count()):
        free, total = torch.cuda.mem_get_info(index)
        name = f"cuda:{index} {torch.cuda.get_device_name(index)}, {free / GIB:.0f} of {total / GIB:.0f} GiB free"
        try:
            wrong = _computes_wrongly(torch.device("cuda", index))
        except RuntimeError as error:
            yield Finding(area, "fail", f"{name}: {str(error).splitlines()[0]}; look at dmesg and nvidia-smi -q")
            continue
        if wrong:
            yield Finding(area, "fail", f"{name}: {wrong}; take it out of service")
        elif free < 0.9 * total:
            yield Finding(area, "warn", f"{name}: something else holds {(total - free) / GIB:.0f} GiB (nvidia-smi)")
        else:
            yield Finding(area, "ok", name)


def _computes_wrongly(device: torch.device) -> str:
    """What is wrong with a product of matrices on the device, in words; empty where nothing is. The entries are small
    whole numbers, so that every order of summation gives the same."""
    generator = torch.Generator().manual_seed(0)
    a, b = (torch.randint(-8, 9, (512, 512), generator=generator).float() for _ in range(2))
    difference = ((a.to(device) @ b.to(device)).cpu() - a @ b).abs().max().item()
    return f"a product of matrices is off by {difference:g}" if difference else ""


def check_cpu() -> Iterator[Finding]:
    """Cores that this process may use, and threads that would fight for them."""
    area = "CPU"
    cores = len(os.sched_getaffinity(0))
    quota = _cgroup_cores()
    usable = cores if quota is None else min(cores, quota)
    yield Finding(area, "ok", f"{usable:g} cores may be used, of {os.cpu_count()}")
    local = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    threads = torch.get_num_threads()
    if threads * local > usable + 1:
        each = max(1, int(usable // local))
        yield Finding(
            area,
            "warn",
            f"{local} x {threads} torch threads on {usable:g} cores fight for them; set OMP_NUM_THREADS={each}",
        )


def _cgroup_cores() -> float | None:
    """The control group's limit in cores; None where it sets none."""
    try:
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text(encoding="ascii").split()
    except (OSError, ValueError):
        return None
    return None if quota == "max" else int(quota) / int(period)


def check_memory() -> Iterator[Finding]:
    """Free memory, and shared memory."""
    area = "memory"
    lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
    kib = {line.split(":")[0]: int(line.split()[1]) for line in lines}
    free, total = kib["MemAvailable"] / (1 << 20), kib["MemTotal"] / (1 << 20)
    yield Finding(area, "warn" if free < 0.1 * total else "ok", f"{free:.0f} of {total:.0f} GiB are free")
    shared = Path("/dev/shm")
    if not shared.is_dir():
        yield Finding(area, "warn", "there is no /dev/shm, which NCCL and vLLM use between processes")
        return
    size = shutil.disk_usage(shared)
    text = f"/dev/shm: {size.free / GIB:.1f} of {size.total / GIB:.1f} GiB are free"
    if size.free < SHM_GIB * GIB:
        yield Finding(area, "warn", f"{text}; NCCL and vLLM may need more (in a container: --shm-size=8g)")
    else:
        yield Finding(area, "ok", text)


def check_temporary() -> Iterator[Finding]:
    """Room where Python, torch's compiler and vLLM put temporary files."""
    area, place = "disk", os.environ.get("TMPDIR", "/tmp")
    try:
        free = shutil.disk_usage(place).free / GIB
    except OSError as error:
        yield Finding(area, "fail", f"TMPDIR {place}: {error.strerror}; name a folder that exists")
        return
    text = f"{place}: {free:.1f} GiB are free for temporary files"
    if free < TEMPORARY_GIB:
        yield Finding(area, "warn", f"{text}; make room, or let TMPDIR name another folder")
    else:
        yield Finding(area, "ok", text)
