"""Adapters of a finished run: put around the model of a store again, and merged into its blocks, one in memory at a time."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn

from fuyou.adapters import BoundBlock, peft_configs, read_values
from fuyou.blocks import Block, ModelBlocks
from fuyou.errors import ModelError
from io_engine import BufferPool, Engine, Store, StoreError
from optim import ShardLayout


def restore_adapters(model: nn.Module, store: Store, engine: Engine) -> Any:
    """peft's model around `model` with the adapters that the store's run has trained, as they are committed; frozen.

    `model` itself for a store without adapters. Blocks. StoreError for adapters that this version of peft, or this model,
    does not take.
    """
    described: Any = store.state.get("adapters")
    if described is None:
        return model
    import peft

    shards = [ShardLayout.from_json(shard) for shard in described["shards"]]
    names = [slot.name for shard in shards for slot in shard.parameters]
    # Those that were there but not trained had their values from elsewhere.
    trained = [adapter for adapter in described["configs"] if any(f".{adapter}" in name for name in names)]
    # peft made them float32 then, whatever the base is; modules that are trained as a whole keep their own type.
    own_dtype = any(shard.compute_dtype == "float32" for shard in shards)
    wrapped: Any = None
    try:
        for adapter in trained:
            make: Any = peft.PeftConfig.from_peft_type
            config = make(**described["configs"][adapter])
            with torch.random.fork_rng(devices=[]):
                if wrapped is None:
                    wrapped = peft.get_peft_model(model, config, adapter, autocast_adapter_dtype=own_dtype)
                else:
                    wrapped.add_adapter(adapter, config, autocast_adapter_dtype=own_dtype)
        parameters = dict(model.named_parameters())
        largest = max(shard.weight_bytes for shard in shards)
        with BufferPool(largest + 2 * 2**20, name="adapters") as pool:
            for shard in shards:
                with pool.acquire(shard.weight_bytes) as buffer:
                    array = buffer.array[: shard.weight_bytes]
                    engine.read(store.extent(shard.weight_name), array).wait()
                    read_values(shard, array, parameters)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise StoreError(
            f"{store.directories[0]}: its adapters cannot be put around the model ({type(error).__name__}: "
            f"{str(error)[:200]}): use the version of peft that the run had"
        ) from error
    wrapped.requires_grad_(False)
    return wrapped


def merged_blocks(
    model: nn.Module, blocks: ModelBlocks, base: Mapping[str, nn.Parameter], bound: BoundBlock
) -> Callable[[Block], dict[str, torch.Tensor]]:
    """What reads a block's parameters with all active adapters merged into them, by peft's own arithmetic.

    `base` are the streamed parameters by name. The tensors are copies in host memory. ModelError, before anything is
    read, for what one checkpoint of the model cannot hold.
    """
    from peft.tuners.lora import LoraLayer
    from peft.utils import AuxiliaryTrainingWrapper, ModulesToSaveWrapper

    if not peft_configs(model):
        raise ModelError("this model has no adapters to merge: export it without merging")
    owner = {id(base[name]): block.name for block in blocks.blocks for name in block.parameters}
    names = {id(parameter): name for name, parameter in base.items()}
    layers: dict[str, list[Any]] = {block.name: [] for block in blocks.blocks}
    copies: dict[str, nn.Parameter] = {}
    for place, module in model.named_modules():
        if isinstance(module, LoraLayer):
            # By the weights' owner, which is not where the layer runs if they are tied.
            held = {owner[id(p)] for p in module.get_base_layer().parameters(recurse=False)}
            if len(held) != 1:
                raise ModelError(
                    f"{place} has weights of {len(held)} blocks: its adapter cannot be merged block by block"
                )
            layers[held.pop()].append(module)
        elif isinstance(module, ModulesToSaveWrapper):
            if not module.active_adapters:
                continue
            for name, parameter in module.original_module.named_parameters():
                if _num_holders(model, parameter) > 1:
                    raise ModelError(
                        f"{place} is tied to another module of the model, and modules_to_save has trained a copy of it alone: one "
                        "checkpoint of this architecture cannot hold both. Export the adapter without merging"
                    )
                active = str(module.active_adapter)
                copies[names[id(parameter)]] = module.modules_to_save[active].get_parameter(name)
        elif isinstance(module, AuxiliaryTrainingWrapper):
            raise ModelError(f"{place}: {type(module).__name__} cannot be merged block by block")

    def read(block: Block) -> dict[str, torch.Tensor]:
        with bound(block.name), torch.no_grad():
            for name in block.parameters:
                # What is bound may be the memory in which weights are kept, and peft adds to it. Leaving the context puts
                # placeholders there.
                base[name].data = base[name].detach().clone()
            for layer in layers[block.name]:
                layer.merge()
                layer.merged_adapters.clear()
            return {name: copies.get(name, base[name]).detach().to(base[name].dtype).cpu() for name in block.parameters}

    return read


def _num_holders(model: nn.Module, parameter: nn.Parameter) -> int:
    return sum(held is parameter for module in model.modules() for held in module._parameters.values())
