"""Cutting a causal language model into blocks: what runs before the decoder layers, each layer, what runs after.

The pieces are found in the module tree of the unmodified model; nothing is traced or rewritten.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from fuyou.errors import ConfigError, ModelError

PROLOGUE, EPILOGUE = "prologue", "epilogue"


@dataclasses.dataclass(frozen=True)
class Block:
    """One piece of the model and the parameters it owns.

    A parameter used by two pieces (tied embeddings) is owned by the one that runs first; the other lists the owner
    in `borrows`.
    """

    name: str
    kind: str
    """"prologue", "layer" or "epilogue"."""
    parameters: tuple[str, ...]
    """Names as in `model.named_parameters()`, in that order."""
    borrows: tuple[str, ...] = ()
    """Names of other blocks whose parameters this one computes with too."""


@dataclasses.dataclass(frozen=True)
class ModelBlocks:
    """The blocks in the order of the forward pass, and how the layers were found."""

    path: str
    """Module path of the list of decoder layers."""
    blocks: tuple[Block, ...]
    reason: str
    num_experts_per_token: int | None = None
    """Of a mixture of experts, as its config says."""

    @property
    def layers(self) -> tuple[Block, ...]:
        """The decoder layers among the blocks."""
        return tuple(b for b in self.blocks if b.kind == "layer")


def find_blocks(model: nn.Module, path: str | None = None) -> ModelBlocks:
    """Find the decoder layers of `model` (on any device, also meta) and assign every parameter to a block.

    `path` names the list of layers where it cannot be found. ConfigError if `path` is wrong, ModelError if nothing
    was found or a parameter is shared in a way that cannot be streamed; both say what to do.
    """
    if path is not None:
        layers_path, reason = path, f"blocks={path!r} was given"
        try:
            layers = model.get_submodule(path)
        except AttributeError:
            raise ConfigError(f"blocks={path!r}: the model has no such module") from None
        if not isinstance(layers, nn.ModuleList) or len(layers) == 0:
            raise ConfigError(f"blocks={path!r}: expected a ModuleList of decoder layers, got {type(layers).__name__}")
    else:
        layers_path, reason = _find_layers(model)
        layers = model.get_submodule(layers_path)
        assert isinstance(layers, nn.ModuleList)
    config: Any = getattr(model, "config", None)
    per_token = None if config is None else getattr(config.get_text_config(), "num_experts_per_tok", None)
    return ModelBlocks(
        layers_path,
        _assign(model, layers_path, list(layers)),
        reason,
        per_token if isinstance(per_token, int) else None,
    )


def _find_layers(model: nn.Module) -> tuple[str, str]:
    """Path of the ModuleList that has most of four signals, two at the least, and which they were."""
    from transformers.modeling_layers import GradientCheckpointingLayer

    no_split = set(getattr(model, "_no_split_modules", None) or ())
    config: Any = getattr(model, "config", None)
    text_config = config.get_text_config() if hasattr(config, "get_text_config") else config
    num_layers = getattr(text_config, "num_hidden_layers", None)
    if getattr(config, "is_encoder_decoder", False):
        raise ModelError(f"{type(model).__name__} is an encoder-decoder model: only decoder-only models are supported")
    lists = {
        name: module for name, module in model.named_modules() if isinstance(module, nn.ModuleList) and len(module) > 0
    }
    # A list in a list of layers (experts, heads) is no second candidate.
    outermost = [name for name in lists if not any(name.startswith(f"{other}.") for other in lists)]
    inside = _decoder_prefix(model)
    found: list[tuple[int, str, str]] = []
    for name in outermost:
        if not name.startswith(inside):
            continue
        module, signals = lists[name], []
        if all(type(layer).__name__ in no_split for layer in module):
            signals.append("_no_split_modules")
        if all(isinstance(layer, GradientCheckpointingLayer) for layer in module):
            signals.append("GradientCheckpointingLayer")
        if len(module) == num_layers:
            signals.append("num_hidden_layers")
        if len(outermost) == 1:
            signals.append("being the only list of modules")
        found.append((len(signals), name, " and ".join(signals)))
    best = max((score for score, _, _ in found), default=0)
    chosen = [(name, signals) for score, name, signals in found if score == best]
    if best < 2 or len(chosen) != 1:
        candidates = ", ".join(repr(name) for _, name, _ in found) or "none"
        raise ModelError(
            f"the decoder layers of {type(model).__name__} were not found for certain (lists of modules: {candidates}); "
            f'name them: OffloadConfig(blocks="{found[0][1] if found else "model.layers"}")'
        )
    name, agreed = chosen[0]
    return name, f"{name} by {agreed}"


def _decoder_prefix(model: nn.Module) -> str:
    """Where the text decoder of a model with other towers is, as the beginning of its modules' names."""
    decoder: Any = model.get_decoder() if hasattr(model, "get_decoder") else None  # type: ignore[operator]
    for name, module in model.named_modules():
        if module is decoder and name and any(isinstance(m, nn.ModuleList) for m in module.modules()):
            return f"{name}."
    return ""


