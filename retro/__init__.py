"""RETRO, the Retrieval-Enhanced Transformer (Borgeaud et al., 2021, arXiv:2112.04426), in PyTorch.

A language model that looks things up while it writes. The text is cut into chunks. A frozen BERT
turns each chunk into a vector, a FAISS index finds the chunks that are nearest to it, and the
transformer reads those neighbors, with the text that followed them, while it predicts the next
chunk::

    text --> tokens --> chunks --> frozen BERT --> FAISS: key -> chunk + continuation
                          |                                        |
                          |        nearest neighbors, precomputed  |
                          v                                        v
                     decoder  <--- chunked cross-attention --- encoder of neighbors

The modules, in reading order:

* `retro.corpus` documents with boundaries, as one array of tokens (`retro.tokenizer` makes them)
* `retro.bert_embeddings` chunks of text to vectors
* `retro.keys` the vectors of all chunks, on disk
* `retro.faiss_index` the FAISS index over them: chosen, filled in parts, searched, and how good it is
* `retro.database` vectors to nearest chunks; `retro.living` adds documents and takes them out
* `retro.model` the transformer
* `retro.dataset` samples with precomputed neighbors
* `retro.sample` text from the model, retrieving as it writes
* `retro.evaluate` what retrieval brings, in bits per byte; `retro.report` shows it token by token
* `retro.train` the loop, and the script that does the main job

Around them, `retro.artifacts` writes files that know what made them, `retro.shards` keeps what is finished of long
work, `retro.weights` reads and writes checkpoints, `retro.distributed` is for several processes, `retro.plan` tells
what a corpus will take, `retro.presets` holds two complete set-ups, and `retro.commands` the command lines.
Importing `retro` imports none of these.
"""

__version__ = "0.1.0"
