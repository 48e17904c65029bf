"""The card of a model on the hub: what it is, how it is loaded, what it reads, and what that brings."""

from __future__ import annotations

from pathlib import Path

from retro.config import PACKAGED_BASE, RetrofitConfig
from retro.evaluation.figures import table
from retro.retrofit import Retrofit
from retro.storage.manifests import read_manifest

ON_HUB = {PACKAGED_BASE: ("HuggingFaceTB/SmolLM2-135M-Instruct", "apache-2.0")}  # the packaged base, and its license

TEXT = """# {title}

{base} that reads what it retrieves: chunked cross-attention of [RETRO](https://arxiv.org/abs/2112.04426) in the layers
{layers}, {n_added:,} weights that were trained while the base was frozen. Here are these weights alone. They need the
base they were trained with (sha256 {sha256} of its weights{revision}), a database of chunks of {chunk_len} tokens, and
`pip install retro-lm`:

```python
from retro import RetroIndex, RetrofitForCausalLM

model = RetrofitForCausalLM.from_pretrained("THIS MODEL", index=RetroIndex(data_path="data"))
prompt = model.tokenizer("Once upon a time", return_tensors="pt")
print(model.tokenizer.decode(model.generate(**prompt, max_new_tokens=100)[0]))
```

Without an index it writes what the base writes.
{figures}"""


def model_card(retrofit: Retrofit, config: RetrofitConfig, evaluation: str | Path | None = None) -> str:
    """The text of a card, with the metadata that the hub reads.

    * `config` names the base, with its hash
    * `evaluation` is an `evaluation.json` of `retro evaluate`, whose figures are shown

    A base in a local folder is named by its hash alone. Raises `MissingArtifact` or `DamagedFile` for an `evaluation`
    that is not there, or that retro did not write.
    """
    from huggingface_hub import ModelCardData

    is_local = Path(config.base).exists()
    name, license = ON_HUB.get(config.base, (None if is_local else config.base, None))
    data = ModelCardData(
        base_model=name,
        license=license,
        library_name="retro-lm",
        pipeline_tag="text-generation",
        tags=["retro", "retrieval", "retrieval-augmented-generation", "chunked-cross-attention"],
    )
    revision = getattr(retrofit.base.config, "_commit_hash", None)
    figures = ""
    if evaluation is not None:
        figures = f"\n## Held-out text\n\n```\n{table(read_manifest(Path(evaluation)))}\n```\n"
    text = TEXT.format(
        title=f"A memory for {name or type(retrofit.base).__name__}",
        base=f"[{name}](https://huggingface.co/{name})" if name else f"A {type(retrofit.base).__name__}",
        layers=", ".join(map(str, retrofit.ca_layers)),
        n_added=sum(weight.numel() for weight in retrofit.added().values()),
        sha256=config.base_sha256,
        revision=f", revision {revision}" if revision else "",
        chunk_len=config.chunk_len,
        figures=figures,
    )
    return f"---\n{data.to_yaml()}\n---\n\n{text}"