class _FirstLayerReached(BaseException):
    """Ends the look at what runs before the layers; not an Exception, so that no model code swallows it."""


def _modules_before_layers(model: nn.Module, first_layer: nn.Module) -> set[nn.Module] | None:
    """Modules whose forward is entered before the first layer's, seen in a forward pass; None if it cannot run.

    The pass runs on the host with parameters that take one element each, so that preparations which look at values
    (masks, positions) work although the model's own parameters are on the meta device.
    """
    entered: set[nn.Module] = set()

    def enter(module: nn.Module, _args: Any) -> None:
        if module is first_layer:
            raise _FirstLayerReached
        entered.add(module)

    hooks = [module.register_forward_pre_hook(enter) for module in model.modules()]
    try:
        with torch.random.fork_rng(devices=[]), torch.no_grad(), _stand_in_parameters(model):
            model(input_ids=torch.zeros((1, 2), dtype=torch.long))
    except _FirstLayerReached:
        return entered
    except Exception:  # whatever a model's preparation may raise on such inputs: the names decide then
        return None
    finally:
        for hook in hooks:
            hook.remove()
    return None


@contextlib.contextmanager
def _stand_in_parameters(model: nn.Module) -> Iterator[None]:
    """Parameters and buffers on the host inside this context, whatever the device of the model's own."""
    parameters = [(m._parameters, k, p) for m in model.modules() for k, p in m._parameters.items() if p is not None]
    buffers = [(m._buffers, k, b) for m in model.modules() for k, b in m._buffers.items() if b is not None]
    stand_ins: dict[int, nn.Parameter] = {}
    try:
        for holder, name, parameter in parameters:
            if id(parameter) not in stand_ins:
                data = torch.zeros(1, dtype=parameter.dtype).expand(parameter.shape)
                stand_ins[id(parameter)] = nn.Parameter(data, requires_grad=False)
            holder[name] = stand_ins[id(parameter)]
        for values, name, buffer in buffers:
            values[name] = torch.zeros_like(buffer, device="cpu") if buffer.device.type == "meta" else buffer.cpu()
        yield
    finally:
        for holder, name, parameter in parameters:
            holder[name] = parameter
        for values, name, buffer in buffers:
            values[name] = buffer


def _assign(model: nn.Module, path: str, layers: list[nn.Module]) -> tuple[Block, ...]:
    # Modules without parameters (activation functions) may be shared.
    inside = [(id(m), index) for index, layer in enumerate(layers) for m in layer.modules() if m._parameters]
    layer_of = dict(inside)
    if len(layer_of) != len(inside):
        raise ModelError(f"{type(model).__name__} uses the same module in several layers: this cannot be streamed")
    before = _modules_before_layers(model, layers[0])
    registered: list[str] = [name for name, _ in model.named_modules()]
    position = registered.index(path)

    def stage(module_name: str, module: nn.Module) -> int:
        """-1 prologue, a layer's index, or len(layers) for the epilogue."""
        if id(module) in layer_of:
            return layer_of[id(module)]
        if before is not None:
            return -1 if module in before else len(layers)
        embeddings = [e for e in (model.get_input_embeddings(),) if e is not None]  # type: ignore[operator]
        if module in embeddings or (registered.index(module_name) < position and "norm" not in module_name):
            return -1
        return len(layers)

    names = {id(p): name for name, p in model.named_parameters()}
    uses: dict[str, set[int]] = {name: set() for name in names.values()}
    for module_name, module in model.named_modules():
        for parameter in module._parameters.values():
            if parameter is not None:
                uses[names[id(parameter)]].add(stage(module_name, module))
    stages = [-1, *range(len(layers)), len(layers)]
    block_names = [PROLOGUE, *(f"{path}.{index}" for index in range(len(layers))), EPILOGUE]
    kinds = ["prologue", *("layer" for _ in layers), "epilogue"]
    owned: dict[int, list[str]] = {s: [] for s in stages}
    borrows: dict[int, set[int]] = {s: set() for s in stages}
    for name, used in uses.items():
        owner = min(used)
        if len(used) > 1 and used != {-1, len(layers)}:
            raise ModelError(
                f"{name} is shared by several blocks ({', '.join(block_names[s + 1] for s in sorted(used))}): only weights "
                "tied between the embedding and the head can be streamed"
            )
        owned[owner].append(name)
        for other in used - {owner}:
            borrows[other].add(owner)
    return tuple(
        Block(name, kind, tuple(owned[s]), tuple(block_names[o + 1] for o in sorted(borrows[s])))
        for s, name, kind in zip(stages, block_names, kinds, strict=True)
        if owned[s] or borrows[s] or kind != "layer"
    )


