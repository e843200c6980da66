"""The command line: generate, demo, info."""

import argparse
import dataclasses
import json
import math
import sys
from collections.abc import Sequence
from typing import Any

from .cache import hit_rate
from .cache_size import POLICIES
from .generation import Generation, encode, generate
from .loading import from_pretrained
from .memory import format_size
from .model_info import ModelInfo, model_info
from .simulate_command import add_parser as add_simulate_parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command and return its exit status: 0, 1 after an error, 130 after Ctrl-C."""
    options = _parser().parse_args(arguments)
    try:
        return int(options.run(options))
    except KeyboardInterrupt:
        _say("\nexpertflow: interrupted")
        return 130
    except BrokenPipeError:
        sys.stderr.close()  # whoever read the output has gone: nothing more to say
        return 141
    except (ValueError, OSError, MemoryError, NotImplementedError) as error:
        _say(f"expertflow: error: {error}")
        return 1


def results_table(rows: Sequence[tuple[str, Generation]]) -> str:
    """Return a table with one row for each named run."""
    head = ("", "expert cache", "hit rate", "tokens/s", "stall/token", "fetched/token")
    cells = [head]
    for name, run in rows:
        fetched = run.statistics["demand_bytes"] + run.statistics["prefetch_bytes"]
        share = run.expert_cache_bytes / run.expert_pool_bytes
        cells.append(
            (
                name,
                f"{format_size(run.expert_cache_bytes)} ({share:.0%})",
                f"{hit_rate(run.statistics):.1%}",
                f"{run.tokens_per_second:.1f}",
                f"{run.stall_ms_per_token:.3f} ms",
                format_size(fetched // max(run.new_tokens, 1)),
            )
        )
    widths = [max(len(row[column]) for row in cells) for column in range(len(head))]
    lines = []
    for row in cells:
        first, *others = (
            cell.ljust(w) if i == 0 else cell.rjust(w)
            for i, (cell, w) in enumerate(zip(row, widths, strict=True))
        )
        lines.append("  ".join((first, *others)))
    return "\n".join(lines)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="expertflow",
        description="Runs mixture-of-experts models whose experts do not fit in memory.",
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    run = commands.add_parser(
        "generate", help="continue a prompt", description="Continue a prompt."
    )
    run.add_argument("model", metavar="MODEL", help="directory or Hub id")
    run.add_argument("--prompt", required=True, metavar="TEXT|-", help="- reads standard input")
    run.add_argument("--max-new-tokens", type=_positive, default=128, metavar="N")
    run.add_argument("--temperature", type=_not_negative, default=0.0, help="default: greedy")
    run.add_argument("--seed", type=int, default=0)
    _add_loading_options(run)
    run.add_argument("--json", action="store_true", help="print one JSON object instead of text")
    run.add_argument(
        "--compare-on-demand",
        action="store_true",
        help="run again with every routed expert fetched and nothing kept",
    )
    run.set_defaults(run=_generate)

    demo = commands.add_parser("demo", help="run the model that ships with expertflow")
    demo.set_defaults(run=_demo)

    info = commands.add_parser("info", help="sizes of a model, and what would fit")
    info.add_argument("model", metavar="MODEL", help="directory or Hub id")
    info.add_argument("--dtype", default="auto")
    info.add_argument("--ram-limit", metavar="SIZE", help="memory to assume to be available")
    info.add_argument("--json", action="store_true")
    info.set_defaults(run=_info)

    add_simulate_parser(commands)
    return parser


def _add_loading_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--expert-cache", default="25%", metavar="SIZE", help='"25%%", "8GiB", ... (default 25%%)'
    )
    parser.add_argument("--policy", choices=POLICIES, default="decayed_frequency")
    parser.add_argument("--cache-scope", choices=("global", "layer"), default="global")
    parser.add_argument("--pool", choices=("ram", "file"), default="ram")
    parser.add_argument("--device", default="cpu", help="cpu (default), cuda or cuda:N")
    parser.add_argument(
        "--dtype", default="auto", help="float32, bfloat16, float16 (default: auto)"
    )
    parser.add_argument("--ram-limit", metavar="SIZE", help="memory to assume to be available")


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text} is not at least 1")
    return value


def _not_negative(text: str) -> float:
    value = float(text)
    if not 0 <= value < math.inf:
        raise argparse.ArgumentTypeError(f"{text} is not a number of at least 0")
    return value


def _generate(options: argparse.Namespace) -> int:
    from transformers import AutoTokenizer, TextStreamer

    prompt = sys.stdin.read() if options.prompt == "-" else options.prompt
    model_info(options.model, dtype=options.dtype)  # before anything large is read
    tokenizer = AutoTokenizer.from_pretrained(options.model)
    encode(tokenizer, prompt)
    model = from_pretrained(
        options.model,
        expert_cache=options.expert_cache,
        policy=options.policy,
        cache_scope=options.cache_scope,
        pool=options.pool,
        device=options.device,
        dtype=options.dtype,
        ram_limit=options.ram_limit,
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
        model.set_expert_cache(options.expert_cache, policy="on_demand")
        rows.append(("on demand", generate(model, tokenizer, prompt, **sampling)))
    if options.json:
        report = run.to_json()
        if options.compare_on_demand:
            report["on_demand"] = rows[1][1].to_json()
        print(json.dumps(report))  # noqa: T201
    else:
        _say("\n" + results_table(rows))
    return 0


def _demo(options: argparse.Namespace) -> int:
    from .demo import run_demo

    run_demo()
    return 0


def _info(options: argparse.Namespace) -> int:
    info = model_info(options.model, dtype=options.dtype, ram_limit=options.ram_limit)
    if options.json:
        print(json.dumps(dataclasses.asdict(info)))  # noqa: T201
    else:
        print(_describe(info))  # noqa: T201
    return 0


def _describe(info: ModelInfo) -> str:
    fits = "does not fit: use --pool file"
    if info.fits_ram_pool:
        fits = "fits with --expert-cache 100%, the pool itself"
    if info.largest_ram_pool_cache_bytes:
        fits = f"fits with a cache of up to {format_size(info.largest_ram_pool_cache_bytes)}"
    facts: dict[str, Any] = {
        "model": f"{info.path} ({info.model_type}, {info.dtype})",
        "layers": f"{info.num_layers}, {info.num_moe_layers} of them with experts",
        "experts": f"{info.num_experts} a layer, {info.top_k} for each token",
        "bytes per expert": f"{info.expert_bytes} ({format_size(info.expert_bytes)})",
        "all experts": format_size(info.expert_bytes_total),
        "everything else": format_size(info.other_bytes),
        "smallest legal cache": f"{info.smallest_cache_bytes} bytes "
        f"({info.smallest_cache_bytes / info.expert_bytes_total:.2%})",
        "available memory": f"{format_size(info.ram_available_bytes)} ({info.ram_source})",
        "pool in RAM": fits,
        "largest cache that fits": f"{format_size(info.largest_cache_bytes)} with --pool file "
        f"({info.largest_cache_bytes / info.expert_bytes_total:.0%} of the experts)",
    }
    width = max(map(len, facts))
    return "\n".join(f"{name.ljust(width)}  {fact}" for name, fact in facts.items())


def _say(message: str) -> None:
    print(message, file=sys.stderr, flush=True)  # noqa: T201
