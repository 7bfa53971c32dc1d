"""`model.generate` of transformers on a streamed model: the tokens of a plain one, each weight read once a token."""

from __future__ import annotations

import contextlib
import dataclasses
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, DynamicCache, LlamaConfig, PreTrainedTokenizerFast
from transformers.cache_utils import CacheLayerMixin
from transformers.generation.streamers import BaseStreamer

import fuyou
from fuyou.errors import PlanError
from fuyou.generation_plan import Demand, cache_shape
from fuyou.memory import anonymous_bytes
from tests.tiny_models import PAD_ID, TINY_MODEL_NAMES, VOCAB_SIZE, tiny_batches, tiny_model, tiny_model_config

NEW_TOKENS = 6
GREEDY: dict[str, Any] = {"do_sample": False}
SAMPLED: dict[str, Any] = {"do_sample": True, "temperature": 0.8, "top_p": 0.9, "top_k": 40}


def saved(name: str, folder: Path) -> Any:
    """A plain model without dropout or router losses, and what from_pretrained reads."""
    model = tiny_model(name, seed=3).eval()
    if hasattr(model.config, "output_router_logits"):
        model.config.output_router_logits = False  # transformers' own generate fails with it
    model.save_pretrained(folder)
    return AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, attn_implementation=tiny_model_config(name)._attn_implementation
    )


def streamed(folder: Path, store: Path, name: str = "llama", host_memory: str = "64MiB", **options: Any) -> Any:
    offload = fuyou.OffloadConfig(
        store=store, device="cpu", host_memory=host_memory, compute_dtype="float32", **options
    )
    attention = tiny_model_config(name)._attn_implementation
    return fuyou.from_pretrained(folder, offload=offload, attn_implementation=attention).eval()


def prompts(side: str, rows: int = 3, length: int = 12) -> dict[str, torch.Tensor]:
    """Token ids with their mask, rows of unequal lengths, padded on one side."""
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(3, VOCAB_SIZE, (rows, length), generator=generator)
    lengths = torch.tensor([length, 3, 7, 5][:rows])[:, None]
    places = torch.arange(length)
    mask = (places >= length - lengths if side == "left" else places < lengths).long()
    return {"input_ids": ids.masked_fill(mask == 0, PAD_ID), "attention_mask": mask}


def tokens(model: Any, inputs: dict[str, torch.Tensor], seed: int = 4, **options: Any) -> torch.Tensor:
    torch.manual_seed(seed)
    generated: torch.Tensor = model.generate(**inputs, max_new_tokens=NEW_TOKENS, **options)
    return generated


# Every second here, the others in the slow tier.
EVERY_SECOND = [pytest.param(n, marks=pytest.mark.slow) if i % 2 else n for i, n in enumerate(TINY_MODEL_NAMES)]


@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning")
@pytest.mark.filterwarnings("ignore:The following .*_pattern keys:RuntimeWarning")  # peft's own, for fused experts
@pytest.mark.parametrize("name", EVERY_SECOND)
def test_tokens_equal_plain_transformers(name: str, tmp_path: Path) -> None:
    plain = saved(name, tmp_path / "plain")
    model = streamed(tmp_path / "plain", tmp_path / "store", name)
    with model.fuyou:
        for side in ("left", "right"):
            for options in (GREEDY, SAMPLED, {"num_beams": 3, **GREEDY}):
                expected = tokens(plain, prompts(side), **options)
                for rows_at_once in (None, 2):  # prompts in vertical micro-batches, too
                    model.fuyou.prefill_micro_batch_size = rows_at_once
                    assert torch.equal(tokens(model, prompts(side), **options), expected)
                # The generators are left as plain transformers leaves them.
                drawn = torch.rand(1)
                tokens(plain, prompts(side), **options)
                assert torch.equal(torch.rand(1), drawn)
        check_with_adapters(plain, model)


