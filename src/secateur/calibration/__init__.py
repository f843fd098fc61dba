"""Walking a model over token windows, block by block, and statistics of its activations and gradients."""
