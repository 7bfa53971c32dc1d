"""The command line: `fuyou doctor | plan | simulate | train | generate | inspect | ...`, see `fuyou --help`.

Exit codes: 0 done, 1 failed, 2 wrong usage or recipe, 3 does not fit, 130 interrupted (SIGTERM counts as
Ctrl-C). An error is one message on stderr; FUYOU_TRACEBACK=1 shows where it came from.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import json
import os
import shutil
import signal
import sys
import threading
import traceback
from collections.abc import Callable, Iterator, Sequence
from datetime import datetime
from logging import ERROR, getLogger
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn

from fuyou import inference_cli
from fuyou.config import check_place, format_bytes
from fuyou.errors import ConfigError, FuyouError, PlanError
from fuyou.terminal import fitted, has_escapes

EXIT_DONE, EXIT_FAILED, EXIT_USAGE, EXIT_DOES_NOT_FIT, EXIT_INTERRUPTED = 0, 1, 2, 3, 130


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one command and returns its exit code; every error ends here as one message."""
    with _Interruption() as interruption:
        try:
            code = _run(arguments, interruption)
            # Here, where a reader that went away is known for what it is; Python's own flush comes too late.
            sys.stdout.flush()
            return code
        except BrokenPipeError:
            # Nothing can be said to the reader any more, and Python's flush at exit must not try.
            _discard_stdout()
            return EXIT_FAILED
        except BaseException as error:
            return _report(error, interruption)


def _run(arguments: Sequence[str] | None, interruption: _Interruption) -> int:
    try:
        options = _parser().parse_args(arguments)
    except SystemExit:  # after --help
        return EXIT_DONE
    interruption.leaves = options.leaves
    _quiet_libraries()
    command: Callable[[argparse.Namespace], int] = options.command
    return command(options)


# --------------------------------------------------------------------------------------------------- commands


def _doctor(options: argparse.Namespace) -> int:
    import dataclasses

    from fuyou.doctor import advice, examine

    findings = examine(options.directory)
    failed = any(finding.status == "problem" for finding in findings)
    if options.json:
        _print_json(
            {
                "ok": not failed,
                "findings": [dataclasses.asdict(f) for f in findings],
                "todo": advice(findings),
            }
        )
    else:
        width = max(len(finding.name) for finding in findings)
        marks = {"ok": "ok  ", "note": "note", "problem": "BAD "}
        for finding in findings:
            _print(f"{marks[finding.status]}  {finding.name:<{width}}  {finding.value}", indent=width + 8)
        todo = advice(findings)
        _print("\nwhat to do:\n" + "\n".join(f"  {line}" for line in todo) if todo else "\nnothing to do")
    return EXIT_FAILED if failed else EXIT_DONE


def _plan(options: argparse.Namespace) -> int:
    import datasets

    from fuyou.config import parse_bytes
    from fuyou.hardware import cached_hardware
    from fuyou.lora import lora_config
    from fuyou.measuring import measure_hardware
    from fuyou.opening import inputs_of_run
    from fuyou.plan_report import nearest_settings, report_plan
    from fuyou.planning import choose_device, plan_for
    from fuyou.recipe import load_recipe
    from fuyou.shipped import load_hardware
    from fuyou.training import expected_shape, model_config

    datasets.disable_progress_bars()
    recipe = load_recipe(options.recipe, options.set)
    offload = recipe.offload_config()
    config = model_config(recipe)
    endurance = None if options.endurance is None else parse_bytes(options.endurance, "--endurance")
    if options.hardware is not None:
        hardware = load_hardware(options.hardware)
        if options.drives is not None:
            hardware = hardware.with_drives(options.drives)
    elif options.drives is not None:
        raise ConfigError("--drives belongs to --hardware: this machine's drives are those of offload.store")
    else:
        drives, device = offload.store_directories, choose_device(offload)
        known = None if options.measure else cached_hardware(drives, device, offload.compute_dtype)
        if known is None:
            _say("measuring this machine and its drive, which takes up to a minute")
        hardware = known or measure_hardware(drives, device, offload.compute_dtype)
    try:
        shape, source = expected_shape(recipe)
    except (FuyouError, OSError) as error:
        # A plan may be made before there are data.
        longest = recipe.data.max_length
        shape, source = None, f"data.max_length={longest}, since the data cannot be looked at ({error})"
    inputs = inputs_of_run(
        config,
        offload=offload,
        shape=shape,
        batch_size=recipe.rows_per_step,
        sequence_length=recipe.data.max_length,
        max_grad_norm=recipe.max_grad_norm,
        hardware=hardware,
        trainable=recipe.trainable,
        elsewhere=options.hardware is not None,
        lora=None if recipe.lora is None else lora_config(recipe.lora.model_dump()),
    )
    try:
        plan = plan_for(inputs, offload)
    except PlanError as error:
        nearest = [] if offload.plan is not None else nearest_settings(inputs)
        raise PlanError(f"{error}. Nearest settings that fit: {'; or '.join(nearest) or 'none found'}") from None
    report = report_plan(inputs, plan, num_steps=recipe.training.max_steps, endurance_bytes=endurance)
    if options.json:
        _print_json(report.plan.to_json() | {"report": report.to_json()})
    else:
        _print(report.describe(explain=options.explain))
        _print(f"  tokens         {inputs.num_tokens:,} a step, by {source}")
    return EXIT_DONE


