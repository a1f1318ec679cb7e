#!/usr/bin/env bash
# A run on this node, or this node's part of a run on several.
#
#   recipes/launch/torchrun.sh recipes/x.yaml key=value ...                                     one node
#   NODES=4 NODE=0 HEAD=node1 recipes/launch/torchrun.sh recipes/x.yaml key=value ...           on each of four
#
# NODE: this one's number, from 0; HEAD: number 0, by a name or address that all reach it by; PORT there. All nodes see
# the same recipe, data and output folder. GPUS: ranks on this node, by default one for each GPU that CUDA_VISIBLE_DEVICES
# leaves, or one.
# RESTARTS (one node): how often the ranks are started again, from the last checkpoint, where one of them fails.
#
# SIGUSR1, SIGTERM, Ctrl-C or a closed terminal, on any of the nodes: all ranks stop together, with a checkpoint, and the
# same command goes on from it. The signal goes to the ranks themselves: torchrun would die of SIGUSR1, and after the
# others it would leave them 30 seconds. Under nohup a closed terminal stops nothing.
set -uo pipefail
if [ -n "${CUDA_VISIBLE_DEVICES+set}" ]; then # nvidia-smi lists the others too
    gpus=${GPUS:-$(tr , '\n' <<<"$CUDA_VISIBLE_DEVICES" | grep -c .)}
else
    gpus=${GPUS:-$(nvidia-smi --list-gpus 2>/dev/null | wc -l)}
fi
((gpus > 0)) || gpus=1
if [ "${NODES:-1}" = 1 ]; then
    where=(--standalone --max-restarts "${RESTARTS:-0}")
    export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 # ranks that are started again must not meet the dead ones in it
else
    where=(--nnodes "$NODES" --node-rank "${NODE:-${SLURM_PROCID:?NODE, the number of this node, from 0}}")
    where+=(--master-addr "${HEAD:?the name or address of node 0}" --master-port "${PORT:-29400}")
fi
asked='' told=''
trap 'asked=USR1 told=USR1' USR1
trap 'asked=TERM told=TERM' TERM
trap 'asked=TERM told=HUP' HUP # not under nohup: what a shell was started to ignore it does not trap
# A terminal gives Ctrl-C to torchrun and the ranks as well. They do not hear it: what a shell puts in the background
# ignores it, and torchrun is told to leave that so.
trap 'asked=TERM told=INT' INT
(
    trap '' HUP # torchrun would die of it, under nohup too
    exec "${PYTHON:-python}" -m torch.distributed.run "${where[@]}" --signals-to-handle SIGTERM,SIGQUIT \
        --nproc-per-node "$gpus" -m unirg train "$@"
) &
torchrun=$!
while kill -0 "$torchrun" 2>/dev/null; do
    if [ -z "$asked" ]; then
        wait "$torchrun" # until it ends, or a signal comes
    else
        parent=$torchrun
        # PYTHON may be a container's own process.
        while child=$(pgrep -o -P "$parent" -f torch.distributed.run); do parent=$child; done
        ranks=$(pgrep -P "$parent")
        while [ -n "$ranks" ]; do
            # Again and again: those that have only just started may not have heard it.
            # shellcheck disable=SC2086 # a list of numbers
            kill "-$asked" $ranks 2>/dev/null || break
            sleep 1
        done
        kill -TERM "$parent" 2>/dev/null # or it would start the ranks again, where it may
        wait "$torchrun"
    fi
done
wait "$torchrun"
status=$?
if [ -n "$told" ] && ((status)); then
    status=$((128 + $(kill -l "$told")))
    echo "$0: stopped by SIG$told, which torchrun calls a failure; the same command goes on" >&2
fi
exit "$status"
