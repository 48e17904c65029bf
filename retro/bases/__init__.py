"""Pretrained language models: where they come from, what they are made of, and how they can read more."""
