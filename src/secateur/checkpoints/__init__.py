"""Saving, checking and uploading checkpoint folders."""