def _simulate(options: argparse.Namespace) -> int:
    import dataclasses

    from fuyou.config import parse_bytes
    from fuyou.opening import shards_of
    from fuyou.schemes import simulate_scheme
    from fuyou.shipped import load_hardware, load_model_config

    hardware = load_hardware(options.hardware)
    if options.drives is not None:
        hardware = hardware.with_drives(options.drives)
    if options.host_memory is not None:
        num_bytes = parse_bytes(options.host_memory, "--host-memory")
        hardware = dataclasses.replace(hardware, host_memory_bytes=num_bytes)
    shards = shards_of(load_model_config(options.model))
    run = simulate_scheme(options.scheme, shards, hardware, batch_size=options.batch, sequence_length=options.sequence)
    if options.json:
        _print_json(run.to_json())
    else:
        _print(run.describe())
    return EXIT_DONE


def _train(options: argparse.Namespace) -> int:
    from fuyou.progress import make_reporter
    from fuyou.recipe import load_recipe

    moved = [] if options.store is None else [f"offload.store={json.dumps(options.store)}"]
    recipe = load_recipe(options.recipe, [*options.set, *moved])
    reporter = make_reporter(
        sys.stdout, quiet=options.quiet, as_json=options.json, logging_steps=recipe.training.logging_steps
    )
    with contextlib.closing(reporter):
        # Takes seconds; what is wrong with a recipe by itself was said before.
        reporter.note("loading torch and transformers")
        import datasets

        from fuyou.training import run_training

        datasets.disable_progress_bars()
        run_training(recipe, reporter, num_steps=options.steps, resume=options.resume)
    return EXIT_DONE


def _inspect(options: argparse.Namespace) -> int:
    import fuyou

    found = fuyou.inspect_store(_directories(options))
    if options.json:
        _print_json(found)
    else:
        _print("\n".join(_outline(found)))
    return EXIT_DONE


def _verify(options: argparse.Namespace) -> int:
    import fuyou

    problems = fuyou.verify_store(_directories(options))
    if options.json:
        _print_json({"ok": not problems, "problems": problems})
    elif problems:
        _print("\n".join(problems))
    else:
        _print("all data is as it was written")
    return EXIT_FAILED if problems else EXIT_DONE


def _checkpoint(options: argparse.Namespace) -> int:
    from fuyou.checkpointing import keep_checkpoint, remove_checkpoint, restore_checkpoint
    from fuyou.store_contents import checkpoint_json

    store = _directories(options)
    done: dict[str, Any]
    try:
        if options.remove is not None:
            remove_checkpoint(store, options.remove)
            done, text = {"name": options.remove}, f"checkpoint {options.remove} removed"
        elif options.restore is not None:
            restored = restore_checkpoint(store, options.restore)
            done = checkpoint_json(restored)
            text = f"the store stands at step {restored.step} again, as checkpoint {restored.name} has it"
        else:
            made = keep_checkpoint(store, options.name)
            done = checkpoint_json(made)
            text = f"step {made.step} kept as checkpoint {made.name}, {format_bytes(made.num_bytes)}"
    except ValueError as error:
        raise ConfigError(str(error)) from None
    if options.json:
        _print_json(done)
    else:
        _print(text)
    return EXIT_DONE


