"""Why the model believes what it does: attention, beliefs, ablations. Every analysis returns a table."""
