"""What pruning costs and saves: operations, bytes and time."""
