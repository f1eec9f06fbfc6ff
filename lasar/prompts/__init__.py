"""How users, items and latent steps become tokens."""
