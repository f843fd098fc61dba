"""Reads the folders that the stages wrote, and makes one page of them."""
