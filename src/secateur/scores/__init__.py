"""Redundancy scores of blocks and importance scores of their units, one file per way of measuring."""
