"""The language model and what LASAR adds to it."""
