"""One contestant of scripts/bench_peers in a process of its own: obeys JSON lines on stdin, answers in JSON on stdout.

Every contestant trains all weights of the same seeded Llama, bfloat16 in compute with float32 masters, moments and sums
of gradients, AdamW without weight decay, clipping of the global norm, on the same rows in the same order. Not run by hand.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import json
import math
import os
import sys
import sysconfig
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import fuyou.bench

VOCABULARY = 256
SHAPES = {"tiny": (64, 128, 2, 2), **fuyou.bench.SHAPES, "1.2B": (2048, 5632, 24, 16)}
"""Hidden and intermediate size, layers, heads; untied."""


def make_model_folder(folder: Path, shape: tuple[int, int, int, int], seed: int) -> None:
    """Write a random Llama in bfloat16, from which all begin with equal bits."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    hidden, intermediate, layers, heads = shape
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=hidden,
        intermediate_size=intermediate,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        max_position_embeddings=2048,
        tie_word_embeddings=False,
        use_cache=False,
    )
    LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(folder)


class Rows:
    """Windows into the source of Python's own library, byte by byte: row n is the same for everybody."""

    def __init__(self, length: int) -> None:
        self._length = length
        library = Path(sysconfig.get_paths()["stdlib"])
        self._text = b"".join(path.read_bytes() for path in sorted(library.glob("*.py")))

    def batch(self, step: int, num_micro_batches: int, num_rows: int) -> list[Any]:
        """The micro-batches of a step, int64 (num_rows, length) each."""
        import torch

        def row(number: int) -> list[int]:
            # A stride that shares no factor with most lengths, so that windows of later rows begin elsewhere.
            begin = number * 7919 % (len(self._text) - self._length)
            return list(self._text[begin : begin + self._length])

        first = step * num_micro_batches * num_rows
        return [
            torch.tensor([row(first + micro * num_rows + r) for r in range(num_rows)])
            for micro in range(num_micro_batches)
        ]


