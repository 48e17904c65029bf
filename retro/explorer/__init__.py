"""The explorer: a local page on which a run writes with its sources beside it, and its database is searched."""
