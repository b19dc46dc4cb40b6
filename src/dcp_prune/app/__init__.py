"""`dcp-prune app`: see in a browser what pruning does to an image and to the answer."""