def _export(options: argparse.Namespace) -> int:
    out = Path(options.out).expanduser()
    if options.merge and (options.format != "safetensors" or options.masters):
        raise ConfigError(
            "--merge: merged weights have neither masters nor optimizer states; leave out what asks for them"
        )
    check_place("OUT", options.out)
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ConfigError(f"{out} exists and is not an empty folder: name a new one")
    if options.masters and options.format == "dcp":
        raise ConfigError("--masters: --format dcp writes the masters anyway; leave one of them out")
    existed = out.is_dir()
    try:
        return _export_to(out, options)
    except BaseException:
        # It was not there, or empty: so it is again, and the same command can run again.
        shutil.rmtree(out, ignore_errors=True)
        if existed:
            out.mkdir(exist_ok=True)
        raise


def _export_to(out: Path, options: argparse.Namespace) -> int:
    import fuyou
    from fuyou.inference import TOKENIZER_FOLDER
    from fuyou.tokenizing import save_tokenizer

    if options.format == "dcp":
        from fuyou.master_export import export_distributed

        step = export_distributed(_directories(options), out)
        if options.json:
            _print_json({"out": str(out), "step": step})
        else:
            _print(
                f"step {step} with its optimizer states written to {out}; torch.distributed.checkpoint.load reads it"
            )
        return EXIT_DONE
    what = "model"
    if options.masters:
        from fuyou.master_export import export_masters

        step = export_masters(_directories(options), out)
    else:
        model = fuyou.open_store_model(_directories(options), host_memory=options.host_memory)
        with model.fuyou:
            if hasattr(model, "peft_config"):
                what = "merged model" if options.merge else "adapter"
            if options.merge:
                if what == "model":
                    raise ConfigError("--merge: this store trains no adapters, its weights are whole; leave it out")
                model.fuyou.export(str(out), merge=True)
            else:
                model.save_pretrained(str(out))
            step = model.fuyou.committed_step
    found = fuyou.inspect_store(_directories(options))
    # The run's own before that of the model which it began with.
    kept = str(Path(found["directories"][0]) / TOKENIZER_FOLDER)
    tokenizer = save_tokenizer(kept, out) or save_tokenizer(found["source"], out)
    if options.json:
        _print_json({"out": str(out), "step": step, "what": what, "tokenizer": tokenizer})
        return EXIT_DONE
    if what == "adapter":
        _print(
            f"the adapter of step {step} written to {out}; load it with peft.PeftModel.from_pretrained(base, {str(out)!r})"
        )
        _print("--merge writes the whole model with the adapter merged into it")
    else:
        _print(
            f"step {step} written to {out}; load it with "
            f"transformers.AutoModelForCausalLM.from_pretrained({str(out)!r})"
        )
        _print(
            f"with the tokenizer of {tokenizer}"
            if tokenizer is not None
            else "without a tokenizer, since the model that the run began with has none here: add its files"
        )
    return EXIT_DONE


def _trace(options: argparse.Namespace) -> int:
    from fuyou.trace_files import draw, load_traces, perfetto

    out = Path(options.out).expanduser()
    check_place("the folder of --out", out.parent)
    if not out.parent.is_dir():
        raise ConfigError(f"--out {out}: its folder does not exist")
    found = load_traces(Path(options.store).expanduser())
    steps = found["steps"]
    number = options.step if options.step is not None else max(steps)
    if number not in steps:
        raise ConfigError(f"--step {number}: the trace holds the steps {', '.join(map(str, sorted(steps)))}")
    if out.suffix in (".png", ".svg"):
        draw(steps[number], found["predicted"], out)
    elif out.suffix == ".json":
        out.write_text(json.dumps(perfetto(steps[number], found["predicted"])))
    else:
        raise ConfigError(f"--out {out}: name a .json file (ui.perfetto.dev opens it) or a picture, .png or .svg")
    if options.json:
        _print_json({"out": str(out), "step": number, "seconds": steps[number]["seconds"]})
    else:
        _print(f"step {number} ({steps[number]['seconds']:.3f} s) written to {out}")
    return EXIT_DONE


def _bench(options: argparse.Namespace) -> int:
    module = _bench_module(options.bench)
    result = module.run(options)
    if options.json:
        _print_json(result)
    else:
        _print(module.describe(result))
    return EXIT_DONE


def _bench_module(name: str) -> Any:
    return importlib.import_module(f"fuyou.bench.{name}")


BENCHES = ("io", "adam", "optimizer", "step", "generate")


