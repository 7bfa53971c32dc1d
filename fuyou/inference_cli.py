"""The commands that look at a model: `fuyou generate` and `fuyou evaluate`."""

from __future__ import annotations

import argparse
import contextlib
import json
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

from fuyou.config import check_place, counted
from fuyou.errors import ConfigError
from fuyou.terminal import fitted, has_escapes, shown

if TYPE_CHECKING:
    from fuyou.generation import Answer

EVALUATE = "perplexity and completion loss of a store's or a checkpoint's model"
GENERATE = "answers to prompts, from a store or a checkpoint folder"


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r}: expected a whole number above 0")
    return int(text)


def _whole(text: str) -> int:
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"{text!r}: expected a whole number")
    return int(text)


def add_source(parser: argparse.ArgumentParser) -> None:
    """Options of both commands."""
    parser.add_argument("model", metavar="STORE_OR_FOLDER", help="a store, a checkpoint's folder, or a name on the hub")
    parser.add_argument("--also", action="append", default=[], metavar="DIR", help="further directory of a store")
    parser.add_argument("--adapter", metavar="DIR", help="adapters that peft has saved, to be put on the model")
    parser.add_argument("--tokenizer", metavar="NAME", help='folder or hub name, or "bytes" (the model\'s own)')
    parser.add_argument("--device", metavar="DEVICE", help='"cuda", "cuda:0" or "cpu" (cuda if there is one)')
    parser.add_argument("--gpu-memory", metavar="SIZE", help='budget, such as "22GiB" (what is free, less a margin)')
    parser.add_argument("--host-memory", metavar="SIZE", help='budget, such as "8GiB" (what is free, less a margin)')
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), help="of a checkpoint's computation (its own)")
    parser.add_argument(
        "--temporary", metavar="DIR", help="where a checkpoint's weights are copied meanwhile (beside it)"
    )
    parser.add_argument("--quiet", action="store_true", help="nothing on stderr but errors")


def add_generate(parser: argparse.ArgumentParser) -> None:
    """Options of `fuyou generate`."""
    add_source(parser)
    given = parser.add_mutually_exclusive_group(required=True)
    given.add_argument("--prompt", action="append", metavar="TEXT", help="may be given several times")
    given.add_argument(
        "--prompts", metavar="FILE", help=".txt: a prompt each line; .jsonl: prompt or messages each row"
    )
    parser.add_argument("--output", metavar="FILE", help="new .jsonl file: each row with its answer (stdout)")
    parser.add_argument("--max-new-tokens", type=_positive, default=128, metavar="N", help="of an answer (128)")
    parser.add_argument(
        "--temperature", type=float, metavar="T", help="sample; without any of these three: the likeliest"
    )
    parser.add_argument("--top-p", type=float, metavar="P", help="sample from the likeliest that make up P")
    parser.add_argument("--top-k", type=_positive, metavar="K", help="sample from the K likeliest")
    parser.add_argument("--seed", type=_whole, default=0, metavar="N", help="of sampling (0)")
    parser.add_argument(
        "--batch-size", type=_positive, metavar="N", help="texts at once (as many as is fastest and fits)"
    )
    parser.add_argument(
        "--chat", action=argparse.BooleanOptionalAction, help="prompts are a user's turn (if there is a chat template)"
    )


def generate(options: argparse.Namespace) -> int:
    """Run `fuyou generate`; everything that can be wrong with what was asked for is said before weights are read."""
    from fuyou.generation import (
        GenerationStatistics,
        Prompt,
        Sampling,
        answer_all,
        choose_chat,
        default_offload,
        plan_generation,
        read_prompts,
    )
    from fuyou.generation_plan import Demand
    from fuyou.inference import find_source, find_tokenizer, opened

    sampling = Sampling(options.max_new_tokens, options.temperature, options.top_p, options.top_k, options.seed)
    prompts = (
        read_prompts(options.prompts) if options.prompts else [Prompt({"prompt": text}) for text in options.prompt]
    )
    out = _new_file(options.output)
    source = find_source([options.model, *options.also], compute_dtype=options.dtype, adapter=options.adapter)
    tokenizer = find_tokenizer(source, options.tokenizer)
    chat = choose_chat(options.chat, prompts, tokenizer)
    ids = [prompt.tokenise(tokenizer, chat=chat) for prompt in prompts]
    progress = _Progress(None if options.quiet else sys.stderr, len(prompts), sampling.max_new_tokens)
    plan = plan_generation(
        source,
        Demand(len(prompts), max(map(len, ids)), sampling.max_new_tokens),
        default_offload(source, device=options.device, gpu_memory=options.gpu_memory, host_memory=options.host_memory),
        batch_size=options.batch_size,
        say=progress.say,
    )
    for line in plan.describe().splitlines():
        progress.say(line)
    statistics = GenerationStatistics()
    answers: list[Answer] = []
    with contextlib.ExitStack() as stack:
        model = stack.enter_context(
            opened(
                source,
                device=options.device,
                gpu_memory=options.gpu_memory,
                host_memory=plan.weights_host_bytes,
                temporary=options.temporary,
            )
        )
        runtime = model.fuyou
        runtime.follow_generation_plan(plan)
        file = None
        if out is not None:
            file = stack.enter_context(out.open("x", encoding="utf-8"))
            stack.enter_context(_kept_answers(out, answers, len(prompts)))
        read_before = runtime.bytes_moved[0]
        for answer in answer_all(
            model,
            tokenizer,
            prompts,
            ids,
            sampling,
            batch_size=plan.batch_size,
            statistics=statistics,
            on_token=progress.token,
            cache_in_host_memory=plan.cache_tier == "host",
        ):
            answers.append(answer)
            progress.answered(len(answers))
            if file is not None:
                file.write(json.dumps(answer.to_json(), ensure_ascii=False) + "\n")
                file.flush()  # what is done survives whatever comes
            elif not options.json:
                progress.clear()
                _print_answer(answer, several=len(prompts) > 1)
        statistics.bytes_read = runtime.bytes_moved[0] - read_before
    measured = statistics.to_json()
    progress.say(
        f"{counted(statistics.num_new_tokens, 'token')} in {statistics.seconds:.3g} s: "
        f"{measured['tokens_per_second'] or 0:.3g} tokens/s "
        f"(predicted {plan.predicted_tokens_per_second:.3g})"
    )
    if options.json:
        content: dict[str, Any] = {"plan": plan.to_json(), "measured": measured}
        content |= {"output": str(out)} if out is not None else {"answers": [a.to_json() for a in answers]}
        sys.stdout.write(json.dumps(content, indent=2, ensure_ascii=False) + "\n")
    return 0