def with_adapters(base: Any) -> Any:
    """peft's adapters around it, the same ones each time."""
    import peft

    options = {"target_modules": "all-linear", "fan_in_fan_out": base.config.model_type == "gpt2"}
    torch.manual_seed(2)
    config = peft.LoraConfig(r=4, task_type="CAUSAL_LM", init_lora_weights=False, **options)
    return peft.get_peft_model(base, config).eval()


def check_with_adapters(plain: Any, model: Any) -> None:
    """The same with peft's adapters around both, which change the tokens."""
    without = tokens(plain, prompts("left"), **GREEDY)
    adapted = [with_adapters(base) for base in (plain, model)]
    model.fuyou.prefill_micro_batch_size = 2
    for side in ("left", "right"):
        for options in (GREEDY, SAMPLED):
            expected = tokens(adapted[0], prompts(side), **options)
            assert torch.equal(tokens(adapted[1], prompts(side), **options), expected)
    assert not torch.equal(tokens(adapted[0], prompts("left"), **GREEDY), without)


def test_beam_sampling_several_answers_and_a_context_in_parts(tmp_path: Path) -> None:
    plain = saved("llama", tmp_path / "plain")
    model = streamed(tmp_path / "plain", tmp_path / "store")
    with model.fuyou:
        for options in (
            {**SAMPLED, "num_return_sequences": 2},
            {**SAMPLED, "num_beams": 2, "num_return_sequences": 2},
            {**GREEDY, "prefill_chunk_size": 5},
            {**GREEDY, "use_cache": False},
            {**GREEDY, "repetition_penalty": 1.5, "no_repeat_ngram_size": 2},
        ):
            assert torch.equal(tokens(model, prompts("left"), **options), tokens(plain, prompts("left"), **options))


def letters() -> PreTrainedTokenizerFast:
    """One letter a token: token 17 is the character 256 + 17, or an ASCII one from 97 on."""
    from tokenizers import Tokenizer, decoders
    from tokenizers.models import BPE

    inner = Tokenizer(BPE({letter(i): i for i in range(VOCAB_SIZE)}, [], unk_token=letter(1)))
    inner.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=inner, unk_token=letter(1), eos_token=letter(2))


def letter(token: int) -> str:
    return chr(token) if 97 <= token < 123 else chr(256 + token)


class Streamed(BaseStreamer):  # type: ignore[no-untyped-call,misc]
    def __init__(self) -> None:
        self.tokens: list[int] = []
        self.ended = False

    def put(self, value: torch.Tensor) -> None:
        self.tokens += value.flatten().tolist()

    def end(self) -> None:
        self.ended = True


def test_stop_strings_and_streamers(tmp_path: Path) -> None:
    plain = saved("llama", tmp_path / "plain")
    model = streamed(tmp_path / "plain", tmp_path / "store")
    inputs = {name: tensor[:1] for name, tensor in prompts("left").items()}
    whole = tokens(plain, inputs, **GREEDY)
    third = int(whole[0, inputs["input_ids"].shape[1] + 2])
    stop = {"stop_strings": [letter(third)], "tokenizer": letters()}
    with model.fuyou:
        expected = tokens(plain, inputs, **GREEDY, **stop)
        assert expected.shape[1] < whole.shape[1]
        assert torch.equal(tokens(model, inputs, **GREEDY, **stop), expected)
        streamer = Streamed()
        assert torch.equal(tokens(model, inputs, **GREEDY, streamer=streamer), whole)
        assert streamer.tokens == whole.flatten().tolist()
        assert streamer.ended


# ------------------------------------------------------------------------------------------------- drive traffic


def big_config(tied: bool = False) -> LlamaConfig:
    """Blocks large enough that 64-element padding vanishes: 4 layers of 0.7 MB, 0.5 MB of embedding."""
    return LlamaConfig(
        vocab_size=512,
        hidden_size=256,
        intermediate_size=512,
        num_hidden_layers=4,
        num_attention_heads=4,
        tie_word_embeddings=tied,
        max_position_embeddings=64,
        eos_token_id=None,
        pad_token_id=0,
    )


