"""From a trained checkpoint to images."""
