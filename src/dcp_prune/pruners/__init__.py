"""The methods: one paper, one file. `dcp_prune.registry` finds them by name."""
