"""Against plain transformers, which holds all experts: fp32 within rounding, bf16 no worse."""

from pathlib import Path

import pytest
import torch
from streamed import SMALLEST, generate, logits, token_ids, use
from tiny_models import FAMILIES, FAMILY_CONFIGS, make_checkpoint
from transformers import AutoModelForCausalLM, AutoTokenizer

import expertflow
from expertflow.demo import DEMO_MODEL

FP32_TOLERANCE = 1e-5  # of the largest logit

PROMPTS = """
The morning sun
ROMEO:
JULIET: O
To be, or not to be, that is
KING HENRY: My lords, what news from France
First Citizen: Before we proceed
My mistress' eyes are nothing like
Once more unto the breach, dear friends
What is
If
LADY MACBETH: Come, you spirits
Now is the winter of our discontent made glorious summer
MENENIUS: What work's, my countrymen, in hand? where go you with bats and clubs
a
Friends, Romans, countrymen
The quality of mercy is not strain'd
All the world's a stage, and all the men and women merely players
Tomorrow, and tomorrow, and tomorrow
SICINIUS: The gods
Good night, good night! Parting is such sweet sorrow
""".strip().splitlines()

TEXT = """
Shall I compare thee to a summer's day? Thou art more lovely and more temperate: Rough winds do
shake the darling buds of May, And summer's lease hath all too short a date; Sometime too hot the
eye of heaven shines, And often is his gold complexion dimm'd; And every fair from fair sometime
declines, By chance or nature's changing course untrimm'd; But thy eternal summer shall not fade,
Nor lose possession of that fair thou ow'st; Nor shall death brag thou wander'st in his shade, When
in eternal lines to time thou grow'st: So long as men can breathe or eyes can see, So long lives
this, and this gives life to thee.
"""


def load_plain(path: Path, dtype: torch.dtype = torch.float32):
    return AutoModelForCausalLM.from_pretrained(path, dtype=dtype)


def load_streamed(path: Path, dtype: torch.dtype = torch.float32):
    return expertflow.from_pretrained(
        path, expert_cache="25%", dtype=dtype, pool="file", progress=False
    )


def relative_error(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    return float((ours - theirs).abs().max() / theirs.abs().max())


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(DEMO_MODEL)


@pytest.mark.parametrize("family", FAMILIES)
def test_fp32_logits(tiny_checkpoint, tiny_streamed, family):
    theirs = load_plain(tiny_checkpoint(family))
    ours = use(tiny_streamed(family, pool="file"), SMALLEST)
    for batch in (token_ids(60, 13, 1), token_ids(1), token_ids(300, seed=1)):
        assert relative_error(logits(ours, batch), logits(theirs, batch)) < FP32_TOLERANCE


@pytest.mark.parametrize("family", FAMILIES)
def test_fp32_decode_steps(tiny_checkpoint, tiny_streamed, family):
    """The logits of tokens that follow a prompt, and what is chosen by them."""
    batch = token_ids(9, 4)
    theirs, ours = (
        generate(model, batch, 12, output_logits=True, return_dict_in_generate=True)
        for model in (load_plain(tiny_checkpoint(family)), use(tiny_streamed(family), SMALLEST))
    )
    assert torch.equal(ours.sequences, theirs.sequences)
    for mine, other in zip(ours.logits, theirs.logits, strict=True):
        assert relative_error(mine, other) < FP32_TOLERANCE


@pytest.mark.slow
def test_greedy_text_of_the_demo_model(tokenizer):
    assert len(PROMPTS) == 20
    batch = tokenizer(PROMPTS, return_tensors="pt", padding=True, padding_side="left")
    ours, theirs = (
        generate(load(DEMO_MODEL), batch, 256, min_new_tokens=256)
        for load in (load_streamed, load_plain)
    )
    assert ours.shape[1] == batch["input_ids"].shape[1] + 256
    assert tokenizer.batch_decode(ours) == tokenizer.batch_decode(theirs)


def errors(model, reference, batches):
    """Absolute errors of all logits."""
    return torch.cat([(logits(model, b).double() - logits(reference, b)).abs() for b in batches], 1)


def check_bf16(path, batches):
    """Mean error and mean squared error against fp32 are no larger than those of transformers.

    Most of the error is from tokens that bf16 rounding sends to other experts, and hardly depends
    on how experts are computed: to do that otherwise than transformers, even better, moves it by
    some percent up or down. So ours are computed as theirs, rounding by rounding.
    """
    reference = load_plain(path)
    theirs = errors(load_plain(path, torch.bfloat16), reference, batches)
    ours = errors(load_streamed(path, torch.bfloat16), reference, batches)
    assert theirs.mean() > 0
    assert float(ours.mean()) <= float(theirs.mean())
    assert float(ours.square().mean()) <= float(theirs.square().mean())


@pytest.mark.parametrize("family", FAMILIES)
def test_bf16_logits(tmp_path, family):
    sizes = {"moe_intermediate_size": 24}  # transformers' grouped_mm wants a multiple of 8
    sizes = {name: size for name, size in sizes.items() if name in FAMILY_CONFIGS[family]}
    make_checkpoint(family, tmp_path, **sizes)
    check_bf16(tmp_path, [token_ids(200, seed=seed) for seed in range(2)])


def test_bf16_logits_of_the_demo_model(tokenizer):
    check_bf16(DEMO_MODEL, [{"input_ids": tokenizer(TEXT, return_tensors="pt").input_ids}])


def test_autocast(tiny_checkpoint, tiny_streamed):
    """The experts keep their own dtype, so the error is at most that of everything in bf16."""
    plain = load_plain(tiny_checkpoint("qwen3_moe"))
    ids = {"input_ids": token_ids(2, 12, seed=5)["input_ids"]}
    with torch.no_grad():
        exact = plain(**ids).logits
        with torch.autocast("cpu", dtype=torch.bfloat16):
            theirs = plain(**ids).logits.float()
            ours = tiny_streamed("qwen3_moe")(**ids).logits.float()
    assert relative_error(ours, exact) < max(2 * relative_error(theirs, exact), 0.05)
