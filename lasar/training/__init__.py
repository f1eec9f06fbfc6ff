"""The one training loop, its checkpoints, and the losses."""
