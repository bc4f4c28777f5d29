"""Where tests of tensors run: on the GPU where there is one, else under Triton's interpreter."""

import torch

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