def take_products_in_float32() -> None:
    """Have torch compute products of bfloat16 matrices on the CPU as float32 products, rounded once at the end.

    This is what bfloat16 units do. A CPU without them gets a reference loop from torch, up to a hundred times slower.
    """
    import torch

    def product(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        # The variant with `out` is another operator, still torch's own.
        is_bfloat16 = a.dtype is torch.bfloat16
        out = a.new_empty(a.shape[0], b.shape[1], dtype=torch.float32 if is_bfloat16 else a.dtype)
        if is_bfloat16:
            return torch.ops.aten.mm.out(a.float(), b.float(), out=out).to(torch.bfloat16)
        return torch.ops.aten.mm.out(a, b, out=out)

    library = torch.library.Library("aten", "IMPL")
    library.impl("mm", product, "CPU")
    _kept.append(library)


_kept: list[Any] = []
"""What must live as long as the process."""


class Contestant:
    """Opens a model, takes steps, saves and resumes; subclasses are the tools."""

    package = "torch"
    """Whose version is reported."""

    def __init__(self, spec: dict[str, Any]) -> None:
        self.spec = spec
        self.device: str = spec["device"]
        self.folder = Path(spec["folder"])
        self.max_norm: float = spec["max_norm"]
        self.learning_rate: float = spec["learning_rate"]
        self.num_rows: int = spec["num_rows"]
        self.num_micro_batches: int = spec["num_micro_batches"]
        self.model: Any = None
        self.settings: dict[str, Any] = {}
        """What was chosen for this tool, for the report."""

    def why_not(self) -> str | None:
        """The reason why this tool cannot run here, if it cannot."""
        return None

    def open(self) -> None:
        """Load the model and make the optimizer."""
        raise NotImplementedError

    def step(self, batches: list[Any]) -> tuple[float, float]:
        """One optimizer step; the loss and the norm of the gradients."""
        raise NotImplementedError

    def settle(self) -> None:
        """Come to rest: what a step left to do is done."""
        if self.device != "cpu":
            import torch

            torch.cuda.synchronize()

    def save(self, folder: Path) -> None:
        """Everything that going on needs."""
        raise NotImplementedError

    def restore(self, folder: Path) -> None:
        """Instead of beginning anew; called after `open`."""
        raise NotImplementedError

    def close(self) -> None:
        """Leave as a user's script would."""

    def load(self, dtype: Any) -> Any:
        """The checkpoint by transformers, in training mode."""
        from transformers import AutoModelForCausalLM

        return AutoModelForCausalLM.from_pretrained(self.spec["model"], dtype=dtype).train()

    def add_gradients(self, batches: list[Any]) -> float:
        """Forward and backward pass of one micro-batch after another by autograd alone; the mean loss."""
        total = 0.0
        for ids in batches:
            ids = ids.to(self.device)
            loss = self.model(input_ids=ids, labels=ids).loss
            (loss / len(batches)).backward()
            total += float(loss.detach()) / len(batches)
        return total


class Fuyou(Contestant):
    """Everything on the drive; micro-batches run vertically, as in a recipe."""

    package = "fuyou"

    def open(self) -> None:
        import fuyou

        store = [Path(directory) / "store" for directory in self.spec["drives"] or [self.folder]]
        offload: dict[str, Any] = {
            "store": store,
            "device": self.device,
            "host_memory": self.spec["host_memory"],
            "compute_dtype": "bfloat16",
            "micro_batch_size": self.num_rows,
            "durability": "step",
        }
        if not store[0].exists():
            plan = fuyou.plan_model(
                self.spec["model"],
                offload=fuyou.OffloadConfig(**offload),
                batch_size=self.num_rows * self.num_micro_batches,
                sequence_length=self.spec["length"],
                max_grad_norm=self.max_norm,
                hardware=fuyou.measure_hardware(self.folder, self.device, "bfloat16"),
            )
            if plan.prediction is not None:
                self.settings["predicted_seconds"] = plan.prediction.seconds
            offload["plan"] = plan
        self.model = fuyou.from_pretrained(
            self.spec["model"],
            offload=fuyou.OffloadConfig(**offload),
            seed=0,
        )
        self.optimizer = fuyou.AdamW(self.model, lr=self.learning_rate, weight_decay=0.0, max_grad_norm=self.max_norm)
        self.settings |= {"host_memory": self.spec["host_memory"], "durability": "step"}

    def step(self, batches: list[Any]) -> tuple[float, float]:
        import torch

        ids = torch.cat(batches).to(self.device)
        loss = self.model(input_ids=ids, labels=ids).loss
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        return float(loss.detach()), self.model.fuyou.step_metrics()["grad_norm"]

    def settle(self) -> None:
        self.model.fuyou.flush()

    def save(self, folder: Path) -> None:
        """Nothing: every step is committed."""

    def restore(self, folder: Path) -> None:
        """Nothing: the store was found."""

    def close(self) -> None:
        self.spec["lane_seconds"] = self.model.fuyou.step_metrics().get("lane_seconds")
        self.model.fuyou.close()


class InMemory(Contestant):
    """transformers and torch alone: bfloat16 weights, float32 masters under torch's fused AdamW."""

    checkpointing = False
    package = "transformers"

    def open(self) -> None:
        import torch

        self.model = self.load(torch.bfloat16).to(self.device)
        if self.checkpointing:
            self.model.gradient_checkpointing_enable()
        self.weights = list(self.model.parameters())
        for weight in self.weights:
            weight.grad_dtype = torch.float32  # summed in float32 over micro-batches
        self.masters = [weight.detach().float() for weight in self.weights]
        self.optimizer = torch.optim.AdamW(self.masters, lr=self.learning_rate, weight_decay=0.0, fused=True)
        self.settings = {"gradient_checkpointing": self.checkpointing}

    def step(self, batches: list[Any]) -> tuple[float, float]:
        import torch

        total = self.add_gradients(batches)
        norm = torch.nn.utils.clip_grad_norm_(self.weights, self.max_norm)
        for weight, master in zip(self.weights, self.masters, strict=True):
            master.grad, weight.grad = weight.grad, None
        self.optimizer.step()
        self.optimizer.zero_grad()
        with torch.no_grad():
            for weight, master in zip(self.weights, self.masters, strict=True):
                weight.copy_(master)
        return total, float(norm)

    def save(self, folder: Path) -> None:
        import torch

        torch.save({"masters": self.masters, "optimizer": self.optimizer.state_dict()}, folder / "state.pt")

    def restore(self, folder: Path) -> None:
        import torch

        state = torch.load(folder / "state.pt")
        self.optimizer.load_state_dict(state["optimizer"])
        with torch.no_grad():
            for weight, master, saved in zip(self.weights, self.masters, state["masters"], strict=True):
                master.copy_(saved)
                weight.copy_(saved)


class InMemoryCheckpointing(InMemory):
    """The same, a layer's activations computed again in the backward pass."""

    checkpointing = True


def set_up_one_rank(device: str) -> None:
    """What a launcher would put into the environment, for a group of one."""
    import socket

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    os.environ |= {
        "RANK": "0",
        "LOCAL_RANK": "0",
        "WORLD_SIZE": "1",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }


LEAN_PARAMETER_BUFFERS = 5
PERSISTENCE_THRESHOLD = 10**5
"""Elements below which DeepSpeed never puts a parameter on the drive."""


class DeepSpeed(Contestant):
    """ZeRO-3 with parameters and optimizer states on the drive."""

    package = "deepspeed"

    def why_not(self) -> str | None:
        if importlib.util.find_spec("deepspeed") is None:
            return "deepspeed is not installed"
        return None

    def open(self) -> None:
        set_up_one_rank(self.device)
        if self.device == "cpu":
            os.environ["DS_ACCELERATOR"] = "cpu"
        import deepspeed
        import torch
        from transformers.integrations import HfDeepSpeedConfig

        lean = self.spec["deepspeed_lean"]
        live = 0 if lean else 10**9
        sizes = self._parameter_sizes()
        # Each parameter that is live occupies a buffer of the largest one's size: with too few of them it ends with
        # "Not enough buffers 0 for swapping 1".
        num_buffers = LEAN_PARAMETER_BUFFERS if lean else sum(size > PERSISTENCE_THRESHOLD for size in sizes)
        swap = self.folder / "swap"
        swap.mkdir(exist_ok=True)
        config = {
            "train_micro_batch_size_per_gpu": self.num_rows,
            "gradient_accumulation_steps": self.num_micro_batches,
            "gradient_clipping": self.max_norm,
            "bf16": {"enabled": True},
            "optimizer": {
                "type": "AdamW",
                "params": {"lr": self.learning_rate, "betas": [0.9, 0.999], "eps": 1e-8, "weight_decay": 0.0},
            },
            "zero_optimization": {
                "stage": 3,
                # The drive's transfers are cut by sub-groups; memory grows with them and with what may be live.
                "sub_group_size": 10**7,
                "stage3_max_live_parameters": live,
                "stage3_max_reuse_distance": live,
                "stage3_param_persistence_threshold": PERSISTENCE_THRESHOLD,
                "stage3_prefetch_bucket_size": 5 * 10**7,
                "reduce_bucket_size": 10**7,
                "contiguous_gradients": True,
                "overlap_comm": False,
                "offload_param": {
                    "device": "nvme",
                    "nvme_path": str(swap),
                    "pin_memory": self.device != "cpu",
                    "buffer_count": num_buffers,
                    "buffer_size": max(sizes),
                    "max_in_cpu": 0,
                },
                "offload_optimizer": {
                    "device": "nvme",
                    "nvme_path": str(swap),
                    "pin_memory": self.device != "cpu",
                    "buffer_count": 4,
                    "pipeline_read": self.spec["deepspeed_pipeline"],
                    "pipeline_write": self.spec["deepspeed_pipeline"],
                },
            },
            "aio": {
                "block_size": 2**20,
                "queue_depth": 32,
                "intra_op_parallelism": 1,
                "single_submit": False,
                "overlap_events": True,
            },
            "steps_per_print": 10**9,
        }
        deepspeed.init_distributed(dist_backend="gloo" if self.device == "cpu" else "nccl", auto_mpi_discovery=False)
        self._keep = HfDeepSpeedConfig(config)  # while it lives, from_pretrained loads straight into shards
        model = self.load(torch.bfloat16)
        self.engine, _, _, _ = deepspeed.initialize(model=model, model_parameters=model.parameters(), config=config)
        zero = config["zero_optimization"]
        self.settings = {
            "live_parameters": live,
            "pipeline": self.spec["deepspeed_pipeline"],
            "sub_group_size": zero["sub_group_size"],
            "parameter_buffers": num_buffers,
        }

    def _parameter_sizes(self) -> list[int]:
        from safetensors import safe_open

        sizes: list[int] = []
        for path in Path(self.spec["model"]).glob("*.safetensors"):
            with safe_open(path, "pt") as file:
                sizes += [math.prod(file.get_slice(name).get_shape()) for name in file.keys()]  # noqa: SIM118
        return sizes

    def step(self, batches: list[Any]) -> tuple[float, float]:
        total = 0.0
        for ids in batches:
            ids = ids.to(self.device)
            loss = self.engine(input_ids=ids, labels=ids).loss
            self.engine.backward(loss)
            total += float(loss.detach()) / len(batches)
            self.engine.step()  # steps once the last micro-batch is in
        return total, float(self.engine.get_global_grad_norm())

    def save(self, folder: Path) -> None:
        self.engine.save_checkpoint(str(folder))

    def restore(self, folder: Path) -> None:
        if self.engine.load_checkpoint(str(folder))[0] is None:
            raise RuntimeError("load_checkpoint found nothing")


class Fsdp2(Contestant):
    """torch's fully_shard, one rank, parameters, gradients and optimizer in host memory."""

    def open(self) -> None:
        set_up_one_rank(self.device)
        import torch
        import torch.distributed as dist
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy, fully_shard

        dist.init_process_group("gloo" if self.device == "cpu" else "cpu:gloo,cuda:nccl")
        mesh = init_device_mesh(self.device.split(":")[0], (1,))
        self.model = self.load(torch.bfloat16).float()
        options: dict[str, Any] = {
            "mesh": mesh,
            "offload_policy": CPUOffloadPolicy(pin_memory=self.device != "cpu"),
            "mp_policy": MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32),
        }
        for layer in self.model.model.layers:
            fully_shard(layer, **options)
        fully_shard(self.model, **options)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=self.learning_rate, weight_decay=0.0, fused=True)
        self.settings = {"gradient_checkpointing": False}

    def step(self, batches: list[Any]) -> tuple[float, float]:
        import torch

        total = self.add_gradients(batches)
        norm = torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.max_norm)
        self.optimizer.step()
        self.optimizer.zero_grad()
        return total, float(norm.full_tensor() if hasattr(norm, "full_tensor") else norm)

    def _state(self) -> dict[str, Any]:
        from torch.distributed.checkpoint.state_dict import get_state_dict

        model, optimizer = get_state_dict(self.model, self.optimizer)
        return {"model": model, "optimizer": optimizer}

    def save(self, folder: Path) -> None:
        import torch.distributed.checkpoint as dcp

        dcp.save(self._state(), checkpoint_id=folder)

    def restore(self, folder: Path) -> None:
        import torch.distributed.checkpoint as dcp
        from torch.distributed.checkpoint.state_dict import set_state_dict

        state = self._state()
        dcp.load(state, checkpoint_id=folder)
        set_state_dict(self.model, self.optimizer, model_state_dict=state["model"], optim_state_dict=state["optimizer"])

    def close(self) -> None:
        import torch.distributed as dist

        dist.destroy_process_group()


