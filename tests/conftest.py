"""One thread in tests: small tensors gain nothing from more, and two cores may be shared."""

import matplotlib
import torch

torch.set_num_threads(1)
matplotlib.use("Agg")
