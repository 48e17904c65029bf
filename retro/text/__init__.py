"""Text: documents with names and boundaries, the split into training and held-out ones, tokens."""
