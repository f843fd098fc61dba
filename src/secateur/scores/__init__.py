"""How much each block matters: redundancy scores of METHODS, one file per way of measuring."""
