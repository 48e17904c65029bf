"""The same model as the tutorial's: its weights load here, and give the same logits and gradients.

Run it as `python examples/compare_with_reference.py`; it needs the tutorial's package, `labml-nn`
(`pip install --no-deps labml-nn`). It ends with status 1 if anything differs by more than rounding.
"""

import sys

import torch
from labml_nn.transformers.retro import model as tutorial
from torch import nn

from retro import model as retro

N_VOCAB, CHUNK_LEN, N_CHUNKS, N_NEIGHBORS = 100, 16, 4, 2
# Sums are taken in another order here, and each has float32's rounding, 6e-8, many times over.
TOLERANCE = 1e-5  # of the largest value

# **Two models of one shape.** Names, order and meaning of all arguments are the tutorial's, so one
# function builds either. Which layers read neighbors is a set there; here any collection will do.


def build(module):
    """A model of three layers from one of the two modules."""
    encoder = module.NearestNeighborEncoder(
        chunk_len=CHUNK_LEN, n_layers=2, ca_layers={1}, d_model=64, n_heads=4, d_k=16, d_ff=128
    )
    return module.RetroModel(
        N_VOCAB, d_model=64, n_layers=3, ca_layers={1, 2}, chunk_len=CHUNK_LEN, n_heads=4, d_k=16, d_ff=128,
        encoder=encoder,
    )  # fmt: skip


torch.manual_seed(0)
theirs, ours = build(tutorial), build(retro)

# **The weights go from one to the other.** `strict` means that every weight there has a place here, of the same
# name and shape, and that nothing here is left without.
ours.load_state_dict(theirs.state_dict(), strict=True)

# **The same tokens through both**, three of them beyond the last whole chunk, and a step of learning as far as the
# gradients, which tell more than the logits: each weight has its own.
tokens = torch.randint(N_VOCAB, (2, N_CHUNKS * CHUNK_LEN + 3))
neighbors = torch.randint(N_VOCAB, (2, N_CHUNKS, N_NEIGHBORS, 2 * CHUNK_LEN))
logits = {}
for name, model in (("theirs", theirs), ("ours", ours)):
    logits[name] = model(tokens, neighbors)
    nn.functional.cross_entropy(logits[name][:, :-1].flatten(0, 1), tokens[:, 1:].flatten()).backward()


def largest(tensors):
    """The largest absolute value in some tensors."""
    return max(float(tensor.detach().abs().max()) for tensor in tensors)


# **What differs**, as a share of the largest logit, and of the largest gradient of any weight. (A key's bias adds the
# same to all scores of a query, which softmax takes away again: its gradient is nothing but rounding.) The angles of
# the rotary embedding are a parameter that never learns, and have no gradient.
of_logits = largest([logits["ours"] - logits["theirs"]]) / largest([logits["theirs"]])
gradients = {name: p.grad for name, p in theirs.named_parameters() if p.grad is not None}
differences = {name: largest([ours.get_parameter(name).grad - grad]) for name, grad in gradients.items()}
worst = max(differences, key=differences.__getitem__)
of_gradients = differences[worst] / largest(gradients.values())
print(f"{sum(p.numel() for p in ours.parameters()):,} weights in {len(gradients)} tensors with gradients")
print(f"logits     differ by {of_logits:.1e} of the largest")
print(f"gradients  differ by {of_gradients:.1e} of the largest, most in {worst}")
if max(of_logits, of_gradients) > TOLERANCE:
    sys.exit(f"that is more than rounding ({TOLERANCE})")
