"""Text sources, local files, windows of tokens."""
