"""Turning a history into items: the trie of semantic IDs and the beam search that walks it."""
