"""`python -m sparse_prune` is the command line."""

from .cli import main

main()
