"""Methods × amounts × ways of healing on one model: a grid of runs, a queue over the devices, one folder per cell."""
