"""Finds the files of a model: a local directory, or a Hub id as transformers resolves it."""

from __future__ import annotations

import os
from collections.abc import MutableMapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .errors import UnsupportedModelError
from .unsupported import GGUF_REFUSAL

_HUB_ARGUMENTS = (
    "cache_dir",
    "force_download",
    "local_files_only",
    "proxies",
    "revision",
    "subfolder",
    "token",
)


@dataclass(frozen=True, slots=True)
class ModelFiles:
    """Files of one model, all of the same revision."""

    path: str  # as given: a directory or a Hub id
    config_file: Path | None  # None if there is none (then the caller needs a config object)
    weights_file: Path  # *.safetensors, or *.safetensors.index.json beside its shards
    hub_arguments: dict[str, Any]  # for transformers, the revision pinned to the commit found


def pop_hub_arguments(arguments: MutableMapping[str, Any]) -> dict[str, Any]:
    """Take the arguments that say where on the Hub a model is out of `arguments`."""
    return {name: arguments.pop(name) for name in _HUB_ARGUMENTS if name in arguments}


def find_config_file(path: str | os.PathLike[str], hub_arguments: dict[str, Any]) -> Path | None:
    """The config.json of a model, downloaded if need be; None if it has none.

    Raises FileNotFoundError for a directory that does not exist, UnsupportedModelError for a
    single file, and what transformers raises for a Hub id that cannot be reached.
    """
    from transformers.utils.hub import cached_file

    name = os.fspath(path)
    if name.endswith(".gguf"):
        raise UnsupportedModelError(f"{name}: {GGUF_REFUSAL}")
    if Path(name).is_file():
        raise NotADirectoryError(f"{name} is a file; give the directory that holds config.json.")
    if not Path(name).is_dir() and (isinstance(path, os.PathLike) or _is_local_path(name)):
        raise FileNotFoundError(f"{name}: no such model directory.")
    found = cached_file(
        name, "config.json", **hub_arguments, _raise_exceptions_for_missing_entries=False
    )
    if found is None and not Path(name).is_dir():
        revision = hub_arguments.get("revision") or "main"
        raise FileNotFoundError(
            f"{name}: no config.json at revision {revision!r}, neither on the Hub nor in its local "
            "cache (offline mode and local_files_only see only the cache)."
        )
    return None if found is None else Path(found)


def find_model_files(
    path: str | os.PathLike[str],
    config_file: Path | None,
    hub_arguments: dict[str, Any],
    *,
    weights_name: str | None = None,
    variant: str | None = None,
) -> ModelFiles:
    """Find the weights (and download them), the single file before the sharded one.

    `weights_name` is the file name that a config may give (`transformers_weights`). Raises
    FileNotFoundError or UnsupportedModelError if there are no safetensors.
    """
    from transformers.utils.hub import cached_file, get_checkpoint_shard_files

    name, arguments = os.fspath(path), _pin_revision(config_file, hub_arguments)
    names = [weights_name] if weights_name else _default_names(variant)
    weights_file = None
    for candidate in names:
        found = cached_file(
            name, candidate, **arguments, _raise_exceptions_for_missing_entries=False
        )
        if found is not None:
            weights_file = Path(found)
            break
    if weights_file is None:
        raise _no_weights(name, names, arguments)
    arguments = _pin_revision(weights_file, arguments)
    if weights_file.suffix == ".json" and not Path(name).is_dir():
        get_checkpoint_shard_files(name, str(weights_file), **arguments)
    arguments.pop("force_download", None)  # done once
    return ModelFiles(name, config_file, weights_file, arguments)


def _default_names(variant: str | None) -> list[str]:
    infix = f".{variant}" if variant else ""
    return [f"model{infix}.safetensors", f"model.safetensors.index{infix}.json"]


def _is_local_path(name: str) -> bool:
    """Whether a name can only be meant as a path: not "model" and not "organization/model"."""
    return name.startswith((".", "/", "~", "\\")) or name.count("/") > 1 or "\\" in name


def _pin_revision(file: Path | None, hub_arguments: dict[str, Any]) -> dict[str, Any]:
    """Have the other files read at the commit that `file` of the Hub cache was found at."""
    parts = file.parts if file is not None else ()
    if "snapshots" not in parts or "models--" not in str(file):
        return dict(hub_arguments)
    commit = parts[len(parts) - 1 - parts[::-1].index("snapshots") + 1]
    return {**hub_arguments, "revision": commit}


def _no_weights(name: str, names: list[str], arguments: dict[str, Any]) -> Exception:
    """The error for a model without safetensors; names what is there instead."""
    wanted = " or ".join(names)
    directory = Path(name, arguments.get("subfolder") or "")
    present = {file.name for file in directory.iterdir()} if directory.is_dir() else set()
    if any(file.endswith(".gguf") for file in present):
        return UnsupportedModelError(f"{name}: {GGUF_REFUSAL}")
    if others := sorted(file for file in present if file.endswith((".bin", ".pt", ".pth", ".h5"))):
        return UnsupportedModelError(
            f"{name}: no {wanted}, only {others[0]}. ExpertFlow reads safetensors; convert with "
            "AutoModelForCausalLM.from_pretrained(...).save_pretrained(...)."
        )
    return FileNotFoundError(
        f"{name}: no {wanted} there. ExpertFlow needs a safetensors checkpoint; finish the "
        "download, or convert the model with transformers' save_pretrained."
    )
