r"""The way of the ecosystem: a RETROfitted model as a causal language model of Hugging Face's transformers.

It is called, generates, is saved and shared as those are. `generate` retrieves whenever a chunk is complete, in
batches with padding on the left too; pipelines, streamers and the harness of EleutherAI (lm-eval) take the model as
it is:

    model = RetrofitForCausalLM.from_pretrained("logs/run", index=RetroIndex(data_path="data"))
    prompt = model.tokenizer("def forward(self", return_tensors="pt")
    print(model.tokenizer.decode(model.generate(**prompt, max_new_tokens=100)[0]))

Chunks are counted from the first token of each text that is no padding. A chunk's query is its text without special
tokens; of a chunk that has no other tokens nothing is retrieved. Without an index, and without neighbors that are
given, the model is its base, bit for bit.

A cache of transformers keeps what self-attention reads of the text so far. What the next tokens read of neighbors is
kept beside it, as an attribute of the same object (`Text`), so that two texts that are written at once do not mix.

Shapes: B texts, T tokens of a call, C whole chunks of the longest text, m tokens of a chunk; K neighbors of a chunk,
R tokens of a neighbor.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Sequence
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoTokenizer, Cache, DynamicCache, GenerationMixin, PreTrainedModel
from transformers.generation import GenerationMode
from transformers.modeling_outputs import CausalLMOutputWithPast

from retro.cached_text import TEXT, Text, places_of_texts, require_no_gap, require_usable
from retro.database import NO_TOKEN, RetroIndex
from retro.errors import InvalidOption
from retro.model_card import model_card
from retro.retrofit import Retrofit
from retro.runs.checkpoints import load_model, save_model
from retro.text.base_model import base_sha256
from retro.text.pretrained import naming_what_cannot_be_loaded
from retro.text.tokenizer import train_tokenizer

FILES = ["config.json", "model.safetensors"]  # what a model is loaded from


class RetrofitForCausalLM(PreTrainedModel, GenerationMixin):
    """A `Retrofit` that is called as a causal language model of transformers is.

    * `retrofit` is the model
    * `index` retrieves neighbors; left out, they are given with each call, or nothing is read. `model.index = None`
      switches retrieval off, another index on

    `config` and `generation_config` are the base's. Raises `InvalidOption` for an index that is cut into other chunks,
    or whose tokens are not the base's.
    """

    base_model_prefix = "retrofit"
    main_input_name = "input_ids"
    _supports_sdpa = _supports_flash_attn = _supports_flex_attn = _supports_attention_backend = True  # if the base does
    _is_stateful = True  # so that transformers refuses to guess tokens ahead, which would have to be taken back
    _supported_generation_modes = (
        GenerationMode.GREEDY_SEARCH, GenerationMode.SAMPLE, GenerationMode.BEAM_SEARCH, GenerationMode.BEAM_SAMPLE,
    )  # fmt: skip

    def __init__(self, retrofit: Retrofit, index: RetroIndex | None = None) -> None:
        super().__init__(copy.deepcopy(retrofit.base.config))  # a copy, because transformers writes into it
        self.retrofit = retrofit
        self.index = index
        self.generation_config = copy.deepcopy(retrofit.base.generation_config)
        self._taken = set(inspect.signature(retrofit.base.forward).parameters)
        self.post_init()
        self.eval()

    @property
    def base(self) -> PreTrainedModel:
        """The frozen base."""
        return self.retrofit.base

    @property
    def index(self) -> RetroIndex | None:
        """What retrieves, if anything does."""
        return self._index

    @index.setter
    def index(self, index: RetroIndex | None) -> None:
        if index is not None:
            _require_fit(self.retrofit, index)
            backend = getattr(index.corpus.tokenizer, "backend", None)
            added = backend.get_added_tokens_decoder() if backend is not None else {}
            self._special = {number for number, token in added.items() if token.special}
        self._index = index

    @cached_property
    def tokenizer(self) -> Any:
        """The base's tokenizer, with its special tokens. Raises `InvalidOption` where the base has none."""
        with naming_what_cannot_be_loaded("base", str(self.name_or_path), "tokenizer", self.retrofit.config.base):
            return AutoTokenizer.from_pretrained(self.name_or_path)

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        neighbors: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int = 0,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast:
        """Logits for the token after each token, and the loss of `labels`, as every causal model of transformers gives.

        * `input_ids` are tokens (B, T): whole texts, or what follows those of the cache
        * `attention_mask` (B, tokens so far) is 0 for padding, on the left or on the right; left out, there is none
        * `position_ids`, `past_key_values`, `labels`, `use_cache`, `logits_to_keep` and whatever else is given are what
          the base takes
        * `neighbors` (B, C, K, R) are those of the chunks of each text, from its first one on, tokens or -1; they
          take the place of those that the index would find, and chunks that they do not have read nothing

        Where several tokens follow a cache, hidden states and attentions are not among what is returned. Raises
        `InvalidOption` for padding between tokens, and for a cache that this model has not written, or that was
        changed since.
        """
        given = {
            "attention_mask": attention_mask, "position_ids": position_ids, "past_key_values": past_key_values,
            "labels": labels, "use_cache": use_cache, "logits_to_keep": logits_to_keep, "return_dict": True,
        }  # fmt: skip
        kwargs |= {name: value for name, value in given.items() if value is not None and name in self._taken}
        text = getattr(past_key_values, TEXT, None)
        if text is None and neighbors is None and self.index is None:
            return self.base(input_ids=input_ids, **{"return_dict": True, **kwargs})
        if past_key_values is not None:
            require_usable(past_key_values, text, self.retrofit, len(input_ids))
        if text is not None:
            return self._go_on(text, input_ids, neighbors, kwargs)
        return self._begin(input_ids, neighbors, kwargs)

    def _begin(self, x: Tensor, neighbors: Tensor | None, kwargs: dict[str, Any]) -> CausalLMOutputWithPast:
        """A pass over whole texts `x` (B, T)."""
        starts, lengths = places_of_texts(x, kwargs.get("attention_mask"))
        ret = self._neighbors_of(x, starts, lengths, neighbors)
        cache = kwargs.get("past_key_values")
        if cache is None and kwargs.get("use_cache", getattr(self.config, "use_cache", True)):
            kwargs["past_key_values"] = cache = DynamicCache(config=self.config.get_text_config(decoder=True))
        if cache is None:
            with self.retrofit.reads(x, ret, torch.tensor(starts, device=x.device)):
                return self.base(input_ids=x, **kwargs)
        ends_early = any(start + n < x.shape[1] for start, n in zip(starts, lengths, strict=True))
        text = Text(self.retrofit, starts, ends_early, x.device)
        with text.decoding.begins(x, ret):
            output = self.base(input_ids=x, **kwargs)
        text.remember(x, self._n_remembered)
        setattr(cache, TEXT, text)
        return output

    def _go_on(self, text: Text, x: Tensor, neighbors: Tensor | None, kwargs: dict[str, Any]) -> CausalLMOutputWithPast:
        """Passes over the next tokens `x` (B, T) of texts: a new one wherever a chunk is complete."""
        T, seen = x.shape[1], text.decoding.n_seen
        mask, positions, keep = (kwargs.pop(n, None) for n in ("attention_mask", "position_ids", "logits_to_keep"))
        require_no_gap(text, mask if T > 1 else None)  # to a single token `generate` adds no padding
        labels = kwargs.pop("labels", None)
        outputs, done = [], 0
        while done < T:
            n = min(T - done, text.n_next())
            tokens = x[:, done : done + n]
            own = {} if mask is None else {"attention_mask": mask[:, : seen + done + n]}
            own |= {} if positions is None else {"position_ids": positions[..., done : done + n]}
            own |= {"logits_to_keep": keep} if keep is not None and n == T else {}
            with text.decoding.goes_on(n, *self._due(text, tokens, neighbors)):
                outputs.append(self.base(input_ids=tokens, **own, **kwargs))
            text.remember(tokens, self._n_remembered)
            done += n
        output = outputs[-1]
        if len(outputs) > 1:
            logits = torch.cat([part.logits for part in outputs], dim=1)
            output = CausalLMOutputWithPast(logits=logits[:, -keep:] if keep else logits)
            output.past_key_values = outputs[-1].past_key_values
        if labels is not None:
            output.loss = self.base.loss_function(output.logits, labels, vocab_size=output.logits.shape[-1])
        return output

    @property
    def _n_remembered(self) -> int:
        """The last tokens of a text that telling the text of its unfinished chunk takes."""
        return self.retrofit.chunk_len + (0 if self.index is None else self.index.corpus.tokenizer.context)

    def _neighbors_of(self, x: Tensor, starts: list[int], lengths: list[int], given: Tensor | None) -> Tensor:
        """Neighbors (B, C, K, R) of the whole chunks of texts in `x` (B, T); -1 where a text has none."""
        m = self.retrofit.chunk_len
        whole = [(b, u) for b, n in enumerate(lengths) for u in range(n // m)]
        C = max((u + 1 for _, u in whole), default=0)
        if given is not None:
            ret = torch.full((len(x), C, *given.shape[2:]), NO_TOKEN, device=x.device)
            n = min(C, given.shape[1])
            ret[:, :n] = given[:, :n].to(x.device)
            has = torch.tensor(lengths, device=x.device)[:, None] // m > torch.arange(C, device=x.device)  # (B, C)
            return ret.masked_fill(~has[..., None, None], NO_TOKEN)
        assert self.index is not None
        tokens = x.tolist()
        texts = [tokens[b][start : start + n] for b, (start, n) in enumerate(zip(starts, lengths, strict=True))]
        found = self._retrieve([(texts[b][: u * m], texts[b][u * m : u * m + m]) for b, u in whole], x.device)
        ret = torch.full((len(x), C, *found.shape[1:]), NO_TOKEN, device=x.device)
        if whole:
            ret[tuple(torch.tensor(whole, device=x.device).T)] = found
        return ret

    def _due(self, text: Text, tokens: Tensor, given: Tensor | None) -> tuple[Tensor, Tensor] | tuple[None, None]:
        """Neighbors (n, K, R) of chunks that the first of the next `tokens` (B, L) completes, and their texts."""
        if not (completed := text.completed()):
            return None, None
        rows = torch.tensor([b for b, _ in completed], device=tokens.device)
        m = self.retrofit.chunk_len
        if given is not None:
            ret = torch.full((len(rows), *given.shape[2:]), NO_TOKEN, device=tokens.device)
            for row, (b, u) in enumerate(completed):
                if u < given.shape[1]:
                    ret[row] = given[b, u]
        elif self.index is not None:
            known = torch.cat([text.last.to(tokens.device), tokens[:, :1]], dim=1)[rows].tolist()
            ret = self._retrieve([(ids[:-m], ids[-m:]) for ids in known], tokens.device)
        else:
            ret = torch.full((len(rows), 1, text.decoding.present.shape[1]), NO_TOKEN, device=tokens.device)
        return ret, rows

    def retrieve(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        """The neighbors that a call with these tokens (B, T) reads: tokens or -1, of shape (B, C, K, R).

        Raises `InvalidOption` where there is no index.
        """
        if self.index is None:
            raise InvalidOption("index", None, "retrieves nothing; give the model a RetroIndex")
        return self._neighbors_of(input_ids, *places_of_texts(input_ids, attention_mask), None)

    def _retrieve(self, chunks: Sequence[tuple[list[int], list[int]]], device: torch.device) -> Tensor:
        """Neighbors (n, K, R) of chunks: each is the tokens before it and its own."""
        index = self.index
        assert index is not None
        ret = torch.full((len(chunks), index.n_neighbors, 2 * index.chunk_len), NO_TOKEN, device=device)
        tokenizer = index.corpus.tokenizer
        plain = [[[i for i in ids if i not in self._special] for ids in chunk] for chunk in chunks]
        texts = [tokenizer.decode_after(before[-tokenizer.context :], ids) if ids else "" for before, ids in plain]
        if different := list(dict.fromkeys(filter(None, texts))):  # texts that share a prompt share its chunks
            _, offsets = index.nearest(different, index.n_neighbors)
            values = torch.from_numpy(index.values(offsets)).to(device)  # (different, K, R)
            rows = [row for row, text in enumerate(texts) if text]
            ret[rows] = values[[different.index(texts[row]) for row in rows]]
        return ret

    # What transformers asks of a model that generates.

    def prepare_inputs_for_generation(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """What the base makes of it: some bases have their own way."""
        return self.base.prepare_inputs_for_generation(*args, **kwargs)  # type: ignore[operator]

    def _reorder_cache(self, past_key_values: Cache, beam_idx: Tensor) -> Cache:
        """Go on with the likeliest texts of a beam search."""
        past_key_values.reorder_cache(beam_idx)  # type: ignore[arg-type]
        if (text := getattr(past_key_values, TEXT, None)) is not None:
            text.select(beam_idx)
        return past_key_values

    # Saved, loaded and shared.

    def save_pretrained(self, folder: str | Path, *, evaluation: str | Path | None = None, **_: Any) -> None:  # type: ignore[override]
        """Write what was added to the base, its config, which names the base, and a model card; never the base.

        * `evaluation` is the `evaluation.json` of `retro evaluate`, whose figures the card shows
        * what else transformers gives to models of its own is of no use here
        """
        config = self.retrofit.config
        config = replace(config, base_sha256=config.base_sha256 or base_sha256(self.base))
        save_model(Path(folder), self.retrofit, config)
        (Path(folder) / "README.md").write_text(model_card(self.retrofit, config, evaluation), encoding="utf-8")

    @classmethod
    def from_pretrained(  # type: ignore[override]
        cls,
        name: str | Path,
        base: str | None = None,
        index: RetroIndex | None = None,
        device: torch.device | str = "cpu",
        revision: str | None = None,
    ) -> RetrofitForCausalLM:
        """A model that was saved or trained, put together with its base.

        * `name` is what `save_pretrained` wrote, a run or one of its checkpoints; or a name on the hub
        * `base` is the base, where it is no longer at the place that the config names
        * `index` is as above
        * `revision` is that of the hub

        Raises `InvalidOption` where there is no such model, or for a base with other weights than it was trained with.
        """
        folder = Path(name) if Path(name).is_dir() else _downloaded(str(name), revision)
        model = load_model(folder, device, base=base)
        if not isinstance(model, Retrofit):
            raise InvalidOption("name", str(name), "has no pretrained base; load it with retro.load_model")
        return cls(model, index)

    def push_to_hub(  # type: ignore[override]
        self,
        repo_id: str,
        *,
        evaluation: str | Path | None = None,
        private: bool | None = None,
        token: str | bool | None = None,
        revision: str | None = None,
        commit_message: str = "Upload what was added to the base",
        create_pr: bool = False,
    ) -> str:
        """Upload what `save_pretrained` writes to the hub, with the access that `huggingface_hub` has; returns its URL.

        * `evaluation` is as there, all others are as in `huggingface_hub`
        """
        from huggingface_hub import HfApi

        api = HfApi(token=token)
        repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
        with TemporaryDirectory() as folder:
            self.save_pretrained(folder, evaluation=evaluation)
            return str(
                api.upload_folder(
                    repo_id=repo_id,
                    folder_path=folder,
                    revision=revision,
                    commit_message=commit_message,
                    create_pr=create_pr,
                )
            )

    # Asked of the base: it has the embeddings, and all weights are there.

    def get_input_embeddings(self) -> nn.Module:
        """The base's."""
        return self.base.get_input_embeddings()

    def get_output_embeddings(self) -> nn.Module:
        """The base's."""
        return self.base.get_output_embeddings()

    def init_weights(self) -> None:
        """Nothing, where transformers would draw new readers."""

    def tie_weights(self, *args: Any, **kwargs: Any) -> None:
        """Nothing: the base's are tied, if they are."""


def _require_fit(retrofit: Retrofit, index: RetroIndex) -> None:
    """Raise `InvalidOption` unless an index has a model's chunks, and tokens that mean the same to its base."""
    if index.chunk_len != retrofit.chunk_len:
        reason = f"is the length of its chunks, but the model's have {retrofit.chunk_len} tokens"
        raise InvalidOption("index", index.chunk_len, reason)
    name, found = retrofit.base.name_or_path, index.corpus.tokenizer.sha256
    if name and (own := train_tokenizer(name, ()).sha256) != found:
        raise InvalidOption(
            "index", index.corpus.name, f"has tokens of another tokenizer (sha256 {found[:12]}) than the base {name} "
            f"({own[:12]}); build its corpus with that one"
        )  # fmt: skip


def _downloaded(name: str, revision: str | None) -> Path:
    """The folder of a model on the hub. Raises `InvalidOption` if there is none."""
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(name, revision=revision, allow_patterns=FILES))
    except (OSError, ValueError) as error:
        reason = f"is no folder with a model, and the hub did not give it ({str(error).splitlines()[0][:160]})"
        raise InvalidOption("name", name, reason) from None
