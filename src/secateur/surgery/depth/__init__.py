"""Edits of whole blocks."""
