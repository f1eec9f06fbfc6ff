"""From raw event files to interactions, items and their splits."""
