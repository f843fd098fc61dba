"""Recipes, their stages, and studies: grids of runs that go through a queue."""
