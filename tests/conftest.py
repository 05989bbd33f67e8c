"""Settings that must be in place before torch and transformers are imported by a test."""

import os

os.environ["HF_HUB_OFFLINE"] = "1"

import torch
from hypothesis import settings

# Without a GPU, Triton kernels run in the CPU interpreter, which is chosen when triton is imported.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

# Interleaved small operations of several test processes gain nothing from more threads.
torch.set_num_threads(1)

# No deadline: the first example of a test may compile or load something. `--hypothesis-profile=thorough` looks further.
settings.register_profile("quick", max_examples=25, deadline=None, derandomize=True)
settings.register_profile("thorough", max_examples=1000, deadline=None)
settings.load_profile("quick")
