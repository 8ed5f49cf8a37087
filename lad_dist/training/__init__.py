"""Training: resolve a config, build the run, train, evaluate, export."""

import os

import torch

# DeepSpeed chooses when it is imported; unless something is chosen for it, it warns on standard output.
os.environ.setdefault("DS_ACCELERATOR", "cuda" if torch.cuda.is_available() else "cpu")
