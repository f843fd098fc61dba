"""What a decoder looks like, and how it is opened."""
