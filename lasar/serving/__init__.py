"""The recommender as a service: HTTP in front, micro-batches behind, a catalogue and histories that change while it runs."""
