"""The recommender as a service: HTTP in front, micro-batches behind, a catalogue that changes while it runs."""