class TorchAo(Contestant):
    """torchao's optimizer in host memory under weights on the GPU: no float32 masters, no drive."""

    package = "torchao"

    def why_not(self) -> str | None:
        if self.device == "cpu":
            return "it moves states from a GPU to host memory, and there is no CUDA device here"
        if importlib.util.find_spec("torchao") is None:
            return "torchao is not installed"
        return None

    def open(self) -> None:
        import torch
        from torchao.optim import CPUOffloadOptimizer

        self.model = self.load(torch.bfloat16).to(self.device)
        self.optimizer = CPUOffloadOptimizer(
            self.model.parameters(), torch.optim.AdamW, lr=self.learning_rate, weight_decay=0.0, fused=True
        )
        self.settings = {"masters": "none: bfloat16 weights are updated"}

    def step(self, batches: list[Any]) -> tuple[float, float]:
        import torch

        total = self.add_gradients(batches)
        # Its gradients leave during backward only with offload_gradients, which knows no accumulation.
        norm = torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.max_norm)
        self.optimizer.step()
        self.optimizer.zero_grad()
        return total, float(norm)

    def save(self, folder: Path) -> None:
        import torch

        torch.save({"model": self.model.state_dict(), "optimizer": self.optimizer.state_dict()}, folder / "state.pt")

    def restore(self, folder: Path) -> None:
        import torch

        state = torch.load(folder / "state.pt")
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])


