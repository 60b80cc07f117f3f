"""Training: data, stages of the recipe, DeepSpeed, checkpoints, metrics."""
