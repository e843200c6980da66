"""What tests of loading do: load, compare with transformers, expect a refusal."""

import pytest
import tiny_models
import torch

from expertflow import UnsupportedModelError, from_pretrained

PROMPT = torch.randint(
    2, tiny_models.VOCAB_SIZE, (2, 12), generator=torch.Generator().manual_seed(1)
)


def load(path, **arguments):
    return from_pretrained(path, progress=False, **arguments)


@torch.no_grad()
def logits(model):
    return model(input_ids=PROMPT).logits


def check_same(model, reference, tolerance=1e-5):
    expected = logits(reference)
    error = (logits(model) - expected).abs().max() / expected.abs().max()
    assert error <= tolerance


def check_refused(path, *words, error=UnsupportedModelError, **arguments):
    """Loading must fail, and the message must hold all of `words`."""
    with pytest.raises(error) as caught:
        load(path, **arguments)
    for word in words:
        assert str(word) in str(caught.value)