def opened(store: Path, tied: bool = False, host_memory: str = "2GiB", kept: tuple[int, ...] = ()) -> Any:
    """With a plan that keeps the weights of the numbered blocks in memory, and no others."""
    config = big_config(tied)
    base: dict[str, Any] = {"store": store, "device": "cpu", "compute_dtype": "float32", "durability": "step"}
    plan = fuyou.plan_model(
        config, offload=fuyou.OffloadConfig(host_memory=host_memory, **base), batch_size=1, sequence_length=8
    )
    blocks = tuple(dataclasses.replace(b, weights_in_host=i in kept) for i, b in enumerate(plan.blocks))
    offload = fuyou.OffloadConfig(plan=dataclasses.replace(plan, blocks=blocks), **base)
    return fuyou.from_config(config, offload=offload, seed=0).eval()


def bytes_read(runtime: Any) -> int:
    """Including what is being read ahead."""
    for shard in list(runtime._weights._loaded.values()):
        shard.transfer.wait()
    count: int = runtime.bytes_moved[0]
    return count


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("rows", [1, 5])
def test_each_weight_is_read_once_a_token_whatever_the_batch(rows: int, tied: bool, tmp_path: Path) -> None:
    """By the engine's counter: a tied embedding too, which stays from the head of one token to the next one's start."""
    model = opened(tmp_path / "store", tied)
    with model.fuyou as runtime:
        sizes = [layout.weight_bytes for layout in runtime.layouts.values()]
        read = []
        for new_tokens in (3, 9):
            before = bytes_read(runtime)
            model.generate(torch.full((rows, 4), 7), max_new_tokens=new_tokens, do_sample=False)
            read.append(bytes_read(runtime) - before)
        ahead = sum(sizes[: runtime.plan.prefetch_depth])
        assert read[0] == 3 * sum(sizes) + ahead
        # The second call begins with what the first one has read ahead at its end, and leaves as much.
        assert read[1] == 9 * sum(sizes)


def test_weights_kept_in_memory_are_not_read_again(tmp_path: Path) -> None:
    model = opened(tmp_path / "store", kept=(0, 2, 3))
    with model.fuyou as runtime:
        sizes = [layout.weight_bytes for layout in runtime.layouts.values()]
        model.generate(torch.full((2, 4), 7), max_new_tokens=2, do_sample=False)
        before = bytes_read(runtime)
        model.generate(torch.full((2, 4), 7), max_new_tokens=8, do_sample=False)
        assert bytes_read(runtime) - before == 8 * (sum(sizes) - sizes[0] - sizes[2] - sizes[3])


def test_the_next_tokens_first_blocks_are_read_while_this_ones_head_is_computed(tmp_path: Path) -> None:
    model = opened(tmp_path / "store")
    with model.fuyou as runtime:
        first = list(runtime.layouts)[: runtime.plan.prefetch_depth]
        asked_for: list[bool] = []
        model.lm_head.register_forward_hook(lambda *_: asked_for.append(runtime._weights._loaded.keys() >= {*first}))
        model.generate(torch.full((1, 4), 7), max_new_tokens=3, do_sample=False)
        assert asked_for == [True] * 3
        asked_for.clear()
        with torch.no_grad():
            model(input_ids=torch.full((1, 4), 7), use_cache=False)  # nothing says that another pass will follow
        assert asked_for == [False]


def test_training_goes_on_with_its_own_weights_after_generating(tmp_path: Path) -> None:
    """Between backward and step, after a step, with late updates: nothing read ahead for a token is taken for new."""
    saved("llama", tmp_path / "plain")
    losses = []
    for generating in (False, True):
        model = streamed(tmp_path / "plain", tmp_path / f"store-{generating}")
        with model.fuyou:
            model.train()
            optimizer = fuyou.AdamW(model, lr=1e-2, max_grad_norm=0.5)
            run = []
            for (batch,) in tiny_batches(model.config, 4, 1):
                for moment in ("before", "between", "after"):
                    if moment == "between":
                        loss = model(**batch).loss
                        loss.backward()
                        run.append(float(loss.detach()))
                    elif moment == "after":
                        optimizer.step()
                        optimizer.zero_grad()
                    if generating:
                        model.eval()
                        state = torch.get_rng_state()
                        tokens(model, prompts("left"), **SAMPLED)
                        torch.set_rng_state(state)
                        model.train()
        losses.append(run)
    assert losses[0] == losses[1]


