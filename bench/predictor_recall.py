"""Recall of the expert predictor on a text, beside the pre-gate's: by distance, budget and time.

The text is run through the model in windows of 1024 tokens. The predictor then sees the router
inputs as if the tokens were decoded one by one: each token is scored before it is learned from.
What it foresees of a token's first layers from the token's embedding stands in tables of its own.
The pre-gate is the same predictor, never taught. Needs matplotlib for --plot only.
"""

import argparse
import time
from pathlib import Path

import numpy as np
import torch
from transformers import AutoTokenizer

import expertflow
from expertflow._core import TOKEN_START
from expertflow.predictor import ExpertPredictor
from expertflow.record import windows
from expertflow.routers import find_routers

WINDOW_TOKENS = 500


def main():
    options = parse()
    model = expertflow.from_pretrained(options.model, expert_cache="100%", dtype=options.dtype)
    tokenizer = AutoTokenizer.from_pretrained(options.model)
    texts = [options.text, *([options.then] if options.then else [])]
    parts = [
        torch.tensor(tokenizer(text.read_text("utf-8"), verbose=False)["input_ids"])
        for text in texts
    ]
    parts = [part[: options.tokens] for part in parts]
    top_k, num_experts = model.expert_cache.top_k, model.expert_cache.num_experts
    budgets = sorted({min(m, num_experts) for m in (top_k, top_k + 2, 2 * top_k, 4 * top_k)})
    found, from_embedding, seconds = measure(model, torch.cat(parts), budgets)
    num_tokens = len(found["ours"])
    shape = f"{model.expert_cache.num_layers} layers, top-{top_k} of {num_experts} experts"
    print(f"{num_tokens} tokens, {shape}, {model.dtype}; recall over the second half, all layers")
    tables = second_half(found)
    print_tables(tables, budgets, "distance", 1)
    print("\nof the first layers, from the embedding")
    print_tables(second_half(from_embedding), budgets, "layer", 0)
    early = from_embedding["ours"][:WINDOW_TOKENS, :, 0].mean(0)
    print(f"{f'ours at {top_k}, to {WINDOW_TOKENS}':>21}" + "".join(f"{r:8.4f}" for r in early))
    print(f"predict and learn: {seconds / num_tokens * 1e6:.0f} us of CPU time a token")
    print_windows(found, 0, "from a fresh start")
    if options.then:
        print_windows(found, len(parts[0]), f"after the change to {options.then.name}")
    if options.plot:
        plot(tables, budgets, found, options.plot)


def parse():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model")
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument("--then", type=Path, help="a text of another topic, to go on with")
    parser.add_argument("--tokens", type=int, help="of each text")
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--plot", type=Path, help="an image file to write")
    return parser.parse_args()


def measure(model, token_ids, budgets):
    """Recall of both predictors, and CPU seconds of ours.

    [tokens, distances, budgets], a mean over layers; and from the embedding [tokens, first layers,
    budgets].
    """
    ours = ExpertPredictor.for_model(model)
    pre_gate = ExpertPredictor(find_routers(model), num_token_buckets=0)
    found = {"pre-gate": [], "ours": []}
    from_embedding = {"pre-gate": [], "ours": []}
    seconds = 0.0
    for window in windows(model, token_ids):
        begin = time.process_time()
        ids, _ = ours.replay(window.sources, window.token_ids, max(budgets))
        seconds += time.process_time() - begin
        untaught = rank_untaught(pre_gate, window.sources, max(budgets))
        for name, ranked in (("pre-gate", untaught), ("ours", ids)):
            found[name].append(recall(ranked[:, 1:], window.expert_ids, budgets))
            from_embedding[name].append(first_recall(ranked[:, 0], window.expert_ids, budgets))
    return joined(found), joined(from_embedding), seconds


def joined(parts):
    return {name: np.concatenate(arrays) for name, arrays in parts.items()}


