"""Every block its own width: what each level of each branch costs, and the choice among them for a budget."""