def test_generating_between_backward_and_step_uses_the_committed_weights(tmp_path: Path) -> None:
    plain = saved("llama", tmp_path / "plain")
    model = streamed(tmp_path / "plain", tmp_path / "store")
    with model.fuyou:
        optimizer = fuyou.AdamW(model, lr=1e-1, max_grad_norm=1.0)
        model.train()
        model(**tiny_batches(model.config, 1, 1)[0][0]).loss.backward()
        model.eval()
        before = tokens(model, prompts("left"), **GREEDY)
        assert torch.equal(before, tokens(plain, prompts("left"), **GREEDY))
        optimizer.step()
        after = tokens(model, prompts("left"), **GREEDY)
        model.save_pretrained(tmp_path / "trained")
    trained = AutoModelForCausalLM.from_pretrained(tmp_path / "trained", dtype=torch.float32)
    assert not torch.equal(after, before)
    assert torch.equal(after, tokens(trained, prompts("left"), **GREEDY))


def test_an_interrupted_generation_leaves_a_usable_model(tmp_path: Path) -> None:
    plain = saved("llama", tmp_path / "plain")
    model = streamed(tmp_path / "plain", tmp_path / "store")

    class Stop(BaseStreamer):  # type: ignore[no-untyped-call,misc]
        num_calls = 0

        def put(self, value: torch.Tensor) -> None:
            self.num_calls += 1
            if self.num_calls == 3:
                raise KeyboardInterrupt

        def end(self) -> None: ...

    inputs = {name: tensor[:1] for name, tensor in prompts("left").items()}
    with model.fuyou:
        with pytest.raises(KeyboardInterrupt):
            tokens(model, inputs, **GREEDY, streamer=Stop())
        assert torch.equal(tokens(model, inputs, **GREEDY), tokens(plain, inputs, **GREEDY))


class InterruptAt:
    """A profile function that sends Ctrl-C at one place of our own code, counted from the start of a call.

    At entries of functions and after calls of C functions, where the interpreter looks for signals. Not at any line: where
    a `with` ends, an exception that no signal can raise there would leave a lock taken.
    """

    OURS = tuple(str(Path(fuyou.__file__).parents[1] / folder) for folder in ("fuyou", "io_engine", "optim"))

    def __init__(self, at: int) -> None:
        self.at, self.num_places, self.place = at, 0, ""

    def __call__(self, frame: Any, event: str, _arg: Any) -> None:
        if event not in ("call", "c_return") or not frame.f_code.co_filename.startswith(self.OURS):
            return
        self.num_places += 1
        if self.num_places - 1 == self.at:
            self.place = f"{frame.f_code.co_filename}:{frame.f_lineno}"
            signal.raise_signal(signal.SIGINT)


