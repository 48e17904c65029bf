"""What RETROfitting and reading cost, beside the base alone: `python benchmarks/retrofit.py`, after `make retrofit`.

* step: a training step of 1,024 tokens, by fine-tuning all of the base (AdamW, bf16 by autocast), and by each kind of
  encoder, with half of two neighbors kept back as the preset does; time and peak memory, each in a process of its own
* generate: 256 new tokens of one text, by the base and with live retrieval from the data of `make retrofit`

Variants take turns; medians and ratios are written to benchmarks/RETROFIT.md.
"""

from __future__ import annotations

import argparse
import json
import platform
import resource
import statistics
import subprocess
import sys
import time
from datetime import date
from pathlib import Path

HERE = Path(__file__).parent
STEPS = ("all of the base", "encoder base", "encoder new")
N_TOKENS, N_NEW, CHUNK_LEN = 1024, 256, 64


def step(variant: str) -> dict[str, float]:
    """Median seconds of a training step, and peak memory in GB."""
    import torch
    import torch.nn.functional as F

    from retro.config import PACKAGED_BASE, RetrofitConfig
    from retro.device import bf16_is_faster
    from retro.runs.models import new_model
    from retro.text.base_model import load_base

    torch.manual_seed(0)
    if variant == "all of the base":
        model = load_base(PACKAGED_BASE, torch.float32).requires_grad_(True).train()
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, fused=True)
    else:
        config = RetrofitConfig(PACKAGED_BASE, CHUNK_LEN, encoder=variant.removeprefix("encoder "))
        model = new_model(config).train()
        groups = [{"params": group["params"]} for group in model.parameter_groups()]
        optimizer = torch.optim.Adam(groups, lr=1e-4, fused=True)
    x, y = torch.randint(0, 49_152, (2, 1, N_TOKENS))
    ret = torch.randint(0, 49_152, (1, N_TOKENS // CHUNK_LEN, 2, 2 * CHUNK_LEN))

    def loss() -> torch.Tensor:
        """Of the base as transformers computes it; of ours as `retro.train` does."""
        if variant == "all of the base":
            with torch.autocast("cpu", torch.bfloat16, enabled=bf16_is_faster(torch.device("cpu"))):
                logits = model(input_ids=x, use_cache=False).logits
            return F.cross_entropy(logits.float().flatten(0, 1), y.flatten())
        neighbors = ret.masked_fill(torch.rand(ret.shape[:3])[..., None] < 0.5, -1)
        return model(x, neighbors, targets=y) / y.numel()

    seconds = []
    for _ in range(6):
        started = time.perf_counter()
        loss().backward()
        torch.nn.utils.clip_grad_norm_([w for w in model.parameters() if w.requires_grad], 1.0)
        optimizer.step()
        optimizer.zero_grad()
        seconds.append(time.perf_counter() - started)
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6
    return {"seconds": statistics.median(seconds[1:]), "memory": memory}


def generate(data: str, run: str) -> dict[str, float]:
    """Seconds a token of the base's `generate`, and with live retrieval, in turns."""
    import torch

    from retro import RetrofitForCausalLM, RetroIndex

    index = RetroIndex(CHUNK_LEN, data_path=data)
    model = RetrofitForCausalLM.from_pretrained(run, index=index)
    prompt = model.tokenizer(index.corpus.beginning_of_held_out(100), return_tensors="pt")
    seconds: dict[str, list[float]] = {"base": [], "retrieving": []}
    for _ in range(4):
        for name, writer in (("base", model.retrofit.base), ("retrieving", model)):
            started = time.perf_counter()
            with torch.inference_mode():
                ids = writer.generate(**prompt, max_new_tokens=N_NEW, min_new_tokens=N_NEW, do_sample=False)
            assert ids.shape[1] == prompt["input_ids"].shape[1] + N_NEW
            seconds[name].append((time.perf_counter() - started) / N_NEW)
    return {name: statistics.median(values[1:]) for name, values in seconds.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data-path", default="data/retrofit")
    parser.add_argument("--run", default="logs/retrofit")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--variant", help="measure this one only, and print it")
    options = parser.parse_args()
    run = max(Path(options.run).glob("*/run.json"), default=Path(options.run) / "run.json").parent
    if options.variant:
        of = generate(options.data_path, str(run)) if options.variant == "generate" else step(options.variant)
        print(json.dumps(of))
        return
    rows: dict[str, list[dict[str, float]]] = {variant: [] for variant in (*STEPS, "generate")}
    for _ in range(options.rounds):
        for variant, found in rows.items():
            command = [sys.executable, __file__, "--variant", variant, "--data-path", options.data_path]
            done = subprocess.run([*command, "--run", options.run], capture_output=True, text=True, check=True)
            found.append(json.loads(done.stdout.splitlines()[-1]))
            print(variant, found[-1], flush=True)
    (HERE / "RETROFIT.md").write_text(table(rows))


def table(rows: dict[str, list[dict[str, float]]]) -> str:
    """The page, in Markdown."""
    import torch
    import transformers

    def median(variant: str, name: str) -> float:
        return statistics.median(found[name] for found in rows[variant])

    def ratios(variant: str) -> list[float]:
        pairs = zip(rows[variant], rows[STEPS[0]], strict=True)
        return sorted(ours["seconds"] / full["seconds"] for ours, full in pairs)

    lines = [
        "# What RETROfitting costs",
        "",
        f"`python benchmarks/retrofit.py`, {date.today():%d %B %Y}, {platform.processor() or platform.machine()}, "
        f"{torch.get_num_threads()} threads, torch {torch.__version__}, transformers {transformers.__version__}. "
        f"SmolLM2-135M, medians of {len(rows[STEPS[0]])} rounds in turns.",
        "",
        "| training step of 1,024 tokens | seconds | of a step of all of the base (rounds) | peak memory |",
        "|---|---|---|---|",
    ]
    for variant in STEPS:
        found = ratios(variant)
        lines.append(
            f"| {variant} | {median(variant, 'seconds'):.2f} | {statistics.median(found):.2f} "
            f"({found[0]:.2f} to {found[-1]:.2f}) | {median(variant, 'memory'):.2f} GB |"
        )
    times = sorted(found["retrieving"] / found["base"] for found in rows["generate"])
    lines += [
        "",
        "| 256 new tokens, one text | milliseconds a token |",
        "|---|---|",
        f"| the base's `generate` | {1000 * median('generate', 'base'):.1f} |",
        f"| with live retrieval | {1000 * median('generate', 'retrieving'):.1f} |",
        "",
        f"The latter takes {statistics.median(times):.2f} times as long ({times[0]:.2f} to {times[-1]:.2f}).",
    ]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
