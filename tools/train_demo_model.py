"""Trains the demo model that ships in expertflow/demo_model: a small Qwen3-MoE on one text file.

    python tools/train_demo_model.py --out expertflow/demo_model --device cuda

The end of the text is held out, and the weights that predict it best are the ones saved. A corpus
this small is soon learned by heart: strong weight decay and dropout hold that off. Qwen3-MoE has no
dropout, so forward hooks add it for the training; the saved model knows nothing of them.
"""

import argparse
import copy
import math
import time
from pathlib import Path

import torch
from evaluate_demo_model import CORPUS, HELDOUT_SHARE, evaluate, expert_shares, report, split_corpus
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch.nn import functional
from transformers import (
    GenerationConfig,
    PreTrainedTokenizerFast,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

EOS_TOKEN, PAD_TOKEN = "<|endoftext|>", "<|pad|>"


def train_tokenizer(text: str) -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=1024,
        special_tokens=[EOS_TOKEN, PAD_TOKEN],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([text], trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token=EOS_TOKEN, pad_token=PAD_TOKEN
    )


def build_model(
    args: argparse.Namespace, tokenizer: PreTrainedTokenizerFast
) -> Qwen3MoeForCausalLM:
    config = Qwen3MoeConfig(
        vocab_size=len(tokenizer),
        hidden_size=128,
        num_hidden_layers=8,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        num_experts=16,
        num_experts_per_tok=2,
        moe_intermediate_size=48,
        intermediate_size=96,  # of dense layers; there are none
        norm_topk_prob=True,
        router_aux_loss_coef=0.01,
        max_position_embeddings=args.seq_len,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
        tie_word_embeddings=True,
        initializer_range=0.04,
        attention_dropout=args.dropout,  # save() puts it back to 0
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return Qwen3MoeForCausalLM(config)


def dense_experts(
    experts: torch.nn.Module,
    hidden_states: torch.Tensor,
    top_k_index: torch.Tensor,
    top_k_weights: torch.Tensor,
) -> torch.Tensor:
    """Every expert on every token, times the router's weights, which are 0 for experts not chosen.

    The same function as the routed one. For experts this small the wasted products cost less than
    the loop over experts, which has several launches and a host sync for each.
    """
    num_tokens = hidden_states.shape[0]
    weights = hidden_states.new_zeros(num_tokens, experts.num_experts).scatter(
        1, top_k_index, top_k_weights
    )
    gate_up = functional.linear(hidden_states, experts.gate_up_proj.flatten(0, 1))
    gate, up = gate_up.view(num_tokens, experts.num_experts, -1).chunk(2, dim=-1)
    hidden = experts.act_fn(gate) * up * weights.unsqueeze(-1)
    return hidden.flatten(1) @ experts.down_proj.transpose(1, 2).flatten(0, 1)


def add_dropout(model: Qwen3MoeForCausalLM, probability: float) -> None:
    """Dropout on the embeddings and on everything that is added to the residual stream."""

    def drop(module, inputs, output):
        if isinstance(output, tuple):
            return (functional.dropout(output[0], probability, module.training), *output[1:])
        return functional.dropout(output, probability, module.training)

    model.model.embed_tokens.register_forward_hook(drop)
    for layer in model.model.layers:
        layer.self_attn.register_forward_hook(drop)
        layer.mlp.register_forward_hook(drop)


def load_balancing_loss(router_logits: torch.Tensor, top_k: int) -> torch.Tensor:
    """Switch Transformer's balancing loss (arXiv 2101.03961, eq. 4) per layer; 1 if balanced.

    The one in transformers averages over the layers first, so that a layer may neglect an expert
    that another layer favours.
    """
    probabilities = router_logits.softmax(dim=-1).mean(dim=1)
    shares = expert_shares(router_logits, top_k)
    return router_logits.shape[-1] * (shares * probabilities).sum(dim=-1).mean()


def train(
    model: Qwen3MoeForCausalLM,
    train_tokens: torch.Tensor,
    heldout_tokens: torch.Tensor,
    args: argparse.Namespace,
) -> None:
    """Leaves the weights with the lowest held-out loss in the model."""
    norms = [p for p in model.parameters() if p.dim() == 1]
    matrices = [p for p in model.parameters() if p.dim() > 1]
    optimizer = torch.optim.AdamW(
        [{"params": norms, "weight_decay": 0.0}, {"params": matrices}],
        lr=args.lr,
        weight_decay=args.weight_decay,
        betas=(0.9, 0.98),
        fused=True,
    )
    config, warmup = model.config, min(100, args.steps // 10 + 1)

    def learning_rate(step: int) -> float:
        return min(1.0, (step + 1) / warmup) * (0.51 + 0.49 * math.cos(math.pi * step / args.steps))

    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, learning_rate)
    best_loss, best_weights, start = math.inf, None, time.time()
    window = torch.arange(args.seq_len + 1, device=train_tokens.device)
    for step in range(1, args.steps + 1):
        model.train()
        last_start = len(train_tokens) - args.seq_len
        starts = torch.randint(last_start, (args.batch_size, 1), device=window.device)
        batch = train_tokens[starts + window]
        output = model(batch[:, :-1], output_router_logits=True, use_cache=False)
        loss = functional.cross_entropy(output.logits.flatten(0, 1), batch[:, 1:].flatten())
        balance = load_balancing_loss(torch.stack(output.router_logits), config.num_experts_per_tok)
        (loss + config.router_aux_loss_coef * balance).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        if step % args.eval_every == 0 or step == args.steps:
            heldout_loss, _ = evaluate(model, heldout_tokens)
            print(
                f"step {step}: training loss {loss.item():.3f}, held-out {heldout_loss:.4f}, "
                f"balance {balance.item():.3f}, {time.time() - start:.0f} s",
                flush=True,
            )
            if heldout_loss < best_loss:
                best_loss, best_weights = heldout_loss, copy.deepcopy(model.state_dict())
    model.load_state_dict(best_weights)


def save(model: Qwen3MoeForCausalLM, tokenizer: PreTrainedTokenizerFast, folder: Path) -> None:
    model.config.attention_dropout = 0.0
    model.generation_config = GenerationConfig(
        eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id
    )
    model.to(torch.bfloat16).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description="Trains the demo model.", formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--corpus", type=Path, default=CORPUS)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--heldout", type=float, default=HELDOUT_SHARE, help="share of the corpus")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, default=900)
    parser.add_argument("--eval-every", type=int, default=100)
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--seq-len", type=int, default=1024)
    parser.add_argument("--lr", type=float, default=3e-3)
    parser.add_argument("--weight-decay", type=float, default=2.0)
    parser.add_argument("--dropout", type=float, default=0.2)
    return parser.parse_args()


def main() -> None:
    args = parse_arguments()
    torch.manual_seed(args.seed)
    torch.set_float32_matmul_precision("high")
    train_text, heldout_text = split_corpus(args.corpus, args.heldout)
    tokenizer = train_tokenizer(train_text)
    train_tokens, heldout_tokens = (
        torch.tensor(tokenizer(part)["input_ids"], device=args.device)
        for part in (train_text, heldout_text)
    )
    print(f"{len(train_tokens)} training tokens, {len(heldout_tokens)} held out", flush=True)
    model = build_model(args, tokenizer)
    ALL_EXPERTS_FUNCTIONS.register("dense", dense_experts)
    model.set_experts_implementation("dense")
    model.to(args.device)
    add_dropout(model, args.dropout)
    train(model, train_tokens, heldout_tokens, args)
    save(model, tokenizer, args.out)
    report(args.out, heldout_text, args.device)


if __name__ == "__main__":
    main()