# Between open() and `with` the interpreter closes the file, and says so.
@pytest.mark.filterwarnings("ignore:unclosed file .*/proc/self/statm:ResourceWarning")
@pytest.mark.parametrize("every", [97, pytest.param(1, marks=[pytest.mark.slow, pytest.mark.timeout(1200)])])
def test_ctrl_c_anywhere_leaves_a_usable_model(every: int, tmp_path: Path) -> None:
    """Also inside engine.read: no buffer is lost, and none is given to somebody else while something reads into it."""
    model = opened(tmp_path / "store")
    ids = torch.arange(8).reshape(2, 4)

    def logits() -> torch.Tensor:
        with torch.no_grad():
            found: torch.Tensor = model(input_ids=ids, use_cache=False).logits
        return found

    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with model.fuyou as runtime:
            (pool,) = (pool for pool in runtime._pools if pool.name == "weights")
            expected = logits()
            at = 0
            while True:
                interrupt = InterruptAt(at)
                sys.setprofile(interrupt)
                try:
                    logits()
                    assert not interrupt.place
                    break  # that many places it has not
                except KeyboardInterrupt:
                    assert interrupt.place
                finally:
                    sys.setprofile(None)
                at += every
                assert signal.getsignal(signal.SIGINT) is signal.default_int_handler, interrupt.place
                deadline = time.monotonic() + 10
                while pool.used_bytes and time.monotonic() < deadline:
                    time.sleep(1e-3)  # reads under way
                assert pool.used_bytes == 0, interrupt.place
                assert torch.equal(logits(), expected), interrupt.place
            assert at > 1500
    finally:
        signal.signal(signal.SIGINT, before)


def test_memory_stays_at_the_plans_while_generating(tmp_path: Path) -> None:
    """A model of 42 MiB within a budget of 32."""
    config = LlamaConfig(**big_config().to_dict() | {"hidden_size": 512, "intermediate_size": 1024,
                                                     "num_hidden_layers": 5})  # fmt: skip
    offload = fuyou.OffloadConfig(store=tmp_path / "store", device="cpu", compute_dtype="float32", host_memory="512MiB")
    fuyou.from_config(config, offload=offload, seed=0).fuyou.close()
    model = fuyou.open_store_model(tmp_path / "store", host_memory="32MiB").eval()
    with model.fuyou as runtime:
        assert sum(layout.weight_bytes for layout in runtime.layouts.values()) > 42 * 2**20
        model.generate(torch.full((2, 4), 7), max_new_tokens=2, do_sample=False)  # torch's own first allocations
        runtime._meter.take_peak()
        before = anonymous_bytes()
        model.generate(torch.full((2, 4), 7), max_new_tokens=12, do_sample=False)
        assert runtime._meter.take_peak() <= 32 * 2**20
        assert anonymous_bytes() - before < 4 * 2**20


# ------------------------------------------------------------------------------------- keys and values in host memory


class PlayedStream:
    """A stream of a device whose work is done at once."""

    def wait_stream(self, _other: Any) -> None: ...

    def __enter__(self) -> PlayedStream:
        return self

    def __exit__(self, *_: object) -> None: ...


HOST = torch.float64
"""The played device computes in float32, and cannot with what waits in host memory until it was brought back."""


class Layers:
    """Which layers' keys were brought back to the played device, and how many of them were there at once at most."""

    def __init__(self) -> None:
        self.present: set[int] = set()
        self.most = 0

    def move(self, layer: Any, dtype: torch.dtype) -> None:
        if layer.is_initialized:
            layer.keys, layer.values = layer.keys.to(dtype), layer.values.to(dtype)
            (self.present.discard if dtype == HOST else self.present.add)(id(layer))
            self.most = max(self.most, len(self.present))


@pytest.fixture
def layers_on_device(monkeypatch: pytest.MonkeyPatch) -> Layers:
    """transformers' offloaded cache, on the CPU."""
    layers = Layers()
    monkeypatch.setattr(CacheLayerMixin, "offload", lambda layer: layers.move(layer, HOST))
    monkeypatch.setattr(CacheLayerMixin, "prefetch", lambda layer: layers.move(layer, torch.float32))
    monkeypatch.setattr(torch, "Stream", PlayedStream)
    monkeypatch.setattr(torch.cuda, "default_stream", lambda _device: PlayedStream())
    return layers


HOST_CACHE_NAMES = [n if n == "llama" else pytest.param(n, marks=pytest.mark.slow) for n in TINY_MODEL_NAMES]


