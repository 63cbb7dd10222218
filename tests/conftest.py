"""Torch's threads cost tiny models more than they bring, many times over on a busy machine.

Where there is no GPU, Triton interprets kernels; it wants to know before it is imported.
"""

import os

import pytest
import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")


@pytest.fixture(autouse=True)
def _few_threads(request):
    before = torch.get_num_threads()
    torch.set_num_threads(before if request.node.get_closest_marker("smollm") else 1)
    yield
    torch.set_num_threads(before)
