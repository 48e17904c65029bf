"""`python -m retro`: the same as `retro`."""

from retro.cli import main

if __name__ == "__main__":
    raise SystemExit(main())
