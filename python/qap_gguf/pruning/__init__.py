"""Scores, signals and selection over the rows of an encoded image."""
