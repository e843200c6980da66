"""Settings for all Python tests."""

import torch

# The models are tiny: more threads would only wait for each other on a busy machine.
torch.set_num_threads(1)
