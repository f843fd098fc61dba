"""Edits of the residual stream: rotation and slicing."""
