"""The experts of one MoE layer, computed while they arrive.

The output is the same bits whatever the cache holds: tokens are cut into blocks by their number
alone, an expert gets all its tokens of a block in one product, and what the experts return is
summed in the order of the router. Products, biases, weights and sum are rounded where transformers'
grouped_mm and batched_mm round them, so that in bf16 the logits are as good as theirs: mostly the
same bits.
"""

from collections.abc import Callable, Mapping
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.nn import functional

from . import ops
from .cache import ExpertCache, ExpertMlp
from .errors import UnsupportedModelError
from .foreseeing import Predictor, begin_foreseeing, prefetch_foreseen
from .grouped import GroupedMlp, can_group, compute_grouped
from .slots import ExpertWeights
from .unsupported import refuse_conversion

_MAX_PARTIAL_BYTES = 256 << 20  # of the outputs of all experts, before they are summed


def compute_experts(
    cache: ExpertCache,
    layer: int,
    hidden_states: Tensor,
    expert_ids: Tensor,
    expert_weights: Tensor,
    expert_mlp: ExpertMlp,
    grouped_mlp: GroupedMlp | None = None,
    on_planned: Callable[[], None] | None = None,
) -> Tensor:
    """Return the weighted sum over each token's experts, [tokens, hidden].

    Args:
        cache: where the experts are.
        layer: MoE layer, counted over the MoE layers only.
        hidden_states: [tokens, hidden], in the dtype of the experts.
        expert_ids: [tokens, k] integers.
        expert_weights: [tokens, k], any floating dtype.
        expert_mlp: one expert.
        grouped_mlp: several experts, if `can_group(cache)`; used for many tokens.
        on_planned: called once, when the first missing experts are on their way; the place to
            prefetch.

    Raises:
        TransferError: an expert could not be read.
    """
    expert_ids = expert_ids.to(torch.int64).contiguous()
    num_tokens, top_k = expert_ids.shape
    bytes_per_token = max(1, top_k * hidden_states.shape[-1] * hidden_states.element_size())
    block = max(1, _MAX_PARTIAL_BYTES // bytes_per_token)
    outputs = []
    with cache.lock:
        for start in range(0, num_tokens, block):
            tokens = slice(start, start + block)
            rows = ops.plan(cache.handle, expert_ids[tokens], layer).tolist()
            if on_planned is not None:
                on_planned()
            output = _compute_block(
                cache,
                rows,
                hidden_states[tokens],
                expert_ids[tokens],
                expert_weights[tokens],
                expert_mlp,
                grouped_mlp,
            )
            on_planned = None
            outputs.append(output)
    if not outputs:
        return hidden_states.new_zeros(hidden_states.shape)
    return outputs[0] if len(outputs) == 1 else torch.cat(outputs)


def _compute_block(
    cache: ExpertCache,
    rows: list[list[int]],
    hidden_states: Tensor,
    expert_ids: Tensor,
    expert_weights: Tensor,
    expert_mlp: ExpertMlp,
    grouped_mlp: GroupedMlp | None,
) -> Tensor:
    """Compute the rows of a plan: [tokens, hidden]."""
    num_tokens, top_k = expert_ids.shape
    is_decode = num_tokens <= ops.MAX_COMPUTE_TOKENS and num_tokens * top_k <= ops.MAX_COMPUTE_PAIRS
    if cache.mlp_hidden is not None and is_decode:
        return ops.compute(cache.handle, hidden_states.contiguous(), expert_weights.contiguous())
    if grouped_mlp is not None:
        partial = compute_grouped(cache, rows, hidden_states, expert_ids, grouped_mlp)
        if expert_weights.dtype in (hidden_states.dtype, torch.float32):
            return ops.weighted_sum(partial, expert_weights.contiguous())
    else:
        partial = _compute_rows(cache, rows, hidden_states, expert_ids, expert_mlp)
    weighted = partial.view(num_tokens, top_k, -1) * expert_weights.unsqueeze(-1)
    return weighted.sum(dim=1).to(hidden_states.dtype)


def _compute_rows(
    cache: ExpertCache,
    rows: list[list[int]],
    hidden_states: Tensor,
    expert_ids: Tensor,
    expert_mlp: ExpertMlp,
) -> Tensor:
    """Return what each expert makes of each of its tokens, [tokens * k, hidden]."""
    num_tokens, top_k = expert_ids.shape
    partial = hidden_states.new_empty(num_tokens * top_k, hidden_states.shape[-1])
    places = _places_by_expert(expert_ids, rows)
    for index, (expert, slot, state, _, next_row, _) in enumerate(rows):
        if state != ops.HIT:
            ops.wait(cache.handle, index)
        place = places[expert]
        tokens = hidden_states if num_tokens == 1 else hidden_states[place // top_k]
        partial[place] = expert_mlp(tokens, cache.slots.weights(slot))
        if next_row != ops.NO_ROW:
            ops.release(cache.handle, index)
    return partial


def _places_by_expert(expert_ids: Tensor, rows: list[list[int]]) -> dict[int, Tensor]:
    """Return for each expert where it stands in the flattened `expert_ids`, ascending."""
    order = expert_ids.view(-1).argsort(stable=True)
    counts = {row[ops.EXPERT]: row[ops.COUNT] for row in rows}
    experts = sorted(counts)
    pieces = order.split([counts[expert] for expert in experts])
    return dict(zip(experts, pieces, strict=True))


def _silu_gate(gate_up: Tensor) -> Tensor:
    gate, up = gate_up.chunk(2, dim=-1)
    return functional.silu(gate) * up


def _gpt_oss_gate(gate_up: Tensor) -> Tensor:
    gate, up = gate_up[..., ::2].clamp(max=7.0), gate_up[..., 1::2].clamp(-7.0, 7.0)
    return (up + 1) * gate * torch.sigmoid(1.702 * gate)


class StreamedExperts(nn.Module):
    """Stands in for a model's experts module: same call, no parameters.

    The weights come from an `ExpertCache`; `bind` must be called before the first forward pass.
    """

    segment_shapes: dict[str, tuple[int, ...]]
    serves_adapter = False  # state_dict() is called for the sake of an adapter

    def __init__(self, template: nn.Module) -> None:
        """Take activation and shapes from `template`, an original module on the meta device."""
        super().__init__()
        parameters = dict(template.named_parameters(recurse=False))
        self.segment_shapes = {name: tuple(p.shape[1:]) for name, p in parameters.items()}
        self.num_experts = next(iter(parameters.values())).shape[0]
        self.is_transposed: bool = getattr(template, "is_transposed", False)
        for name in parameters:
            delattr(template, name)
        self._apply_gate: Callable[[Tensor], Tensor] = template._apply_gate  # type: ignore[assignment]
        self.cache: ExpertCache | None = None
        self.layer_index = -1
        self._can_group = False
        self.predictor: Predictor | None = None

    def bind(self, cache: ExpertCache, layer_index: int) -> None:
        """Take the experts from MoE layer `layer_index` of `cache`."""
        self.cache = cache
        self.layer_index = layer_index
        self._can_group = can_group(cache)
        cache.layers[layer_index] = self

    def mlp_hidden(self) -> int | None:
        """The hidden size if `ops.compute` knows these experts, else None.

        It knows one activation for each layout: gates are tried out, not recognized by name.
        """
        gate_up, down = self.segment_shapes["gate_up_proj"], self.segment_shapes["down_proj"]
        has_bias = "down_proj_bias" in self.segment_shapes
        if any(size % 8 for size in (*gate_up, *down)) or has_bias != self.is_transposed:
            return None
        probe = torch.linspace(-9, 9, 32).view(2, 16)
        expected = (_gpt_oss_gate if has_bias else _silu_gate)(probe)
        if not torch.allclose(self._apply_gate(probe), expected):
            return None
        return down[1] if self.is_transposed else down[0]

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        """Refused: there is nothing to save. A PeftModel takes only the adapter's tensors."""
        if self.cache is not None and not self.serves_adapter and "base_model." not in prefix:
            raise UnsupportedModelError(
                "state_dict() of a streamed model would leave out its experts. They are unchanged "
                "in the checkpoint: copy that instead. For the rest of the model, call the "
                "state_dict() of the modules beside the experts."
            )
        super()._save_to_state_dict(destination, prefix, keep_vars)

    def _apply(self, fn: Callable[..., Any], recurse: bool = True) -> Self:
        """Behind half(), to(), ... of a part of the model: refused where it would change it.

        torch asks one module after the other: those before the experts have changed by then.
        """
        if self.cache is not None:
            dtype = getattr(torch, self.cache.layout.segments[0][1])
            refuse_conversion(fn, torch.empty(0, dtype=dtype))
        return super()._apply(fn, recurse)

    def expert_mlp(self, tokens: Tensor, weights: ExpertWeights) -> Tensor:
        """One expert: [n, H] -> [n, H]."""
        gate_up = self._linear(tokens, weights, "gate_up_proj")
        return self._linear(self._apply_gate(gate_up), weights, "down_proj")

    def _linear(self, x: Tensor, weights: ExpertWeights, role: str) -> Tensor:
        weight = weights[role].t() if self.is_transposed else weights[role]
        output, bias = functional.linear(x, weight), weights.get(role + "_bias")
        return output if bias is None else output + bias

    def grouped_mlp(
        self, tokens: Tensor, weights: ExpertWeights, counts: Tensor, ends: Tensor
    ) -> Tensor:
        """Several experts, see `grouped.GroupedMlp`."""
        gate_up = self._grouped_linear(tokens, weights, "gate_up_proj", counts, ends)
        return self._grouped_linear(self._apply_gate(gate_up), weights, "down_proj", counts, ends)

    def _grouped_linear(
        self, x: Tensor, weights: ExpertWeights, role: str, counts: Tensor, ends: Tensor
    ) -> Tensor:
        weight = weights[role] if self.is_transposed else weights[role].transpose(1, 2)
        output, bias = functional.grouped_mm(x, weight, offs=ends), weights.get(role + "_bias")
        if bias is None:
            return output
        return output + bias.repeat_interleave(counts, dim=0, output_size=len(x))

    def compute(self, hidden_states: Tensor, expert_ids: Tensor, expert_weights: Tensor) -> Tensor:
        """[T, H], [T, K], [T, K] -> [T, H], with the experts of the cache."""
        assert self.cache is not None
        cache = self.cache
        with cache.lock:
            begin_foreseeing(self.predictor, self.layer_index, hidden_states)
            return compute_experts(
                cache,
                self.layer_index,
                hidden_states,
                expert_ids,
                expert_weights,
                self.expert_mlp,
                self.grouped_mlp if self._can_group else None,
                on_planned=lambda: prefetch_foreseen(
                    self.predictor, cache, self.layer_index, hidden_states
                ),
            )

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """[T, H], [T, K], [T, K] -> [T, H]."""
        if self.cache is None:
            raise RuntimeError(
                "the experts of this layer are not bound to a cache: use expertflow.from_pretrained"
            )
        if torch.is_grad_enabled() and hidden_states.requires_grad:
            raise NotImplementedError(
                "expertflow computes experts without gradients: wrap the call in torch.no_grad(), "
                "or train with plain transformers"
            )
        if torch.compiler.is_compiling():
            return _experts_op(
                self.cache.handle, hidden_states, top_k_index, top_k_weights, self.layer_index
            )
        if torch.is_autocast_enabled(hidden_states.device.type):
            return self._without_autocast(hidden_states, top_k_index, top_k_weights)
        return self.compute(hidden_states, top_k_index, top_k_weights)

    def _without_autocast(
        self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor
    ) -> Tensor:
        """Compute in the dtype of the experts: casting them for each token would cost more."""
        assert self.cache is not None
        with torch.autocast(hidden_states.device.type, enabled=False):
            output = self.forward(hidden_states.to(self.cache.dtype), top_k_index, top_k_weights)
        return output.to(hidden_states.dtype)


def refuse_loading_experts(model: nn.Module) -> None:
    """Have load_state_dict() of `model` and of its parts refuse experts, before it loads anything.

    With strict=False torch would drop them.
    """
    for module in model.modules():
        if any(isinstance(part, StreamedExperts) for part in module.modules()):
            module.register_load_state_dict_pre_hook(_refuse_given_experts)


def _refuse_given_experts(
    module: nn.Module, state_dict: Mapping[str, Any], prefix: str, *_: Any
) -> None:
    """A hook of load_state_dict(), where `module` is called `prefix`."""
    inside = tuple(
        f"{prefix}{name}." if name else prefix
        for name, part in module.named_modules()
        if isinstance(part, StreamedExperts)
    )
    if given := sorted(name for name in state_dict if name.startswith(inside)):
        raise UnsupportedModelError(
            f"load_state_dict() of a streamed model would leave out its experts, such as "
            f"{given[0]}: they are read from the checkpoint. Save the weights as a checkpoint "
            "with transformers and load that with expertflow.from_pretrained."
        )


# It reads back from the device: no CUDA graph can hold it, so inductor cuts its graphs around it.
@torch.library.custom_op(
    "expertflow::experts", mutates_args=("cache",), tags=[torch.Tag.cudagraph_unsafe]
)
def _experts_op(
    cache: Tensor, hidden_states: Tensor, expert_ids: Tensor, expert_weights: Tensor, layer: int
) -> Tensor:
    """`compute_experts` as one node of a compiled graph."""
    layers = ExpertCache.of_handle(cache).layers
    return layers[layer].compute(hidden_states, expert_ids, expert_weights)


@_experts_op.register_fake
def _(
    cache: Tensor, hidden_states: Tensor, expert_ids: Tensor, expert_weights: Tensor, layer: int
) -> Tensor:
    return hidden_states.new_empty(hidden_states.shape)


def streamed_class(original: type[nn.Module]) -> type[StreamedExperts]:
    """Return the class to build in place of `original`, a transformers class of experts."""

    def init(self: StreamedExperts, *args: object, **kwargs: object) -> None:
        with torch.device("meta"):
            template = original(*args, **kwargs)
        StreamedExperts.__init__(self, template)

    return type(f"Streamed{original.__name__}", (StreamedExperts,), {"__init__": init})
