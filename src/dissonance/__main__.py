"""`python -m dissonance` is the `dissonance` command."""

from dissonance.cli import main

main()