# ----------------------------------------------------------------------------------------------------- parser


_LEAVES_NOTHING = "nothing was changed"
_LEAVES = {
    "train": "what is committed is safe: run the same command to go on",
    "checkpoint": "the store is whole: fuyou inspect says which checkpoints it keeps",
    "export": "nothing was exported; run the same command again",
    "trace": "the store is as it was; run the same command again",
}
"""What an interrupted command says where it knows no better."""


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise ConfigError(f"{message} (try: {self.prog} --help)")


def _parser() -> argparse.ArgumentParser:
    from fuyou.costs import SCHEMES, TFLOPS_FORMULA
    from fuyou.shipped import hardware_names, model_names

    machines = ", ".join(hardware_names())
    parser = _Parser(
        prog="fuyou",
        description="Fine-tune language models that fit neither in the GPU's memory nor in the host's.",
        epilog="exit codes: 0 done, 1 failed, 2 wrong usage or recipe, 3 does not fit, 130 interrupted",
    )
    commands = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")

    def add(name: str, command: Callable[[argparse.Namespace], int], text: str) -> argparse.ArgumentParser:
        sub = commands.add_parser(name, help=text, description=text[0].upper() + text[1:] + ".")
        sub.set_defaults(command=command, leaves=_LEAVES.get(name, _LEAVES_NOTHING))
        sub.add_argument("--json", action="store_true", help="JSON on stdout, and nothing else")
        return sub

    doctor = add("doctor", _doctor, "what this machine has, which I/O path is used and why, what to do")
    doctor.add_argument("directory", nargs="?", default=".", help="a directory on the store's drive (here)")

    plan = add("plan", _plan, "the plan of a recipe: memory, predicted seconds per lane, drive traffic")
    _add_recipe(plan)
    plan.add_argument(
        "--hardware",
        metavar="FILE_OR_NAME",
        help="plan for the machine of this JSON profile, or a shipped one: " + machines,
    )
    plan.add_argument("--drives", type=_positive, metavar="N", help="of the profile's kind (with --hardware)")
    plan.add_argument("--measure", action="store_true", help="measure this machine again, which takes up to a minute")
    plan.add_argument(
        "--explain", action="store_true", help="the reason of every decision, and what becomes of each block"
    )
    plan.add_argument(
        "--endurance",
        metavar="SIZE",
        help='writes that one drive is rated for ("1200TB"): says how long the drives live',
    )

    simulate = add("simulate", _simulate, "a step of any shape on any machine, under published schedules or ours")
    simulate.description = f"A step of any shape on any machine, each lane at its full rate. {TFLOPS_FORMULA}."
    simulate.add_argument(
        "--model", required=True, metavar="FILE_OR_NAME", help="config.json, its folder, or " + ", ".join(model_names())
    )
    simulate.add_argument("--hardware", required=True, metavar="FILE_OR_NAME", help="JSON profile, or " + machines)
    simulate.add_argument(
        "--scheme",
        required=True,
        choices=tuple(SCHEMES),
        help="; ".join(f"{name}: {text}" for name, text in SCHEMES.items()),
    )
    simulate.add_argument("--batch", required=True, type=_positive, metavar="N", help="rows of a step")
    simulate.add_argument("--sequence", required=True, type=_positive, metavar="N", help="tokens of a row")
    simulate.add_argument(
        "--drives", type=_positive, metavar="N", help="of the profile's kind (as many as the profile has; shipped: 1)"
    )
    simulate.add_argument("--host-memory", metavar="SIZE", help="the machine's (the profile's)")

    train = add("train", _train, "train a recipe, or continue it")
    _add_recipe(train)
    train.add_argument("--steps", type=_positive, metavar="N", help="stop cleanly after N further steps")
    train.add_argument(
        "--store", action="append", metavar="DIR", help="instead of offload.store, as when it was moved; one per drive"
    )
    train.add_argument("--resume", type=_resume, metavar="auto|never|must|STEP", help="instead of offload.resume")
    train.add_argument("--quiet", action="store_true", help="print errors only")

    inference_cli.add_generate(add("generate", inference_cli.generate, inference_cli.GENERATE))
    inference_cli.add_evaluate(add("evaluate", inference_cli.evaluate, inference_cli.EVALUATE))

    for name, command, text in (
        ("inspect", _inspect, "what a store holds; changes nothing"),
        ("verify", _verify, "read a store's data and compare it with its checksums"),
        ("checkpoint", _checkpoint, "keep what a store has committed under a name, or go back to it"),
        ("export", _export, "write a store's model as plain safetensors, or with its optimizer for a cluster"),
    ):
        sub = add(name, command, text)
        sub.add_argument("store", metavar="STORE", help="the store's directory")
        if name == "checkpoint":
            choice = sub.add_mutually_exclusive_group()
            choice.add_argument("--name", metavar="NAME", help="of the new checkpoint (step-N)")
            choice.add_argument("--restore", metavar="NAME", help="make this checkpoint the store's committed state")
            choice.add_argument("--remove", metavar="NAME", help="delete this checkpoint")
        if name == "export":
            sub.add_argument("out", metavar="OUT", help="folder to be made")
            sub.add_argument(
                "--format",
                choices=("safetensors", "dcp"),
                default="safetensors",
                help="dcp: weights and Adam states for torch.distributed.checkpoint (safetensors)",
            )
            sub.add_argument(
                "--masters", action="store_true", help="the float32 masters instead of the weights of compute"
            )
            sub.add_argument("--host-memory", metavar="SIZE", help='budget, such as "8GiB"')
            sub.add_argument(
                "--merge", action="store_true", help="adapters merged into the model (otherwise the adapter alone)"
            )
        sub.add_argument(
            "--also",
            action="append",
            default=[],
            metavar="DIR",
            help="further directory of a store on several drives",
        )
    trace = add("trace", _trace, "the lanes of one of a run's last steps, for Perfetto or as a picture")
    trace.add_argument("store", metavar="STORE", help="the store's (first) directory")
    trace.add_argument("--step", type=_positive, metavar="N", help="a step of the last few (the last one)")
    trace.add_argument("--out", required=True, metavar="FILE", help=".json, .png or .svg")

    bench = commands.add_parser("bench", help="measure a part of this machine beside its limit in the same run")
    parts = bench.add_subparsers(title="parts", required=True, metavar="PART")
    for name in BENCHES:
        module = _bench_module(name)
        sub = parts.add_parser(
            name, help=module.SUMMARY, description=f"{module.SUMMARY[0].upper()}{module.SUMMARY[1:]}."
        )
        sub.set_defaults(command=_bench, bench=name, leaves=_LEAVES_NOTHING)
        sub.add_argument("--json", action="store_true", help="JSON on stdout, and nothing else")
        module.add_arguments(sub)
    return parser


