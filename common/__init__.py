"""Shared by data, training and the scripts. Imports nothing else from this repository."""
