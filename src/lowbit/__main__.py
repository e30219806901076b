"""`python -m lowbit` is the command `lowbit`."""

from __future__ import annotations

from lowbit.cli import main

if __name__ == "__main__":
    main()
