"""What a model is measured by on held-out windows: one file per metric."""
