r"""FAISS' factory strings: which index to make, and what is inside one.

The index trades memory and time for accuracy, and a FAISS factory string names the bargain. For $n$ keys
of $d$ features:

* `Flat` keeps every key whole, in $4d$ bytes (1536 for $d = 384$), and compares the query with all $n$: exact.
* `IVF256,PQ64` (the tutorial's) sorts the keys into 256 lists by nearest centroid (IVF, an inverted file)
  and searches the `n_probe` lists nearest to the query, 8 of them: $n/32$ keys instead of $n$. What is
  lost are neighbors in lists that are not searched. Product quantization (PQ) cuts a key into 64 parts of 6
  features and stores for each part the number of the nearest of 256 centroids: 64 bytes instead of
  1536. What is lost is the order of neighbors that are almost equally far; so four times as many as are
  wanted are found by their codes, and those whose keys are nearest are taken. The keys stay on disk.
* `OPQ64_256,IVF65536_HNSW32,PQ64` first rotates the keys so that PQ loses less, and finds the lists
  through a graph (HNSW), because comparing with 65,536 centroids would itself take long.
"""

from __future__ import annotations

import math
import re

import faiss

from retro.errors import InvalidOption

KMEANS_ITERATIONS = 10  # FAISS does 25; recall at 10 was no lower after 10, in half the time
ROTATION_KEYS = 1 << 14  # that OPQ learns its rotation from; FAISS takes four times as many, in four times the time
GRAPH_BREADTH = 64  # of the walk from list to list; FAISS' 16 puts 5% of the keys into a list that is not the nearest
EXACT_UP_TO = 50_000  # chunks; brute force over these takes no longer than embedding the queries
KEYS_PER_LIST = 32  # to learn a list's centroid from
MOST_LISTS = 1 << 24  # FAISS' guidelines end at 2^20; an empty index of more takes a gigabyte


def choose_index(n_chunks: int, d_emb: int) -> str:
    """A FAISS factory string for a number of chunks: exact while that is cheap, then compressed."""
    if n_chunks <= EXACT_UP_TO:
        return "Flat"
    # About 4 sqrt(n) lists, as FAISS' guidelines have it, as a power of two.
    n_lists = 1 << min(20, round(math.log2(4 * math.sqrt(n_chunks))))
    code_size = max(m for m in range(1, 65) if d_emb % m == 0)
    if n_chunks <= 5_000_000:
        return f"IVF{n_lists},PQ{code_size}"
    return f"OPQ{code_size},IVF{n_lists}_HNSW32,PQ{code_size}"


def n_lists_of(factory: str) -> int:
    """Lists of the index that a factory string describes; 0 if it has none."""
    found = re.search(r"IVF(\d+)", factory)
    return int(found[1]) if found else 0


def fall_back_to_flat(factory: str, d_emb: int, n_train: int) -> tuple[str, str]:
    """The factory string to use, and a note: with fewer keys than centroids to learn, exact search takes its place.

    Raises `InvalidOption` if FAISS knows no such string.
    """
    if (needed := prepare_training(new_index(d_emb, factory))) <= n_train:
        return factory, ""
    note = f"{factory} has {needed} centroids to learn, but there are {n_train} keys: the index is exact instead"
    return "Flat", note


def new_index(d_emb: int, factory: str) -> faiss.Index:
    """An empty index. Raises `InvalidOption` if FAISS knows no such string, or for more than `MOST_LISTS`."""
    if n_lists_of(factory) > MOST_LISTS:
        raise InvalidOption("index", factory, f"has more than {MOST_LISTS} lists")
    try:
        return faiss.index_factory(d_emb, factory)
    except (RuntimeError, MemoryError) as error:
        reason = reason_of(str(error))
        raise InvalidOption("index", factory, f"is no FAISS index for keys of {d_emb} features: {reason}") from None


def reason_of(message: str) -> str:
    """What is wrong, in a line, of a message of FAISS' that has its function, file and line around it."""
    line = re.sub(r"^.*?Error in .* at \S+:\d+: (Error: )?| failed in .*", "", " ".join(message.split()))
    return line[:160]


def taking_our_ids(index: faiss.Index) -> faiss.Index:
    """An index whose keys have ids of our choice: lists have, any other gets a map from its numbers to ours."""
    if ivf_of(index) is None and not isinstance(index, faiss.IndexIDMap2):
        return faiss.IndexIDMap2(index)
    return index


def inside_of(index: faiss.Index) -> faiss.Index:
    """The index below the map from its numbers to our offsets."""
    outer = faiss.downcast_index(index)  # `index` stays, because it owns what this one points to
    return faiss.downcast_index(outer.index) if isinstance(outer, faiss.IndexIDMap2) else outer


def parameters_for(index: faiss.Index, selector: faiss.IDSelector) -> faiss.SearchParameters:
    """What has a search of this index find only keys that `selector` lets through."""
    if (ivf := ivf_of(index)) is not None:
        return faiss.SearchParametersIVF(sel=selector, nprobe=ivf.nprobe)
    if isinstance(inside_of(index), faiss.IndexHNSW):
        return faiss.SearchParametersHNSW(sel=selector)
    return faiss.SearchParameters(sel=selector)


def ivf_of(index: faiss.Index) -> faiss.IndexIVF | None:
    """The inverted lists inside an index, if it has any."""
    try:
        return faiss.downcast_index(faiss.extract_index_ivf(index))
    except RuntimeError:
        return None


def prepare_training(index: faiss.Index) -> int:
    """Set how an index learns; returns the most centroids that a part of it learns from its training keys."""
    needed = [0]
    if isinstance(index, faiss.IndexPreTransform):
        for number in range(index.chain.size()):
            rotation = faiss.downcast_VectorTransform(index.chain.at(number))
            if isinstance(rotation, faiss.OPQMatrix):
                rotation.max_train_points = ROTATION_KEYS
    if (ivf := ivf_of(index)) is not None:
        needed.append(ivf.nlist)
        _set_clustering(ivf.cp)
    # Codes are those of the lists, of a graph's keys, or of what lies below a rotation. `index` stays, because it owns
    # what `part` points to.
    part = index if ivf is None else ivf
    while name := next((name for name in ("index", "base_index", "storage") if hasattr(part, name)), ""):
        part = faiss.downcast_index(getattr(part, name))
    if hasattr(part, "do_polysemous_training"):
        # Reorders the codes for a filter that is not used here, at ten times the cost of the rest.
        part.do_polysemous_training = False
    if (pq := getattr(part, "pq", None)) is not None:
        needed.append(pq.ksub)
        _set_clustering(pq.cp)
    return max(needed)


def _set_clustering(parameters: faiss.ClusteringParameters) -> None:
    parameters.niter = KMEANS_ITERATIONS
    # FAISS asks for 39 keys a centroid and warns below that; it is silenced, recall tells.
    parameters.min_points_per_centroid = 1


def set_n_probe(index: faiss.Index, n_probe: int) -> None:
    """Search `n_probe` lists, where the index has lists; a graph over them is walked broadly enough to find these."""
    if (ivf := ivf_of(index)) is not None:
        ivf.nprobe = min(n_probe, ivf.nlist)
        if isinstance(graph := faiss.downcast_index(ivf.quantizer), faiss.IndexHNSW):
            graph.hnsw.efSearch = max(GRAPH_BREADTH, 2 * ivf.nprobe)
