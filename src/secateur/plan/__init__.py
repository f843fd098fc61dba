"""The decision as data: amounts, units, steps, the plan file."""
