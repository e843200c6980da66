"""A transformers model whose experts are streamed, and which says what it cannot do.

The experts are not parameters of the model. Whatever copies, saves, moves or trains parameters
would silently do so without them; here each such method either works or says what to do instead.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from typing import Any

import torch

from .errors import UnsupportedModelError


class StreamedModel:
    """What is put before a transformers model class; see `streamed_model_class`.

    While `expert_cache` is None, that is while transformers still builds and fills the model,
    it behaves as the plain class.
    """

    expert_cache: Any = None  # the expertflow.cache.ExpertCache that all MoE layers share
    expert_checkpoint: str = ""  # where the experts are read from

    def state_dict(self, *args: Any, **kwargs: Any) -> Any:
        """Refused, except for a wrapper (PeftModel) that collects its own weights."""
        if self.expert_cache is None or args or kwargs.get("destination") is not None:
            return super().state_dict(*args, **kwargs)  # type: ignore[misc]
        raise self._without_experts(
            "state_dict()", "For the rest of the model, call the state_dict() of its modules."
        )

    def save_pretrained(self, *args: Any, **kwargs: Any) -> Any:
        """Refused."""
        raise self._without_experts(
            "save_pretrained()", "An adapter is saved by PeftModel.save_pretrained()."
        )

    def push_to_hub(self, *args: Any, **kwargs: Any) -> Any:
        """Refused."""
        raise self._without_experts("push_to_hub()", "")

    def _without_experts(self, method: str, advice: str) -> UnsupportedModelError:
        return UnsupportedModelError(
            f"{method} of a streamed model would leave out its experts. They are unchanged in "
            f"{self.expert_checkpoint}: copy that checkpoint instead. {advice}".strip()
        )

    def train(self, mode: bool = True) -> Any:
        """Refused, unless `mode` is False: eval() calls it so."""
        if mode and self.expert_cache is not None:
            raise UnsupportedModelError(
                "A streamed model can be used, not trained. Train with transformers, or attach "
                "an adapter that was trained there."
            )
        return super().train(mode)  # type: ignore[misc]

    def _apply(self, fn: Callable[..., Any], recurse: bool = True) -> Any:
        """Behind to(), cuda(), half(), float(), ...: refused where it would change anything."""
        if self.expert_cache is not None:
            _refuse_conversion(fn, next(self.parameters()))  # type: ignore[attr-defined]
        return super()._apply(fn, recurse)  # type: ignore[misc]

    def __deepcopy__(self, memo: Any) -> Any:
        raise self._not_copied()

    def __reduce_ex__(self, protocol: Any) -> Any:
        raise self._not_copied()

    def _not_copied(self) -> UnsupportedModelError:
        return UnsupportedModelError(
            "A streamed model cannot be copied or pickled, because its expert cache belongs to "
            f"this process. Call expertflow.from_pretrained({self.expert_checkpoint!r}, ...) again."
        )


def streamed_model_class(model_class: type[Any], expert_modules: Iterable[str]) -> type[Any]:
    """A subclass of a transformers model class for models whose experts are streamed.

    It keeps the name of the class, by which transformers and peft know models, and does not
    report the tensors of `expert_modules` as left over when a checkpoint is loaded.
    """
    prefix = f"{model_class.base_model_prefix}."
    names = "|".join(re.escape(name.removeprefix(prefix)) for name in expert_modules)
    ignored = [*(model_class._keys_to_ignore_on_load_unexpected or ())]
    ignored.append(rf"^(?:{re.escape(prefix)})?(?:{names})\.")
    attributes = {
        "__module__": model_class.__module__,
        "__doc__": model_class.__doc__,
        "_keys_to_ignore_on_load_unexpected": ignored,
    }
    return type(model_class.__name__, (StreamedModel, model_class), attributes)


def _refuse_conversion(fn: Callable[..., Any], parameter: torch.Tensor) -> None:
    """Refuse an `fn` of nn.Module._apply that would change device or dtype."""
    advice = "load it again with expertflow.from_pretrained(..., device=, dtype=)."
    probe = torch.zeros(1, dtype=parameter.dtype, device=parameter.device)
    try:
        result = fn(probe)
    except Exception as error:
        raise UnsupportedModelError(f"A streamed model cannot be moved; {advice}") from error
    for what, before, after in (
        ("moved", probe.device, result.device),
        ("converted", probe.dtype, result.dtype),
    ):
        if before != after:
            raise UnsupportedModelError(
                f"A streamed model cannot be {what} from {before} to {after}; {advice}"
            )
