"""Opening models, their families and structure, and running them block by block."""
