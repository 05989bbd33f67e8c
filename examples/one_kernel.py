"""Call one operation by itself, forward and backward: causal attention over a padded batch.

    python examples/one_kernel.py

The Triton kernel runs on a GPU; elsewhere the torch reference, with the same name and arguments, gives the answer.
"""

import fastgpt_kernels as fk
import torch

B, H, T, D = 2, 12, 100, 64
device = "cuda" if torch.cuda.is_available() else "cpu"
causal_attention = fk.causal_attention if device == "cuda" else fk.reference.causal_attention

# Queries, keys and values may be views of one packed product: any strides, with the last axis dense.
packed = torch.randn(B, T, 3, H, D, device=device, requires_grad=True)
q, k, v = (heads.transpose(1, 2) for heads in packed.unbind(2))  # each (B, H, T, D)
attend_to = torch.ones(B, T, dtype=torch.bool, device=device)
attend_to[1, :30] = False  # the second row starts with 30 tokens of padding

attended = causal_attention(q, k, v, key_padding_mask=attend_to)  # (B, H, T, D)
attended.sum().backward()
assert packed.grad is not None

print(f"{causal_attention.__module__} on {device}: {tuple(attended.shape)}")
print(f"padding gets no gradient: {packed.grad[1, :30, 1:].abs().max().item() == 0}")
