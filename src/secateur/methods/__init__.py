"""What to do and in which order: one file per idea, one row per method."""
