"""How sure a measured number is: whatever is asked about one image belongs together."""
