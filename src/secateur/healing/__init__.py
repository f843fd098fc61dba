"""Training what a cut left: one loop for every kind of healing and for the networks that replace blocks."""
