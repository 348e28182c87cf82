import os

import torch

if not torch.cuda.is_available():  # to be known before anything imports Triton
    os.environ["TRITON_INTERPRET"] = "1"
