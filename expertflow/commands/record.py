"""`expertflow record`: the routing of a text as a trace."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

from .options import positive


def add_parser(commands: Any) -> None:
    """Add the command to the parser of the command line."""
    parser = commands.add_parser(
        "record",
        help="record the routing of a text",
        description="Run a model over a text and store what its routers did as a trace, with "
        "which `expertflow simulate` replays it on other machines.",
    )
    parser.add_argument("model", metavar="MODEL", help="directory or Hub id")
    parser.add_argument("--text", required=True, type=Path, metavar="FILE", help="UTF-8")
    parser.add_argument("--out", required=True, type=Path, metavar="TRACE.npz")
    parser.add_argument(
        "--tokens", type=positive, metavar="N", help="of the text (default: all of it)"
    )
    parser.add_argument(
        "--predictions",
        action="store_true",
        help="add what the predictor foresees up to 8 layers ahead, learning as it goes",
    )
    parser.add_argument("--expert-cache", default="25%", metavar="SIZE")
    parser.add_argument("--pool", choices=("ram", "file"), default="ram")
    parser.add_argument("--dtype", default="auto")
    parser.set_defaults(run=_run)


def _run(options: argparse.Namespace) -> int:
    import numpy as np
    import torch
    from transformers import AutoTokenizer

    from ..loading import from_pretrained
    from ..record import record

    text = options.text.read_text(encoding="utf-8")
    if not options.out.parent.is_dir():
        raise FileNotFoundError(f"there is no directory {options.out.parent} to write the trace to")
    tokenizer = AutoTokenizer.from_pretrained(options.model)
    token_ids = torch.tensor(tokenizer(text, verbose=False)["input_ids"], dtype=torch.int64)
    token_ids = token_ids[: options.tokens]
    if len(token_ids) == 0:
        raise ValueError(f"{options.text} has no text to record")
    model = from_pretrained(
        options.model,
        expert_cache=options.expert_cache,
        pool=options.pool,
        dtype=options.dtype,
        progress=sys.stderr.isatty(),
    )
    arrays = record(model, token_ids, predictions=options.predictions)
    part = options.out.with_name(options.out.name + ".part")
    try:
        with part.open("wb") as file:
            np.savez_compressed(file, **arrays)  # type: ignore[arg-type]
        part.replace(options.out)
    finally:
        part.unlink(missing_ok=True)
    tokens, layers, top_k = arrays["expert_ids"].shape
    message = f"{options.out}: {tokens} tokens, {layers} layers, top-{top_k}"
    print(message, file=sys.stderr)
    return 0
