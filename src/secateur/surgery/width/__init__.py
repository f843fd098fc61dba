"""Edits inside blocks: heads, groups, channels."""
