"""Methods that try others."""
