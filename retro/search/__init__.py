"""Search: the keys of all chunks, and the FAISS index over them: chosen, filled, searched, measured, changed."""
