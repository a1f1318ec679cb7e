"""Starts of a run's stages that cost no imports: every start is a fork of this process, which has made them all.

Lines of JSON come on standard input: `arguments` (RUN STAGE ...), `log` and `folder` to run in; `signal`, which the new
process sends itself after every `after` steps, before their evaluation and their line in the log; `file_bytes`, the
largest file that it may write. The answers are the new process's number, and, when it has ended, its status as
`os.wait` gives it.
"""

import json
import os
import resource
import runpy
import signal
import sys
import traceback
import warnings
from typing import Any

import unirg.evaluation.run
import unirg.grpo.loop
import unirg.sft
import unirg.stages
import unirg.vision  # noqa: F401 - that is what this process is for
from unirg.steps import Steps


def signal_itself(number: int, after: int) -> None:
    train, steps = Steps.train, []

    def counted(self: Steps, *arguments: Any) -> None:
        train(self, *arguments)
        steps.append(1)
        if len(steps) == after:
            os.kill(os.getpid(), number)

    Steps.train = counted  # type: ignore[method-assign]


def child(request: dict[str, Any]) -> int:
    log = os.open(request["log"], os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(log, 1)
    os.dup2(log, 2)
    os.chdir(request["folder"])
    if "signal" in request:
        signal_itself(request["signal"], request["after"])
    if "file_bytes" in request:
        resource.setrlimit(resource.RLIMIT_FSIZE, (request["file_bytes"], request["file_bytes"]))
    sys.argv = ["unirg.stages", *request["arguments"]]
    warnings.simplefilter("ignore", RuntimeWarning)  # the module is loaded already, as it must be
    try:
        runpy.run_module("unirg.stages", run_name="__main__")
    except SystemExit as left:
        return int(left.code or 0)
    except BaseException:
        traceback.print_exc()
        return 1
    return 0


signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored where the tests run in a script's background
for line in sys.stdin:
    number = os.fork()
    if number == 0:
        status = child(json.loads(line))
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)
    print(number, flush=True)
    print(os.waitpid(number, 0)[1], flush=True)
os._exit(0)