CONTESTANTS: dict[str, type[Contestant]] = {
    "fuyou": Fuyou,
    "deepspeed": DeepSpeed,
    "fsdp2": Fsdp2,
    "torchao": TorchAo,
    "in-memory": InMemory,
    "in-memory-checkpointing": InMemoryCheckpointing,
}


def version_of(package: str) -> str:
    """As imported: fuyou may run from a checkout."""
    return str(importlib.import_module(package).__version__)


def serve(spec: dict[str, Any], commands: Iterator[dict[str, Any]], answer: Callable[[dict[str, Any]], None]) -> None:
    """Obey until "close"."""
    if spec["tool"] == "make":
        make_model_folder(Path(spec["model"]), SHAPES[spec["size"]], spec["seed"])
        answer({"made": True})
        return
    contestant = CONTESTANTS[spec["tool"]](spec)
    reason = contestant.why_not()
    if reason is not None:
        answer({"reason": reason})
        return
    import torch

    if spec["products"] == "float32":
        take_products_in_float32()
    rows = Rows(spec["length"])
    next_step = spec["first_step"]
    for command in commands:
        started_seconds = time.perf_counter()
        if command["do"] == "open":
            torch.manual_seed(spec["seed"])
            contestant.open()
            if spec["resume_from"] is not None:
                contestant.restore(Path(spec["resume_from"]))
            contestant.settle()
            found = {"settings": contestant.settings, "version": version_of(contestant.package)}
        elif command["do"] == "steps":
            losses, norms, step_seconds = [], [], []
            for _ in range(command["count"]):
                batches = rows.batch(next_step, spec["num_micro_batches"], spec["num_rows"])
                before_seconds = time.perf_counter()
                loss, norm = contestant.step(batches)
                step_seconds.append(time.perf_counter() - before_seconds)
                losses.append(loss)
                norms.append(norm)
                next_step += 1
            contestant.settle()
            found = {"losses": losses, "norms": norms, "step_seconds": step_seconds}
        elif command["do"] == "save":
            folder = Path(command["folder"])
            folder.mkdir(parents=True, exist_ok=True)
            contestant.save(folder)
            found = {}
        else:
            assert command["do"] == "close", command
            contestant.close()
            answer({"seconds": time.perf_counter() - started_seconds, "lane_seconds": spec.get("lane_seconds")})
            return
        answer(found | {"seconds": time.perf_counter() - started_seconds})


def main() -> None:
    """Read the specification from the command line, commands from stdin."""
    spec = json.loads(sys.argv[1])
    if spec["cgroup"] is not None:
        (Path(spec["cgroup"]) / "cgroup.procs").write_text(str(os.getpid()))
    # Libraries print to stdout; answers go elsewhere.
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)

    def answer(found: dict[str, Any]) -> None:
        answers.write(json.dumps(found) + "\n")
        answers.flush()

    import warnings

    warnings.simplefilter("ignore")
    with contextlib.suppress(KeyboardInterrupt):
        try:
            serve(spec, (json.loads(line) for line in sys.stdin), answer)
        except Exception as error:
            import traceback

            traceback.print_exc()
            answer(
                {"reason": f"{type(error).__name__}: {str(error).strip().splitlines()[0][:300] if str(error) else ''}"}
            )
            sys.exit(1)


if __name__ == "__main__":
    main()
