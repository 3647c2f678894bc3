"""python -m sparc3: the command line."""

from sparc3.cli import main

main()
