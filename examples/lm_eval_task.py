"""Your own text, measured by lm-eval: bits per byte of a model with retrieval on and off.

Run it as `python examples/lm_eval_task.py MODEL TEXTS [DATA]`, after `pip install lm-eval`, the harness of EleutherAI.
`MODEL` is the folder of a run or of a saved model, or a name on the hub; `TEXTS` a folder of `.txt` files that the
model was not trained on and does not retrieve; `DATA` the folder of the database (`data` if it is left out). The
harness takes the model as it takes every other one of transformers, so each of its tasks can be measured like this.

Where this differs from `retro evaluate`: the harness puts a special token before each text, by which it predicts the
first token too. It reads a text in windows that do not overlap, but for the last one, which begins so early that it is
full. Chunks count from the beginning of a window, that special token included. For the same windows and neighbors both
give the same bits per byte.
"""

import json
import sys
from pathlib import Path
from tempfile import TemporaryDirectory

from lm_eval import simple_evaluate
from lm_eval.models.huggingface import HFLM

from retro import RetrofitForCausalLM, RetroIndex


def bits_per_byte(model: RetrofitForCausalLM, texts: list[str], window: int, batch_size: int = 1) -> float:
    """What the texts cost, by windows of so many tokens."""
    # **The model** is given as an object: the harness knows nothing of neighbors, and the model looks them up itself.
    lm = HFLM(pretrained=model, tokenizer=model.tokenizer, max_length=window, batch_size=batch_size)
    with TemporaryDirectory() as folder:
        file = Path(folder) / "texts.jsonl"
        file.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
        # **A task** is a text to be predicted, and what to make of its likelihood. A file of YAML would say the same.
        task = {
            "task": "own_text",
            "dataset_path": "json",
            "dataset_kwargs": {"data_files": {"test": str(file)}},
            "test_split": "test",
            "output_type": "loglikelihood_rolling",
            "doc_to_text": "",
            "doc_to_target": "{{text}}",
            "metric_list": [{"metric": "bits_per_byte"}],
        }
        results = simple_evaluate(model=lm, tasks=[task], bootstrap_iters=0)
    return results["results"]["own_text"]["bits_per_byte,none"]


if __name__ == "__main__":
    name, folder, data = (*sys.argv[1:], "data")[:3]
    texts = [path.read_text(encoding="utf-8") for path in sorted(Path(folder).glob("*.txt"))]
    model = RetrofitForCausalLM.from_pretrained(name, index=RetroIndex(data_path=data))
    window = 8 * model.retrofit.chunk_len
    on = bits_per_byte(model, texts, window)
    # **Without an index** the model is its base.
    model.index = None
    off = bits_per_byte(model, texts, window)
    print(f"{len(texts)} texts: {on:.4f} bits per byte with retrieval, {off:.4f} without")