def _add_recipe(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("recipe", metavar="RECIPE", help="YAML file")
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="SECTION.KEY=VALUE",
        help="override one value of the recipe",
    )


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r}: expected a whole number above 0")
    return int(text)


def _resume(text: str) -> str | int:
    if text.isdecimal():
        return int(text)
    if text not in ("auto", "never", "must"):
        raise argparse.ArgumentTypeError(f"{text!r}: choose auto, never, must or the number of a step")
    return text


def _directories(options: argparse.Namespace) -> str | list[str]:
    store: str = options.store
    return [store, *options.also] if options.also else store


# ----------------------------------------------------------------------------------------------------- output


def _print(text: str, indent: int | None = None) -> None:
    print(fitted(text, sys.stdout, indent))


def _print_json(value: Any) -> None:
    print(json.dumps(value, indent=2, default=str))


def _outline(value: Any, indent: str = "") -> Iterator[str]:
    """A JSON object as indented `key: value` lines; objects in a list go by their name, or by their number."""
    for key, inner in value.items() if isinstance(value, dict) else enumerate(value, start=1):
        if isinstance(value, list) and isinstance(inner, dict) and "name" in inner:
            key, inner = inner["name"], {k: v for k, v in inner.items() if k != "name"}
        if isinstance(inner, dict | list) and inner and not _is_flat(inner):
            yield f"{indent}{key}:"
            yield from _outline(inner, indent + "  ")
        else:
            yield f"{indent}{_fact(key, inner)}"


def _fact(key: str | int, value: Any) -> str:
    """A key and its value for people: bytes as sizes, and a moment as date and time here."""
    if isinstance(key, str) and isinstance(value, int | float):
        if key.endswith("_bytes"):
            value = format_bytes(value)
        elif key == "created_seconds":
            with contextlib.suppress(OverflowError, ValueError, OSError):  # no moment that there is
                moment = datetime.fromtimestamp(value).astimezone()
                return f"created: {moment.isoformat(sep=' ', timespec='seconds')}"
    return f"{key}: {_flat_text(value)}"


