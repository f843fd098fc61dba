"""Recipes, their stages, and studies: a grid of runs over a queue."""
