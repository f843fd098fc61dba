"""Edits of weights, as plans describe them. Nothing here refers to a method."""