@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning")
@pytest.mark.filterwarnings("ignore:The following .*_pattern keys:RuntimeWarning")  # peft's own, for fused experts
@pytest.mark.parametrize("name", HOST_CACHE_NAMES)
def test_tokens_are_the_same_with_keys_in_host_memory(name: str, layers_on_device: Layers, tmp_path: Path) -> None:
    """Prompts whole and in vertical micro-batches, windows that stay on the device (gemma2) or not, with adapters too."""
    plain = saved(name, tmp_path / "plain")
    model = streamed(tmp_path / "plain", tmp_path / "store", name)
    runtime = model.fuyou
    with runtime:
        both = [plain, model]
        for adapted, side, options, rows_at_once in (
            (False, "left", GREEDY, None),
            (False, "left", SAMPLED, 2),
            (False, "right", GREEDY, 2),
            (False, "right", SAMPLED, None),
            (True, "left", GREEDY, 2),
            (True, "right", SAMPLED, None),
        ):
            if adapted and both == [plain, model]:
                both = [with_adapters(base) for base in both]
            expected = tokens(both[0], prompts(side), **options)
            assert layers_on_device.most == 0
            runtime.prefill_micro_batch_size = rows_at_once
            found = tokens(both[1], prompts(side), **options, cache_implementation="offloaded")
            assert torch.equal(found, expected)
            # One is computed with, one comes next; the second part of the prompts has left its own first layer there.
            assert 0 < layers_on_device.most <= (2 if rows_at_once is None else 3)
            layers_on_device.most = 0
            layers_on_device.present.clear()


# ------------------------------------------------------------------------------------------- calls from Python, planned


def long_model(store: Path, host_memory: str) -> Any:
    """Positions for a million tokens; the cache takes 8 KiB a token, the weights 11 MiB."""
    config = LlamaConfig(**big_config().to_dict() | {"max_position_embeddings": 2**20})
    offload = fuyou.OffloadConfig(store=store, device="cpu", compute_dtype="float32", host_memory="1GiB")
    if not store.exists():
        fuyou.from_config(config, offload=offload, seed=0).fuyou.close()
    return fuyou.open_store_model(store, host_memory=host_memory).eval()


IN_A_PROCESS_OF_ITS_OWN = """
import gc, sys
from pathlib import Path
import torch
from tests.fuyou.test_generate import Demand, bytes_read, cache_shape, long_model
torch.set_num_threads(1)  # each further one has buffers of its own in the libraries that multiply
store = Path(sys.argv[1])
ids = torch.randint(1, 512, (12, 190), generator=torch.Generator().manual_seed(0))
short = torch.full((1, 4), 7)
roomy = long_model(store, "1GiB")
with roomy.fuyou:
    expected = roomy.generate(ids, max_new_tokens=10, do_sample=False)
del roomy
gc.collect()
model = long_model(store, "48MiB")
with model.fuyou as runtime:
    model.generate(short, max_new_tokens=2, do_sample=False)
    resident = runtime._weights.resident
    assert len(resident) > 2
    pooled = []
    hook = model.model.layers[3].register_forward_hook(lambda *_: pooled.append(sum(p.mapped_bytes for p in runtime._pools)))
    assert torch.equal(model.generate(ids, max_new_tokens=10, do_sample=False), expected)
    hook.remove()
    with runtime._room_for_generation(Demand(12, 190, 10), cache_shape(model.config, 4), None) as fit:
        assert max(pooled) + fit.reserve_bytes <= 48 * 2**20, (max(pooled), fit.reserve_bytes)
    assert runtime._weights.resident == resident
    model.generate(short, max_new_tokens=2, do_sample=False)  # what had to go comes back
    before = bytes_read(runtime)
    model.generate(short, max_new_tokens=4, do_sample=False)
    others = sum(layout.weight_bytes for name, layout in runtime.layouts.items() if name not in resident)
    assert bytes_read(runtime) - before == 4 * others
"""


