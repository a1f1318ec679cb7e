"""`python -m unirg`: the command line, so that torchrun can start it (`torchrun ... -m unirg train RECIPE`)."""

import os

from unirg.cli import main

if __name__ == "__main__":
    status = main()
    if "WORLD_SIZE" in os.environ:  # other commands start without torch
        from unirg.process import end

        end(status)
    raise SystemExit(status)
