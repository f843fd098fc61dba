"""What lies where in the folders of runs and studies."""

RECIPE, STATE = "recipe.yaml", "state.json"
PLAN, CUT, HEALED = "plan.json", "cut", "healed"
SPEEDS, SAMPLES = "bench.jsonl", "generations.json"
CELLS, DENSE, SCORES = "cells", "dense", "scores.json"
"""In the folder of a study: its cells, each a run; what was measured of the dense model; its scores."""
