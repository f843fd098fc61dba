"""What a command or API call does: prepare, cost, run."""
