"""Measures the demo model: held-out perplexity, use of the experts, and two samples.

python tools/evaluate_demo_model.py expertflow/demo_model
"""

import argparse
import math
from pathlib import Path

import torch
from torch.nn import functional
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

CORPUS = Path(__file__).parent / "corpora" / "tinyshakespeare.txt"
HELDOUT_SHARE = 0.1
SAMPLE_PROMPT = "ROMEO:\nBut soft, what light"


def split_corpus(corpus: Path, heldout_share: float) -> tuple[str, str]:
    """The text to train on, and the end of the corpus, which is held out."""
    text = corpus.read_text(encoding="utf-8")
    split = int(len(text) * (1 - heldout_share))
    return text[:split], text[split:]


def expert_shares(router_logits: torch.Tensor, top_k: int) -> torch.Tensor:
    """Each expert's share of the routed tokens, [layers, experts].

    router_logits: [layers, tokens, experts]
    """
    chosen = router_logits.topk(top_k, dim=-1).indices
    return functional.one_hot(chosen, router_logits.shape[-1]).float().mean(dim=(1, 2))


@torch.no_grad()
def evaluate(model: PreTrainedModel, tokens: torch.Tensor) -> tuple[float, torch.Tensor]:
    """Mean loss per token and expert shares, over consecutive windows of the full context."""
    model.eval()
    seq_len = model.config.max_position_embeddings
    top_k = model.config.num_experts_per_tok
    num_windows = (len(tokens) - 1) // seq_len
    inputs = tokens[: num_windows * seq_len].view(num_windows, seq_len)
    targets = tokens[1 : num_windows * seq_len + 1].view(num_windows, seq_len)
    losses, shares = [], []
    for window, target in zip(inputs.split(8), targets.split(8), strict=True):
        output = model(window, output_router_logits=True, use_cache=False)
        logits = output.logits.float().flatten(0, 1)
        losses.append(functional.cross_entropy(logits, target.flatten(), reduction="sum"))
        shares.append(expert_shares(torch.stack(output.router_logits), top_k) * len(window))
    return (sum(losses) / inputs.numel()).item(), sum(shares).cpu() / num_windows


def report(folder: Path, heldout_text: str, device: str) -> None:
    """Measures what was saved, as a user would load it."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).to(device)
    tokens = torch.tensor(tokenizer(heldout_text)["input_ids"], device=device)
    loss, shares = evaluate(model, tokens)
    bits = loss * len(tokens) / len(heldout_text) / math.log(2)
    num_bytes = sum(file.stat().st_size for file in folder.iterdir())
    print(f"{folder}: {num_bytes} bytes, {model.num_parameters()} parameters")
    print(f"held-out loss {loss:.4f}, perplexity {math.exp(loss):.2f}, {bits:.3f} bits/character")
    for layer, share in enumerate(shares):
        print(f"layer {layer}: expert shares {share.min():.1%} to {share.max():.1%}")
    prompt = tokenizer(SAMPLE_PROMPT, return_tensors="pt").to(device)
    for title, options in (
        ("greedy", {}),
        ("temperature 0.8", {"do_sample": True, "temperature": 0.8}),
    ):
        output = model.generate(**prompt, max_new_tokens=200, **options)
        print(f"--- {title}\n{tokenizer.decode(output[0])}")


def main() -> None:
    parser = argparse.ArgumentParser(description="Measures the demo model.")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--corpus", type=Path, default=CORPUS)
    parser.add_argument("--device", default="cpu")
    args = parser.parse_args()
    torch.manual_seed(0)
    report(args.folder, split_corpus(args.corpus, HELDOUT_SHARE)[1], args.device)


if __name__ == "__main__":
    main()
