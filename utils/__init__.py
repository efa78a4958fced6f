"""Bottom layer: config, distributed runtime, randomness, checkpoints, trainer, tracking, images."""