def _is_flat(value: Any) -> bool:
    return isinstance(value, list) and all(not isinstance(item, dict | list) for item in value)


def _flat_text(value: Any) -> str:
    if isinstance(value, list):
        return ", ".join(map(str, value)) or "none"
    return "none" if value in (None, {}) else str(value)


# ----------------------------------------------------------------------------------------------------- errors


def _report(error: BaseException, interruption: _Interruption) -> int:
    if os.environ.get("FUYOU_TRACEBACK") == "1":
        traceback.print_exception(error)
    # An interruption may surface as another error of what it interrupted; it is an interruption all the same.
    if interruption.arrived or isinstance(error, KeyboardInterrupt):
        said = (str(error) if isinstance(error, KeyboardInterrupt) else "") or interruption.leaves
        # Over the terminal's own ^C, and over a line that was to be written over.
        _complain(f"interrupted: {said}", start="\r\x1b[K" if has_escapes(sys.stderr) else "")
        return EXIT_INTERRUPTED
    code, message = _explain(error)
    _complain(f"error: {message}")
    return code


def _explain(error: BaseException) -> tuple[int, str]:
    text = str(error) or type(error).__name__
    if isinstance(error, ConfigError):
        return EXIT_USAGE, text
    if isinstance(error, PlanError):
        return EXIT_DOES_NOT_FIT, text
    if isinstance(error, FuyouError | OSError) or type(error).__module__.split(".")[0] in (
        "io_engine",
        "optim",
    ):
        return EXIT_FAILED, text
    if type(error).__name__ == "OutOfMemoryError":
        return EXIT_FAILED, (
            f"the GPU's memory is used up ({text.splitlines()[0]}): lower offload.micro_batch_size or data.max_length"
        )
    if isinstance(error, MemoryError):
        return EXIT_FAILED, f"the host's memory is used up ({text}): lower offload.host_memory"
    return EXIT_FAILED, (
        f"unexpected {type(error).__name__}: {text.splitlines()[0]} (this is a defect of fuyou; "
        "FUYOU_TRACEBACK=1 shows "
        "where it happened)"
    )


def _complain(message: str, *, start: str = "") -> None:
    with contextlib.suppress(OSError):
        sys.stdout.flush()
        _say(f"fuyou: {message}", start=start)


def _say(text: str, *, start: str = "") -> None:
    sys.stderr.write(f"{start}{fitted(text, sys.stderr)}\n")
    sys.stderr.flush()


def _discard_stdout() -> None:
    with contextlib.suppress(OSError, ValueError):
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, sys.stdout.fileno())
        os.close(null)


class _Interruption:
    """SIGINT and SIGTERM raise KeyboardInterrupt, once. A second signal ends the process on the spot.

    Both are safe for the store, which never overwrites what is committed.
    """

    def __init__(self) -> None:
        self.arrived = False
        self.leaves = "nothing was begun; run the same command again"
        """What is left of the command, and how to go on."""
        self._before: dict[int, Any] = {}

    def __enter__(self) -> _Interruption:
        # Only the main thread may set handlers; elsewhere the caller's stay as they are.
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                self._before[number] = signal.signal(number, self._handle)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self.arrived:
            _end_at_once()
        self.arrived = True
        raise KeyboardInterrupt


def _end_at_once() -> NoReturn:
    """End the process, whatever is under way; by system calls alone, since nobody may hold a file's lock."""
    with contextlib.suppress(OSError):
        if os.isatty(1) and has_escapes(sys.__stdout__ or sys.stdout):
            os.write(1, b"\x1b[?25h")  # a live view has hidden the cursor
        if os.isatty(2):
            os.write(2, b"\n")
        os.write(2, b"fuyou: ended at once; what is committed is safe: run the same command to go on\n")
    os._exit(EXIT_INTERRUPTED)


def _quiet_libraries() -> None:
    """Keeps the libraries' progress bars and advice out of the output; what matters is said by us."""
    # Untyped functions of another package.
    logging: Any = importlib.import_module("transformers.utils.logging")
    if "TRANSFORMERS_VERBOSITY" not in os.environ:
        logging.set_verbosity_error()
    logging.disable_progress_bar()
    # Which run is continued is said by the commands themselves.
    getLogger("fuyou.opening").setLevel(ERROR)
