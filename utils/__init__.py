"""Bottom layer, which knows nothing of diffusion or training: config, files, randomness, images."""
