"""Your own text: from a folder of files to samples that name their sources.

Run it as `python examples/own_text.py FOLDER [DATA]`. `FOLDER` holds texts (`.txt`, `.md`, `.py` and the like,
or `.jsonl` with a `text` in each line); a few hundred kilobytes take two cores a minute or two. The corpus, the
database and the samples go to the folder `DATA` (`mydata` if it is left out), models to `logs`. So small a
model learns spelling and layout, not sense: set the environment variable `STEPS` for more.
"""

import os
import sys

from retro import (
    BERTChunkEmbeddings,
    DatabaseConfig,
    Dataset,
    RetroIndex,
    SampleConfig,
    Sampler,
    TrainConfig,
    audit,
    build_corpus,
    build_database,
    build_dataset,
    load_model,
)
from retro.train import train

STEPS = int(os.environ.get("STEPS", "150"))  # of training
CHUNK_LEN = 16  # tokens; with subwords about 40 characters

folder, data = sys.argv[1], (sys.argv[2:] or ["mydata"])[0]

# **1. Documents become tokens.** Each file is a document. A tenth of the text, in whole documents, is held out: it
# is neither trained on nor retrieved from. `bpe:1024` learns a vocabulary of 1,024 subwords from the rest.
corpus = build_corpus([folder], f"{data}/corpus", tokenizer="bpe:1024")
n_documents, n_tokens = len(corpus.documents), len(corpus.tokens)
print(f"{n_documents} documents, {corpus.n_train} of them to learn from; {n_tokens:,} tokens")

# **2. Chunks become the keys of a database.** The frozen BERT turns each chunk into a vector, and the index keeps the
# vectors. `trim=False`, because subwords do not cut words in two as the tutorial's characters do.
bert = BERTChunkEmbeddings("cpu", trim=False)
manifest = build_database(CHUNK_LEN, config=DatabaseConfig(index="auto"), corpus=corpus, data_path=data, bert=bert)
print(f"{manifest['n_chunks']:,} chunks in {manifest['index']}, recall {manifest['recall']}")

# **3. Samples get their neighbors**, once, before training. A neighbor never comes from the document of the chunk that
# looks it up (or, where there is one document only, from its sample); `audit` counts the neighbors that would give
# away text still to be predicted.
index = RetroIndex(CHUNK_LEN, n_neighbors=2, corpus=corpus, data_path=data, bert=bert)
build_dataset(CHUNK_LEN, chunks_per_sample=8, corpus=corpus, data_path=data, index=index)
print(audit(Dataset(f"{data}/retro_train_dataset.jsonl", corpus)))

# **4. The model learns.** The vocabulary and `chunk_len` come from the data, the rest of the shape from here. The run's
# folder below `logs/` is named after everything that shapes it, so a second call finds the first.
shape = dict(n_layers=4, ca_layers=(1, 3), n_heads=4, d_k=32, n_encoder_layers=2, encoder_ca_layers=(1,))
config = TrainConfig(batch_size=8, steps=STEPS, lr=3e-3, schedule="cosine", warmup=20, clip=1.0)
run, summary = train(data_path=data, name="own_text", config=config, model_shape=shape, device="cpu")
on, off = summary["valid_bpb"], summary["valid_bpb_without_retrieval"]
print(f"held-out text: {on} bits per byte, {off} with retrieval switched off")

# **5. It writes, and says what it read.** The prompt is the beginning of the held-out text. Each finished chunk, of the
# prompt and of the sample, looks up its neighbors; the chunk after it reads them.
sampler = Sampler("cpu", load_model(run), corpus, CHUNK_LEN, index=index)
prompt = corpus.valid[:200]
print(f"\n{prompt}|{sampler.sample(prompt, 4 * CHUNK_LEN, SampleConfig(temperature=0.8, top_p=0.9))}\n")
for u, neighbors in enumerate(sampler.neighbors):
    for neighbor in neighbors:
        source = f"{neighbor.document}, token {neighbor.offset:,}, distance {neighbor.distance:.2f}"
        print(f"chunk {u} found {source}: {' '.join(neighbor.text.split())[:80]}")
