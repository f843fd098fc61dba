"""Perplexity, tasks, stability and speed of pruned models, next to the dense one."""
