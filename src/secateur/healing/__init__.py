"""Healing recipes: ways to retrain a pruned model."""
