"""One job per command or API function: prepare, cost, run."""
