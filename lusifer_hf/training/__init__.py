"""Training of both stages: alignment, then contrastive representation learning."""
