"""SLURM's commands, played by scripts: what recipes/launch/slurm.sbatch needs of them, and no more."""

from pathlib import Path

SRUN = """#!/usr/bin/env bash
# Starts a command on nodes, passes signals on, ends with the largest status.
while [[ $1 == --* ]]; do
    [ "$1" != --nodelist ] || list=$2
    shift 2
done
tasks=() status=0
for node in ${{list//,/ }}; do
    SLURM_PROCID=${{#tasks[@]}} SLURMD_NODENAME=$node {there} "$@" &
    tasks+=($!)
done
trap 'kill -USR1 "${{tasks[@]}}"' USR1
trap 'kill -TERM "${{tasks[@]}}"' TERM
for task in "${{tasks[@]}}"; do
    while kill -0 "$task" 2>/dev/null; do wait "$task"; done
    wait "$task" || {{ s=$?; ((s > status)) && status=$s; }}
done
exit "$status"
"""
SCONTROL = """#!/usr/bin/env bash
if [ "$1" = requeue ]; then echo "$2" >>requeued; else tr , '\\n' <<<"$3"; fi
"""


def write_commands(folder: Path, there: str = "") -> None:
    """Puts `srun` and `scontrol` into the folder. `there` comes before a command that is started on `$node`; without it
    all nodes are this one. `scontrol requeue` writes the job's number to the file `requeued`."""
    for name, text in (("srun", SRUN.format(there=there)), ("scontrol", SCONTROL)):
        (folder / name).write_text(text, encoding="utf-8")
        (folder / name).chmod(0o755)
