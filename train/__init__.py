"""The contrastive trainer: towers, objectives, data-parallel loop, checkpoints and zero-shot evaluation."""
