"""A transformers model whose experts are streamed, and which says what it cannot do.

The experts are not parameters of the model. Whatever copies, saves, moves or trains parameters
would silently do so without them; here each such method either works or says what to do instead.
"""

from __future__ import annotations

import contextlib
import os
import re
import sys
from collections.abc import Callable, Iterator
from typing import Any

import torch

from .biased_hooks import bias_routers
from .biased_routing import BiasedRouter, BiasedRouting, check_routing
from .cache import ExpertCache
from .cache_size import (
    CacheSize,
    ModelSizes,
    check_cache_fits,
    check_cuda_cache_fits,
    size_cache,
)
from .errors import UnsupportedModelError
from .experts import StreamedExperts, streamed_class
from .families import ModelSkeleton, transformers_lock
from .memory import available_memory
from .predictor import ExpertPredictor
from .routers import find_routers
from .unsupported import refuse_conversion


class StreamedModel:
    """What is put before a transformers model class; see `streamed_model_class`.

    While `expert_cache` is None, that is while transformers still builds and fills the model,
    it behaves as the plain class.
    """

    expert_cache: Any = None  # the expertflow.cache.ExpertCache that all MoE layers share
    experts_class: type[Any]  # in transformers
    expert_checkpoint: str = ""  # where the experts are read from
    expert_parameters: frozenset[str] = frozenset()  # names that the experts have elsewhere
    predictor: ExpertPredictor | None = None  # of what to prefetch
    _routing_hooks: tuple[Any, ...] = ()  # of biased routing
    _embedding_hook: Any = None  # of the predictor
    sizes: ModelSizes
    pool: str  # "ram" or "file"
    ram_limit: str | float | int | None = None  # as given to from_pretrained

    def __init__(self, config: Any, *args: Any, **kwargs: Any) -> None:
        """Build the model as transformers does, with streamed experts."""
        with _streamed_experts(self.experts_class):
            super().__init__(config, *args, **kwargs)  # type: ignore[call-arg]

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Refused in a forked child: torch may hang there before the experts would refuse."""
        if self.expert_cache is not None:
            self.expert_cache.check_process()
        return super().__call__(*args, **kwargs)  # type: ignore[misc]

    def set_expert_cache(
        self,
        expert_cache: str | float | int,
        *,
        policy: str | None = None,
        cache_scope: str | None = None,
    ) -> None:
        """Replace the cache by an empty one of another size or policy; the pool stays as it is.

        Takes `expert_cache`, `policy` and `cache_scope` as `from_pretrained` does, and raises the
        same ValueError and MemoryError; what is left out stays as it is.
        """
        old = self.expert_cache
        policy = old.policy if policy is None else policy
        scope = old.scope if cache_scope is None else cache_scope
        on_cuda = old.device.type == "cuda"
        size = size_cache(self.sizes, expert_cache, self.pool, policy, scope, on_cuda=on_cuda)
        if on_cuda:
            self._replace_cuda_cache(size)
            return
        available = available_memory(self.ram_limit, held_bytes=self._held_bytes())
        check_cache_fits(size, available, pool_is_fixed=True)
        self._bind(old.resized(size.num_slots, policy, scope))

    def _replace_cuda_cache(self, size: CacheSize) -> None:
        """Free the old cache first: there is seldom room for two."""
        old = self.expert_cache
        torch.cuda.empty_cache()
        free_bytes = torch.cuda.mem_get_info(old.device)[0] + old.num_bytes
        check_cuda_cache_fits(size, free_bytes + self.sizes.other_bytes, old.device)
        with old.lock:  # no other thread is within a layer
            old.close()
            try:
                self._bind(old.resized(size.num_slots, size.policy, size.scope))
            except BaseException:
                self._bind(old.resized(old.num_slots, old.policy, old.scope))
                raise

    def _bind(self, cache: ExpertCache) -> None:
        self.expert_cache = cache
        if cache.biased_router is not None:
            cache.biased_router.reset_counts()
        for module in self.modules():  # type: ignore[attr-defined]
            if isinstance(module, StreamedExperts):
                module.bind(cache, module.layer_index)

    def set_predictor(self, predictor: ExpertPredictor | None) -> None:
        """Prefetch what `predictor` foresees; None prefetches nothing."""
        self.predictor = predictor
        if self._embedding_hook is not None:
            self._embedding_hook.remove()
            self._embedding_hook = None
        if predictor is not None:
            embedding = self.get_input_embeddings()  # type: ignore[attr-defined]
            self._embedding_hook = embedding.register_forward_hook(self._begin_token)
        for module in self.modules():  # type: ignore[attr-defined]
            if isinstance(module, StreamedExperts):
                module.predictor = predictor
        if predictor is None:  # and the cache forgets which layers' misses prefetch had hidden
            self.expert_cache.set_horizon(self.expert_cache.chosen_horizon)

    def _begin_token(self, embedding: Any, arguments: Any, embeddings: torch.Tensor) -> None:
        """The hook of the input embeddings, from which the first layers are foreseen.

        Without it, as with inputs_embeds, nothing foresees them.
        """
        predictor, cache = self.predictor, self.expert_cache
        if torch.compiler.is_compiling() or predictor is None:
            return
        is_pass = embeddings.dim() == 3 and embeddings.shape[-1] == predictor.hidden_size
        if not is_pass or embeddings.numel() == 0:
            return
        with cache.lock:
            horizon = cache.begin_token(embeddings.shape[0] * embeddings.shape[1])
            cache.prefetch_predicted(predictor.foresee_token(embeddings, horizon))

    def set_routing(self, routing: str | BiasedRouting) -> None:
        """Route exactly with "exact", or in favour of the cache with a `BiasedRouting`.

        What was compiled before is compiled anew. Raises ValueError for another value,
        UnsupportedModelError where routers cannot be biased.
        """
        check_routing(routing)
        hooks, biased = [], None
        if isinstance(routing, BiasedRouting):
            biased = BiasedRouter(find_routers(self), routing)  # type: ignore[arg-type]
            hooks = bias_routers(self)
        for hook in self._routing_hooks:
            hook.remove()
        if hooks and not self._routing_hooks and "torch._dynamo" in sys.modules:
            torch.compiler.reset()  # it does not guard against hooks where there were none
        self._routing_hooks = tuple(hooks)
        self.expert_cache.biased_router = biased

    def save_predictor(self, path: str | os.PathLike[str]) -> None:
        """Save what the predictor has learned about the model, as a safetensors file."""
        with self.expert_cache.lock:  # no pass is under way
            self._required_predictor().save(path)

    def load_predictor(self, path: str | os.PathLike[str]) -> None:
        """Go on with what `save_predictor` saved of the same model.

        Raises FileNotFoundError, CheckpointError for a damaged file, and ValueError for one that
        was saved for another model.
        """
        with self.expert_cache.lock:
            self._required_predictor().load(path)

    def _required_predictor(self) -> ExpertPredictor:
        if self.predictor is None:
            raise ValueError(
                'this model was loaded without a predictor: use from_pretrained(prefetch="auto")'
            )
        return self.predictor

    def _held_bytes(self) -> int:
        """Memory that the model takes now. A slot takes none before its first expert arrives."""
        old = self.expert_cache
        size = CacheSize(self.sizes, old.num_slots, self.pool, old.policy, old.scope)
        filled_bytes = min(old.slots.num_used * self.sizes.slot_bytes, size.cache_bytes)
        return size.pool_bytes + filled_bytes + self.sizes.other_bytes

    def save_pretrained(self, *args: Any, **kwargs: Any) -> Any:
        """Refused, unless an adapter is loaded: then transformers saves only that."""
        if getattr(self, "_hf_peft_config_loaded", False):
            with self._serving_adapter():
                return super().save_pretrained(*args, **kwargs)  # type: ignore[misc]
        raise self._without_experts(
            "save_pretrained()", "An adapter is saved by PeftModel.save_pretrained()."
        )

    def load_adapter(self, *args: Any, **kwargs: Any) -> Any:
        """As in transformers; refused for adapters of experts."""
        with self._serving_adapter():
            return super().load_adapter(*args, **kwargs)  # type: ignore[misc]

    def get_adapter_state_dict(self, *args: Any, **kwargs: Any) -> Any:
        """As in transformers."""
        with self._serving_adapter():
            return super().get_adapter_state_dict(*args, **kwargs)  # type: ignore[misc]

    @contextlib.contextmanager
    def _serving_adapter(self) -> Iterator[None]:
        """Within, state_dict() leaves out the experts: an adapter has none."""
        experts = [m for m in self.modules() if isinstance(m, StreamedExperts)]  # type: ignore[attr-defined]
        before = [module.serves_adapter for module in experts]
        for module in experts:
            module.serves_adapter = True
        try:
            yield
        finally:
            for module, serves_adapter in zip(experts, before, strict=True):
                module.serves_adapter = serves_adapter

    def __setattr__(self, name: str, value: Any) -> None:
        """Peft ends its work by setting `peft_config`: refuse adapters that missed the experts."""
        if name == "peft_config":
            for config in value.values():
                self._refuse_adapter_of_experts(config)
        super().__setattr__(name, value)

    def _refuse_adapter_of_experts(self, config: Any) -> None:
        for target in getattr(config, "target_parameters", None) or ():
            if any(f".{name}".endswith(f".{target}") for name in self.expert_parameters):
                raise UnsupportedModelError(
                    f"The adapter changes {target}, that is the experts, which is not supported: "
                    "they are streamed from the checkpoint. Merge the adapter into the checkpoint "
                    "with transformers, then load the result."
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
            refuse_conversion(fn, next(self.parameters()))  # type: ignore[attr-defined]
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


def streamed_model_class(skeleton: ModelSkeleton, path: str) -> type[Any]:
    """A subclass of a transformers model class for one model whose experts are streamed.

    It keeps the name of the class, by which transformers and peft know models, and does not
    report the experts' tensors as left over when a checkpoint is loaded. `path` is the checkpoint.
    """
    model_class, modules = skeleton.model_class, skeleton.moe_layers
    prefix = f"{skeleton.base_model_prefix}."
    names = "|".join(re.escape(name.removeprefix(prefix)) for name in modules)
    ignored = [*(model_class._keys_to_ignore_on_load_unexpected or ())]
    ignored.append(rf"^(?:{re.escape(prefix)})?(?:{names})\.")
    attributes = {
        "__module__": model_class.__module__,
        "__doc__": model_class.__doc__,
        "_keys_to_ignore_on_load_unexpected": ignored,
        "experts_class": skeleton.experts_class,
        "expert_checkpoint": path,
        "expert_parameters": frozenset(
            f"{module}.{name}" for module in modules for name in skeleton.segment_shapes
        ),
    }
    return type(model_class.__name__, (StreamedModel, model_class), attributes)


@contextlib.contextmanager
def _streamed_experts(experts_class: type[Any]) -> Iterator[None]:
    """Within, transformers builds streamed experts in place of `experts_class`.

    transformers.monkey_patching would do the same to every module of transformers that mentions
    the class: that takes 0.4 s, and is not undone if building the model fails.
    """
    module, name = sys.modules[experts_class.__module__], experts_class.__name__
    with transformers_lock:
        setattr(module, name, streamed_class(experts_class))
        try:
            yield
        finally:
            setattr(module, name, experts_class)