def second_half(found):
    return {name: np.mean(hits[len(hits) // 2 :], axis=0) for name, hits in found.items()}


def rank_untaught(predictor, sources, num_ranked):
    """What `replay` would return if nothing were ever learned."""
    core = predictor._core
    tokens, num_sources, _ = sources.shape
    ids = np.zeros((tokens, num_sources, predictor.max_distance, num_ranked), np.int32)
    core.begin_pass(1, tokens, [])
    for index in range(num_sources):
        layer = TOKEN_START + index
        core.observe(layer, sources[:, index])
        core.predict(layer)
        for distance in range(1, core.num_distances + 1):
            scores = core.scores(distance).reshape(tokens, -1)
            ranked = np.argsort(-scores, axis=1, kind="stable")[:, :num_ranked]
            ids[:, index, distance - 1] = ranked
    return ids


def recall(ids, routed, budgets):
    """The share of each token's routed experts among the first m foreseen, a mean over layers."""
    tokens, layers, distances, _ = ids.shape
    distances = min(distances, layers - 1)
    result = np.empty((tokens, distances, len(budgets)))
    for distance in range(1, distances + 1):
        foreseen = ids[:, : layers - distance, distance - 1]
        hit = (foreseen[..., None] == routed[:, distance:, None]).any(-1)  # by rank
        by_budget = hit.mean(1).cumsum(-1) / routed.shape[-1]
        result[:, distance - 1] = by_budget[:, np.array(budgets) - 1]
    return result


def first_recall(ids, routed, budgets):
    """As `recall`, of the first layers, one by one: those of which `ids` tells."""
    num_layers = min(ids.shape[1], routed.shape[1])
    hit = (ids[:, :num_layers, None] == routed[:, :num_layers, :, None]).any(2)  # by rank
    return (hit.cumsum(-1) / routed.shape[-1])[..., np.array(budgets) - 1]


def print_tables(tables, budgets, column, first):
    columns = range(first, first + tables["ours"].shape[0])
    for index, budget in enumerate(budgets):
        print(f"\nrecall at {budget:<3}{column:>8}" + "".join(f"{c:8}" for c in columns))
        for name, table in tables.items():
            print(f"{name:>21}" + "".join(f"{value:8.4f}" for value in table[:, index]))
    print()


def print_windows(found, begin, title):
    """Recall at k of ours minus the pre-gate's, in windows after `begin`."""
    gain = found["ours"][begin:, :, 0] - found["pre-gate"][begin:, :, 0]
    print(f"\nrecall at k above the pre-gate's, {title}")
    distances = range(1, gain.shape[1] + 1)
    print("tokens    distance" + "".join(f"{d:8}" for d in distances))
    for start in range(0, min(len(gain), 8 * WINDOW_TOKENS), WINDOW_TOKENS):
        mean = gain[start : start + WINDOW_TOKENS].mean(0)
        span = f"{start}-{start + WINDOW_TOKENS}"
        print(f"{span:18}" + "".join(f"{value:+8.3f}" for value in mean))
    whole = gain[: len(gain) // WINDOW_TOKENS * WINDOW_TOKENS]
    by_window = whole.reshape(-1, WINDOW_TOKENS, gain.shape[1]).mean(1)
    if len(by_window):
        worst = np.min(by_window, axis=0)
        print("worst to the end  " + "".join(f"{value:+8.3f}" for value in worst))


def plot(tables, budgets, found, path):
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (left, right) = pyplot.subplots(1, 2, figsize=(11, 4.2))
    distances = np.arange(1, tables["ours"].shape[0] + 1)
    for index, budget in enumerate(budgets):
        color = f"C{index}"
        left.plot(distances, tables["ours"][:, index], "o-", color=color, label=f"ours at {budget}")
        left.plot(distances, tables["pre-gate"][:, index], "x:", color=color)
    left.plot([], [], "x:", color="gray", label="pre-gate")
    left.set(xlabel="distance in MoE layers", ylabel="recall, second half", ylim=(None, 1.0))
    left.legend(fontsize="small")
    for color, distance in zip(("C0", "C2", "C4"), (1, 4, distances[-1]), strict=True):
        for name, style in (("ours", "-"), ("pre-gate", ":")):
            hits = found[name][:, distance - 1, 0]
            means = hits[: len(hits) // WINDOW_TOKENS * WINDOW_TOKENS]
            means = means.reshape(-1, WINDOW_TOKENS).mean(1)
            times = (np.arange(len(means)) + 0.5) * WINDOW_TOKENS
            right.plot(times, means, style, color=color, label=f"{name}, distance {distance}")
    right.set(xlabel="tokens since the start", ylabel="recall at k, in windows of 500 tokens")
    right.set_ylim(right.get_ylim()[0] - 0.15, None)
    right.legend(fontsize="x-small", ncols=2, loc="lower center")
    figure.tight_layout()
    figure.savefig(path, metadata={"Date": None} if path.suffix == ".svg" else None)
    print(f"plot: {path}")


if __name__ == "__main__":
    main()
