"""`expertflow generate`: continue a prompt."""

import argparse
import json
import sys
from typing import Any

from ..biased_routing import BiasedRouting
from ..generation import encode, generate
from ..loading import load_opened_model
from ..model_info import open_model
from ..results_table import results_table
from ..unsupported import chosen_device
from .options import add_loading_options, add_model, not_negative, positive, share


def add_parser(commands: Any) -> None:
    """Add the command to `commands`, argparse's subparsers."""
    parser = commands.add_parser(
        "generate", help="continue a prompt", description="Continue a prompt."
    )
    add_model(parser)
    parser.add_argument("--prompt", required=True, metavar="TEXT|-", help="- reads standard input")
    parser.add_argument("--max-new-tokens", type=positive, default=128, metavar="N")
    parser.add_argument("--temperature", type=not_negative, default=0.0, help="default: greedy")
    parser.add_argument("--seed", type=int, default=0)
    add_loading_options(parser)
    parser.add_argument(
        "--routing",
        choices=("exact", "biased"),
        default="exact",
        help="biased: prefer experts in the cache, which changes the text (default: exact)",
    )
    parser.add_argument(
        "--routing-budget",
        type=share,
        metavar="SHARE",
        help=f"of routes that biased routing may change (default {BiasedRouting().budget})",
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of text")
    parser.add_argument(
        "--compare-on-demand",
        action="store_true",
        help="run again with every routed expert fetched and nothing kept",
    )
    parser.set_defaults(run=_run)


def _run(options: argparse.Namespace) -> int:
    from transformers import AutoTokenizer, TextStreamer

    routing = _routing(options)
    prompt = sys.stdin.read() if options.prompt == "-" else options.prompt
    device = chosen_device(options.device, None)
    opened = open_model(options.model, options.dtype, {})
    tokenizer = AutoTokenizer.from_pretrained(options.model)
    encode(tokenizer, prompt)  # its errors come before anything large is read
    model, _ = load_opened_model(
        opened,
        expert_cache=options.expert_cache,
        policy=options.policy,
        cache_scope=options.cache_scope,
        pool=options.pool,
        device=device,
        ram_limit=options.ram_limit,
        prefetch=options.prefetch,
        routing=routing,
        progress=sys.stderr.isatty(),
    )
    sampling: dict[str, Any] = {
        "max_new_tokens": options.max_new_tokens,
        "temperature": options.temperature,
        "seed": options.seed,
    }
    streamer = (
        None
        if options.json
        else TextStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True)
    )
    run = generate(model, tokenizer, prompt, **sampling, streamer=streamer)
    rows = [(run.policy, run)]
    if options.compare_on_demand:
        model.set_predictor(None)  # it would take time, and hide stalls meanwhile
        model.set_expert_cache(options.expert_cache, policy="on_demand")
        rows.append(("on demand", generate(model, tokenizer, prompt, **sampling)))
    if options.json:
        report = run.to_json()
        if options.compare_on_demand:
            report["on_demand"] = rows[1][1].to_json()
        print(json.dumps(report))
    else:
        print(f"\n{results_table(rows)}", file=sys.stderr, flush=True)
    return 0


def _routing(options: argparse.Namespace) -> str | BiasedRouting:
    budget: float | None = options.routing_budget
    if options.routing == "biased":
        return BiasedRouting() if budget is None else BiasedRouting(budget=budget)
    if budget is not None:
        raise ValueError("--routing-budget has a meaning with --routing biased only")
    return "exact"
