"""`python -m m1` is the same as the `m1` command."""

from m1.cli import main

main()
