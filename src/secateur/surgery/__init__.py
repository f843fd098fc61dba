"""Edits of weights. Nothing here knows a method; plans say what to do."""