def _refuse_quantized(config: Any) -> None:
    if getattr(config, "quantization_config", None) is not None:
        raise ModelError(
            "a quantized checkpoint (its config has a quantization_config): all weights are trained in full precision here; "
            "take the original, or dequantize it in transformers and call save_pretrained once"
        )


@contextlib.contextmanager
def shape_model(config: Any, dtype: torch.dtype, **kwargs: Any) -> Iterator[nn.Module]:
    """Only the shapes of a config's model: parameters and buffers on the meta device, in well under a second.

    Errors as `meta_model`, which makes every parameter in host memory once, to tell what constructors set.
    """
    from transformers import AutoModelForCausalLM

    _refuse_quantized(config)
    with torch.random.fork_rng(devices=[]), torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=dtype, trust_remote_code=False, **kwargs)
    model.tie_weights()
    yield model


@contextlib.contextmanager
def meta_model(config: Any, dtype: torch.dtype, **kwargs: Any) -> Iterator[nn.Module]:
    """The model of a config with parameters on the meta device and real buffers (rotary tables and the like).

    ModelError for a config that cannot be trained. The caller's random numbers are not touched.
    """
    from accelerate import init_empty_weights
    from transformers import AutoModelForCausalLM

    _refuse_quantized(config)
    with (
        torch.random.fork_rng(devices=[]),
        _nan_in_new_memory(),
        init_empty_weights(include_buffers=False),
        _constructors_values_kept(),
    ):
        torch.manual_seed(0)
        try:
            model = AutoModelForCausalLM.from_config(config, dtype=dtype, trust_remote_code=False, **kwargs)
        except ValueError as error:
            kind = getattr(config, "model_type", type(config).__name__)
            raise ModelError(f"transformers makes no causal language model of this {kind} config: {error}") from error
    model.tie_weights()  # ties are lost while parameters are replaced by meta ones
    yield model


@contextlib.contextmanager
def _nan_in_new_memory() -> Iterator[None]:
    """torch.empty gives NaN: what no constructor has set is then told from what one has."""
    enabled, warn_only = (
        torch.are_deterministic_algorithms_enabled(),
        torch.is_deterministic_algorithms_warn_only_enabled(),
    )
    settings: Any = torch.utils.deterministic  # its attributes are unknown to the type checker
    filled = settings.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True, warn_only=True)
    settings.fill_uninitialized_memory = True
    try:
        yield
    finally:
        settings.fill_uninitialized_memory = filled
        torch.use_deterministic_algorithms(enabled, warn_only=warn_only)


MOST_ELEMENTS_KEPT = 65_536
"""Of a parameter whose value some class sets in its constructor only: scales, biases, activation parameters."""


CONSTRUCTED_VALUES = "_fuyou_constructed_values"
"""Attribute of modules, until the executor takes over: parameters' values by name."""


@contextlib.contextmanager
def _constructors_values_kept() -> Iterator[None]:
    """What a module's constructor gave small parameters is kept beside them when they become meta ones.

    Inside accelerate's `init_empty_weights`, in the same way as that: by the registration of parameters.
    """
    register_on_meta = nn.Module.register_parameter

    def register(module: nn.Module, name: str, parameter: nn.Parameter | None) -> None:
        value = None
        if parameter is not None and parameter.numel() <= MOST_ELEMENTS_KEPT and parameter.device.type == "cpu":
            value = parameter.detach().clone()
        register_on_meta(module, name, parameter)
        if value is not None:
            module.__dict__.setdefault(CONSTRUCTED_VALUES, {})[name] = value

    nn.Module.register_parameter = register  # type: ignore[assignment, method-assign]
    try:
        yield
    finally:
        nn.Module.register_parameter = register_on_meta  # type: ignore[method-assign]
