"""The training loop shared by healing recipes and replacement modules."""
