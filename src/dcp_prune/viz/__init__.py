"""Pictures of what a pruner did: which tokens it kept, and who absorbed whom."""
