"""`python -m dcp_prune.cli`."""

from dcp_prune.cli import main

main()