def add_evaluate(parser: argparse.ArgumentParser) -> None:
    """Options of `fuyou evaluate`."""
    add_source(parser)
    parser.add_argument(
        "--data",
        required=True,
        metavar="DATA",
        help="a file of rows, a data set on the hub, or a recipe (.yaml), of which the rows held out are taken",
    )
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="a key of a recipe's data section, as max_length=512",
    )
    parser.add_argument(
        "--batch-size", type=_positive, metavar="N", help="rows through a block at once (as memory allows)"
    )


def evaluate(options: argparse.Namespace) -> int:
    """Run `fuyou evaluate`; everything that can be wrong with what was asked for is said before weights are read."""
    import datasets

    from fuyou.evaluation import data_section, evaluate_rows, plan_evaluation, rows_to_evaluate
    from fuyou.generation import default_offload
    from fuyou.inference import find_source, find_tokenizer, opened

    datasets.disable_progress_bars()
    section, seed = data_section(options.data, options.set)
    source = find_source([options.model, *options.also], compute_dtype=options.dtype, adapter=options.adapter)
    tokenizer = find_tokenizer(source, options.tokenizer or section.tokenizer)
    progress = _Progress(None if options.quiet else sys.stderr, 0, 0)
    rows = rows_to_evaluate(section, seed, source, tokenizer, progress.say)
    plan = plan_evaluation(
        rows,
        source,
        default_offload(source, device=options.device, gpu_memory=options.gpu_memory, host_memory=options.host_memory),
        micro_batch_size=options.batch_size,
    )
    with opened(
        source,
        device=options.device,
        gpu_memory=options.gpu_memory,
        host_memory=plan.weights_host_bytes,
        temporary=options.temporary,
    ) as model:
        found = evaluate_rows(
            model, rows, tokenizer.pad_id, plan, lambda done: progress.say(f"{done} of {len(rows)} rows")
        )
    if options.json:
        sys.stdout.write(json.dumps(found.to_json(), indent=2) + "\n")
    else:
        sys.stdout.write(fitted(found.describe(), sys.stdout) + "\n")
    return 0


@contextlib.contextmanager
def _kept_answers(out: Path, answers: list[Answer], num_prompts: int) -> Iterator[None]:
    """Says of an interruption what is in the file already; one without answers goes, so that the command can run again."""
    try:
        yield
    except BaseException as error:
        if not answers:
            out.unlink(missing_ok=True)
        if isinstance(error, KeyboardInterrupt) and answers:
            raise KeyboardInterrupt(
                f"{out} has the answers to the first {len(answers)} of {num_prompts} prompts; name another file for the rest"
            ) from None
        raise


def _new_file(name: str | None) -> Path | None:
    if name is None:
        return None
    path = Path(name).expanduser()
    if path.suffix != ".jsonl":
        raise ConfigError(f"--output {name}: name a .jsonl file")
    if path.exists():
        raise ConfigError(f"--output {name}: exists; name a new file")
    check_place("the folder of --output", path.parent)
    if not path.absolute().parent.is_dir():
        raise ConfigError(f"--output {name}: its folder does not exist")
    return path


def _print_answer(answer: Answer, *, several: bool) -> None:
    if several:
        asked = answer.prompt.row.get("prompt") or answer.prompt.row["messages"][-1]["content"]
        sys.stdout.write("".join(f"> {line}\n" for line in str(asked).splitlines()))
    completion = shown(answer.completion) if sys.stdout.isatty() else answer.completion
    sys.stdout.write(f"{completion}\n" + ("\n" if several else ""))
    sys.stdout.flush()


class _Progress:
    """Lines on stderr; on a terminal also one that is written over with each token."""

    def __init__(self, stream: TextIO | None, num_texts: int, max_new_tokens: int) -> None:
        self._stream, self._num_texts, self._max_new_tokens = stream, num_texts, max_new_tokens
        self._live = stream is not None and has_escapes(stream)
        self._answered, self._shown_seconds = 0, 0.0

    def say(self, text: str) -> None:
        """A line that stays."""
        self.clear()
        if self._stream is not None:
            self._stream.write(f"{fitted(text, self._stream)}\n")
            self._stream.flush()

    def token(self, done: int) -> None:
        """Each text of the batch has so many new tokens at most."""
        now = time.monotonic()
        if self._live and (now - self._shown_seconds > 0.2 or done == 1):
            self._shown_seconds = now
            self._write(
                f"\r\x1b[K{self._answered} of {self._num_texts} answered, token {done} of {self._max_new_tokens}"
            )

    def answered(self, done: int) -> None:
        """So many texts are through."""
        self._answered = done

    def clear(self) -> None:
        """Take the line away that is written over."""
        if self._live:
            self._write("\r\x1b[K")

    def _write(self, text: str) -> None:
        if self._stream is not None:
            self._stream.write(text)
            self._stream.flush()
