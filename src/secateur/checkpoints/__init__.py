"""Folders that load where people run models."""
