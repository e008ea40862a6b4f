"""What data and training both stand on. Imports nothing else of this repository."""
