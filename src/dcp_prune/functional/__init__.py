"""Pure, batched tensor functions that the methods are made of; torch only, no state."""
