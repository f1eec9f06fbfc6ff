"""Semantic IDs: quantizers, the catalogue of unique codes, and how good the codes are."""
