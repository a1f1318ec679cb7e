"""What `unirg` runs, and `python -m unirg`, which torchrun can start (`torchrun ... -m unirg train RECIPE`)."""

import os
import sys
from typing import NoReturn

from unirg.cli import main


def run() -> NoReturn:
    """Runs the command line and ends the process, as the end of one of several ranks must be."""
    status = main()
    if "WORLD_SIZE" in os.environ:  # other commands start without torch
        from unirg.process import end

        end(status)
    sys.exit(status)


if __name__ == "__main__":
    run()