@pytest.mark.slow
def test_a_call_takes_its_caches_memory_from_weights_that_were_kept(tmp_path: Path) -> None:
    """12 texts of 200 tokens: 32 MiB of keys and values and of what computes with them, in a budget of 48, by what the pools hold."""
    done = subprocess.run(
        [sys.executable, "-c", IN_A_PROCESS_OF_ITS_OWN, str(tmp_path / "store")],
        capture_output=True, text=True, cwd=Path(fuyou.__file__).parents[1], check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr


def test_a_call_that_does_not_fit_is_refused_with_the_number_of_tokens_that_does(tmp_path: Path) -> None:
    model = long_model(tmp_path / "store", "36MiB")
    with model.fuyou as runtime:
        before = bytes_read(runtime)
        with pytest.raises(PlanError, match=r"tokens fit: set max_new_tokens=(\d+) or less") as refused:
            model.generate(torch.full((2, 5), 7), max_new_tokens=1_000_000, do_sample=False)
        assert bytes_read(runtime) == before
        assert 'give OffloadConfig(host_memory="' in str(refused.value)
        assert "give fewer texts" in str(refused.value)
        match = re.search(r"max_new_tokens=(\d+) or less", str(refused.value))
        assert match is not None
        for new_tokens, fits in ((int(match[1]), True), (int(match[1]) + 1, False)):
            demand = Demand(2, 5, new_tokens)
            room = runtime._room_for_generation(demand, cache_shape(model.config, 4), None)
            with contextlib.nullcontext() if fits else pytest.raises(PlanError), room as fit:
                assert fit.cache_bytes > 2**22


def test_a_cache_of_ones_own_is_used_and_counted(tmp_path: Path) -> None:
    plain = saved("llama", tmp_path / "plain")
    model = streamed(tmp_path / "plain", tmp_path / "store")
    with model.fuyou:
        own = DynamicCache()
        found = tokens(model, prompts("left"), **GREEDY, past_key_values=own)
        assert torch.equal(found, tokens(plain, prompts("left"), **GREEDY))
        assert own.get_seq_length() == found.shape[1] - 1
        static = {**GREEDY, "cache_implementation": "static", "disable_compile": True}
        assert torch.equal(tokens(model, prompts("left"), **static), tokens(plain, prompts("left"), **static))
    tight = long_model(tmp_path / "long", "36MiB")
    with tight.fuyou, pytest.raises(PlanError, match="tokens fit"):
        tight.generate(torch.full((1, 5), 7), max_new_tokens=900_000, past_key_values=DynamicCache())


def test_a_run_goes_on_bit_by_bit_after_a_call_that_took_memory_from_its_weights(tmp_path: Path) -> None:
    """In the middle of a step, too: weights that had to go are read again as the optimizer has left them."""
    losses = []
    for generating in (False, True):
        config = LlamaConfig(**big_config().to_dict() | {"max_position_embeddings": 2**20})
        offload = fuyou.OffloadConfig(
            store=tmp_path / f"store-{generating}", device="cpu", compute_dtype="float32", host_memory="128MiB"
        )
        model = fuyou.from_config(config, offload=offload, seed=0)
        with model.fuyou as runtime:
            optimizer = fuyou.AdamW(model, lr=1e-2, max_grad_norm=0.5)
            run, kept = [], []

            def generate(model: Any = model, kept: list[int] = kept, runtime: Any = runtime) -> None:
                model.eval()
                with runtime._room_for_generation(Demand(30, 4, 252), cache_shape(model.config, 4), None):
                    kept.append(len(runtime._weights.resident))
                    model.generate(torch.full((2, 4), 7), max_new_tokens=3, do_sample=False)
                model.train()

            for batch in range(4):
                ids = torch.arange(32).reshape(2, 16) + batch
                loss = model(input_ids=ids, labels=ids).loss
                loss.backward()
                run.append(float(loss.detach()))
                if generating:
                    generate()
                optimizer.step()
                optimizer.zero_grad()
                if generating:
                    generate()
        losses.append(run)
    assert losses[0] == losses[1]
    assert max(kept) < len(runtime.plan.blocks)
