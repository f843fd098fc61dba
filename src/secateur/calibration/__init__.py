"""What the model does with text: token windows, the walk over the blocks, running statistics."""
