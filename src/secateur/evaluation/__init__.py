"""What is left: measures of quality, dense and pruned always in one run."""
