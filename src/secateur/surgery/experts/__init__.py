"""Edits of mixtures: fewer experts."""
