"""Metrics over ranked lists of item indices, their uncertainty, slices, and results kept as data."""
