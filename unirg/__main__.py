"""`python -m unirg`: the command line, so that torchrun can start it (`torchrun ... -m unirg train RECIPE`)."""

from unirg.cli import main

if __name__ == "__main__":
    raise SystemExit(main())
