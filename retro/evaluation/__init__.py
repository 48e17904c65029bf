"""What held-out text costs a model with and without retrieval: measured, filtered for copies, and shown."""
