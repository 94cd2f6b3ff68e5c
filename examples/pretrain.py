"""Pretrain a small LLaMA-style decoder on bytes of real text, with full-rank and low-rank optimizers side by
side.

    python examples/pretrain.py              # AdamW, GaLore, I3S and RSO in turn; minutes on two CPU cores
    python examples/pretrain.py --optimizer i3s --rank 16 --lr 2e-2
    python examples/pretrain.py --resume     # go on after a kill or Ctrl-C
    torchrun --nproc-per-node 2 examples/pretrain.py --compress-gradients
    torchrun --nproc-per-node 2 examples/pretrain.py --parallel fsdp2

Each optimizer starts from the same weights and sees the same batches, and embedding, head and norms train at
one rate (--dense-lr) under all of them. What differs is how the linear layers within the decoder train: in
full, or at low rank, which costs some loss and saves optimizer state (RSO: activations, too). The result is a
table, metrics as JSON lines and a picture.
"""

# ruff: noqa: E402
from __future__ import annotations

import os

# Read when torch is loaded. Threads that spin while they wait slow each other down as soon as another process
# shares the cores.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import argparse
import dataclasses
import importlib
import json
import math
import sys
from pathlib import Path
from typing import Any

import llama
import text
import torch
import training
from checkpoints import Damaged, read_metrics, remove_partials, write_atomically
from exclusive import exclusive
from methods import DEFAULT, METHODS, default_lr
from processes import ALONE, Processes, is_joined, join
from settings import CHOICES, Plan, Settings, SettingsError, defaults, flag
from stopping import stop_on_signal
from training import Diverged, Files, Stopped

sys.path.append(str(Path(__file__).resolve().parents[1]))  # so that a checkout works before it is installed

PLAN, SUMMARY, PICTURE = "settings.json", "summary.json", "curves.png"
DEMO_EXTRA = "pip install 'lowrank-kernels[demo]'"


def parser() -> argparse.ArgumentParser:
    counts = ", ".join(f"{name} {_short(llama.parameter_count(size, text.VOCAB_SIZE, False))}" for name, size in llama.SIZES.items())
    result = argparse.ArgumentParser(
        prog="pretrain.py",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        argument_default=argparse.SUPPRESS,
        epilog="Sizes are the LLaMA widths and depths their names stand for; over a vocabulary of 256 bytes they have fewer\n"
        f"parameters: {counts}.",
    )
    base = defaults("tiny")

    def option(group: argparse._ArgumentGroup, name: str, kind: type, help: str, **extra: Any) -> None:
        default = getattr(base, name)
        group.add_argument(flag(name), type=kind, help=help if default is None else f"{help} (tiny: {default})", **extra)

    what = result.add_argument_group("what to train")
    what.add_argument("--model", choices=list(llama.SIZES), help="size of the decoder, and defaults that go with it (tiny)")
    what.add_argument("--tie-head", action="store_true", help="the output head shares the embedding's weights")
    what.add_argument("--data", type=Path, metavar="FILE_OR_DIR", help="text to train on (the Python standard library's source)")
    option(what, "seed", int, "of weights, batches and sampled subspaces")
    option(what, "seq_len", int, "bytes a sequence")
    option(what, "batch_size", int, "sequences a step")
    option(what, "accumulate", int, "cut each step's batch into this many micro-batches, to save memory")
    option(what, "steps", int, "optimizer steps")

    how = result.add_argument_group("how to optimize")
    how.add_argument(
        "--optimizer",
        nargs="+",
        choices=list(METHODS),
        metavar="NAME",
        help=f"run one after the other: {', '.join(METHODS)} ({' '.join(DEFAULT)})",
    )
    how.add_argument(
        "--lr",
        nargs="+",
        metavar="LR",
        help="peak learning rate of the linear layers within the decoder: one number for all, or adamw=1e-3 galore=1e-2 "
        f"({' '.join(f'{name}={method.lr:g}' for name, method in METHODS.items())}, half of it from 60m on)",
    )
    option(how, "dense_lr", float, "peak learning rate of embedding, head and norms, the same for all optimizers")
    how.add_argument("--warmup", type=int, help="steps of linear warm-up before the cosine (a tenth of --steps)")
    option(how, "clip", float, "norm to which the gradient is clipped; 0 for never")
    option(how, "weight_decay", float, "decoupled, as in AdamW")
    option(how, "rank", int, "of the subspaces of GaLore and I3S")
    option(how, "update_proj_gap", int, "steps between subspace refreshes")
    option(how, "scale", float, "factor on the low-rank update")
    option(how, "svd", str, "how a refresh finds its subspace", choices=CHOICES["svd"])
    option(how, "state_bits", int, "of each of the low-rank optimizers' moments: 32 or 8", choices=CHOICES["state_bits"])
    option(how, "rounding", str, "of weights in bf16 that a low-rank optimizer moves", choices=CHOICES["rounding"])

    option(how, "rso_rank", int, "of RSO's random subspaces")
    option(how, "inner_steps", int, "steps that RSO takes in one of them")
    option(how, "distribution", str, "that RSO draws them from", choices=CHOICES["distribution"])
    option(how, "principal_rank", int, "directions of the layers' inputs in them, with --distribution principal; 0: half of the rank")
    option(how, "rso_scale", float, "factor on RSO's update")
    option(how, "rso_moments", str, "what RSO's next subspace does to them", choices=CHOICES["rso_moments"])

    option(
        how,
        "in_backward",
        str,
        "project gradients while the backward pass runs, and move the matrices after it (deferred) or at once (immediately)",
        choices=CHOICES["in_backward"],
        nargs="?",
        const="deferred",
    )
    how.add_argument("--diagnostics", action="store_true", help="look at each refresh: captured energy and effective rank, in the picture")
    option(
        how,
        "parallel",
        str,
        "what the processes of torchrun hold: all parameters each (ddp), or parts of them (fsdp2)",
        choices=CHOICES["parallel"],
    )
    how.add_argument("--compress-gradients", action="store_true", help="let the processes of torchrun exchange projected gradients")

    where = result.add_argument_group("where and how often")
    where.add_argument("--dtype", choices=CHOICES["dtype"], help="of the weights and their gradients (fp32)")
    where.add_argument("--device", help="cpu, cuda, … (cuda where there is one)")
    where.add_argument("--threads", type=int, help="CPU threads (torch's choice)")
    where.add_argument("--compile", action="store_true", help="torch.compile the model")
    where.add_argument("--lean", action="store_true", help="keep less of norms, attention and SwiGLU for the backward pass (lean.py)")
    option(where, "eval_every", int, "steps between evaluations on the held-out text")
    option(where, "eval_sequences", int, "sequences of held-out text in an evaluation")
    where.add_argument("--checkpoint-every", type=int, default=100, help="steps between checkpoints (100)")
    where.add_argument("--out", type=Path, help="directory for everything written (a new one under runs/)")
    where.add_argument(
        "--resume",
        action="store_true",
        default=False,
        help="go on with the run in --out (the latest under runs/) from its checkpoint; settings are the run's own",
    )
    return result


def learning_rates(values: list[str], methods: list[str]) -> dict[str, float]:
    """["1e-3"] or ["adamw=1e-3", "galore=1e-2"] → optimizer → learning rate."""
    result = {}
    for value in values:
        name, equals, number = value.rpartition("=")
        try:
            lr = float(number)
        except ValueError:
            raise SettingsError(f"--lr {value}: {number!r} is not a number") from None
        if not 0 < lr < math.inf:
            raise SettingsError(f"--lr {value}: a learning rate must be positive and finite")
        if not equals:
            if len(values) > 1:
                raise SettingsError(f"--lr {' '.join(values)}: give one number for all optimizers, or NAME=NUMBER for each")
            return dict.fromkeys(methods, lr)
        if name not in methods:
            raise SettingsError(f"--lr {value}: {name!r} is not among the optimizers of this run ({', '.join(methods)})")
        result[name] = lr
    return result


def new_plan(args: argparse.Namespace, processes: Processes = ALONE) -> tuple[Plan, text.Corpus]:
    """The settings asked for, and their text."""
    given = {field.name: getattr(args, field.name) for field in dataclasses.fields(Settings) if hasattr(args, field.name)}
    if "steps" in given:
        given.setdefault("warmup", given["steps"] // 10)
    given.setdefault("device", "cuda" if torch.cuda.is_available() else "cpu")
    given.setdefault("threads", torch.get_num_threads())
    if "data" in given:
        given["data"] = str(given["data"].resolve())
    settings = dataclasses.replace(defaults(given.get("model", "tiny")), **given, processes=processes.count).check()
    _check_device(settings.device)
    _check_processes(settings)
    methods = list(dict.fromkeys(getattr(args, "optimizer", DEFAULT)))
    _check_gradients(settings, methods)
    chosen = learning_rates(getattr(args, "lr", []), methods)
    corpus = _load_text(settings)
    settings = dataclasses.replace(settings, data_digest=corpus.digest)
    hidden = llama.SIZES[settings.model].hidden
    return Plan(settings, {method: chosen.get(method, default_lr(method, hidden)) for method in methods}), corpus


def resumed_plan(args: argparse.Namespace, directory: Path, processes: Processes = ALONE) -> tuple[Plan, text.Corpus]:
    """The plan of the run in `directory`. Arguments that are given must agree with it, but optimizers may be
    added.

    Raises SettingsError or checkpoints.Damaged, before anything is written, where the run cannot go on.
    """
    old = Plan.load(directory / PLAN)
    for field in dataclasses.fields(Settings):
        was = getattr(old.settings, field.name)
        now = getattr(args, field.name, was)
        if isinstance(now, Path):
            now = str(now.resolve())
        if now != was:
            raise SettingsError(f"{flag(field.name)} {now}: the run in {directory} was started with {was} and cannot change")
    settings = old.settings
    if settings.processes != processes.count:
        if settings.parallel != "fsdp2":
            raise SettingsError(
                f"the run in {directory} was started with {settings.processes} processes, not {processes.count}; one of --parallel fsdp2 "
                "can go on with any number"
            )
        settings = dataclasses.replace(settings, processes=processes.count).check()
    _check_processes(settings)
    methods = list(dict.fromkeys([*old.lr, *getattr(args, "optimizer", [])]))
    _check_gradients(settings, methods)
    lr = {method: old.lr.get(method, default_lr(method, llama.SIZES[settings.model].hidden)) for method in methods}
    for method, now in learning_rates(getattr(args, "lr", []), methods).items():
        if method in old.lr and now != old.lr[method]:
            raise SettingsError(f"--lr {method}={now:g}: the run in {directory} was started with {old.lr[method]:g} and cannot change")
        lr[method] = now
    _check_device(settings.device)
    corpus = _load_text(settings)
    if corpus.digest != settings.data_digest:
        raise SettingsError(f"--data: {corpus.name} has changed since the run in {directory} was started")
    for method in lr:
        Files.of(directory, method).check()
    return Plan(settings, lr), corpus


def _check_gradients(settings: Settings, methods: list[str]) -> None:
    if settings.in_backward == "deferred" or settings.compress_gradients:
        for method in methods:
            if METHODS[method].needs_gradient:
                option = "--compress-gradients" if settings.compress_gradients else "--in-backward deferred"
                raise SettingsError(f"{option} keeps no gradient, by which {METHODS[method].title} moves weights; leave {method} out")


def _check_processes(settings: Settings) -> None:
    if settings.parallel == "fsdp2" and not is_joined():
        raise SettingsError("--parallel fsdp2 needs torchrun: torchrun --nproc-per-node 2 examples/pretrain.py …")


def _check_device(device: str) -> None:
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise SettingsError(f"--device {device}: {str(error).splitlines()[0]}") from None


def _load_text(settings: Settings) -> text.Corpus:
    corpus = text.load(Path(settings.data) if settings.data else None)
    text.check_length(corpus, settings.seq_len)
    return corpus


def new_directory(model: str) -> Path:
    """runs/<model>-001, or the first number that is free."""
    number = 1
    while True:
        try:
            (path := Path("runs") / f"{model}-{number:03}").mkdir(parents=True)
            return path
        except FileExistsError:
            number += 1


def latest_directory() -> Path:
    found = sorted(Path("runs").glob(f"*/{PLAN}"), key=lambda path: path.stat().st_mtime)
    if not found:
        raise SettingsError("--resume: no run under runs/; name its directory with --out")
    return found[-1].parent


def _short(count: int) -> str:
    return f"{count / 1e6:.3g} M" if count < 1e9 else f"{count / 1e9:.3g} B"


def describe(plan: Plan) -> str:
    settings = plan.settings
    size = llama.SIZES[settings.model]
    parameters = llama.parameter_count(size, text.VOCAB_SIZE, settings.tie_head)
    of_rso = f"; RSO rank {settings.rso_rank}, every {settings.inner_steps}" if "rso" in plan.lr else ""
    return (
        f"{settings.model} ({_short(parameters)} parameters), rank {settings.rank} of {size.hidden}, "
        f"refresh every {settings.update_proj_gap} steps{of_rso}"
    )


def _launcher(settings: Settings) -> str:
    return f"torchrun --nproc-per-node {settings.processes}" if is_joined() else "python"


def run_beside(plan: Plan, corpus: text.Corpus, directory: Path, processes: Processes, *, checkpoint_every: int, resume: bool) -> int:
    """The part of a process other than the first, which writes and reports."""
    with stop_on_signal() as received:
        for method, lr in plan.lr.items():
            files = Files.of(directory, method)
            if processes.from_first(None):
                continue
            options = dict(checkpoint_every=checkpoint_every, resume=resume, should_stop=lambda: bool(received), processes=processes)
            try:
                training.train(plan.settings, method, lr, corpus, files, **options)
            except Diverged:
                continue
            except Stopped:
                return 0
    return 0


def run(plan: Plan, corpus: text.Corpus, directory: Path, processes: Processes, *, checkpoint_every: int, resume: bool) -> int:
    """Trains the optimizers that have not finished, then reports on those that have. Returns the exit
    status."""
    from report import Reporter, summarize, table
    from rich.console import Console

    console = Console(soft_wrap=not sys.stdout.isatty())
    settings = plan.settings
    plan.save(directory / PLAN)
    processes.from_first(str(directory))
    where = f"{settings.dtype} on {settings.device} ({settings.threads} threads)"
    where += f", {processes.count} processes" if processes.count > 1 else ""
    where += ", FSDP2" if settings.parallel == "fsdp2" else ""
    console.print(f"{describe(plan)}, seed {settings.seed}, {where}", highlight=False)
    console.print(str(corpus), highlight=False)

    status, runs = 0, {}
    with stop_on_signal() as received, Reporter(console, settings.steps) as reporter:
        for method, lr in plan.lr.items():
            files = Files.of(directory, method)
            if processes.from_first(resume and files.finished()):
                console.print(f"{METHODS[method].title}: finished before", highlight=False)
                runs[method] = read_metrics(files.metrics)
                continue
            reporter.start(method, lr)
            try:
                runs[method] = training.train(
                    settings,
                    method,
                    lr,
                    corpus,
                    files,
                    checkpoint_every=checkpoint_every,
                    resume=resume,
                    on_row=reporter.row,
                    should_stop=lambda: bool(received),
                    processes=processes,
                )
            except Diverged as error:
                console.print(f"[red]{error}; try a smaller --lr[/]", highlight=False)
                status = 1
            except Stopped as stop:
                console.print(
                    f"Stopped; {METHODS[method].title} is saved at step {stop.step}. To go on:\n"
                    f"  {_launcher(settings)} {sys.argv[0]} --resume --out {directory}",
                    highlight=False,
                )
                return 128 + received[0] if received else 1

    if not runs:
        return status
    summaries = {method: summarize(rows) for method, rows in runs.items()}
    record = {"settings": dataclasses.asdict(settings), "lr": plan.lr, "torch": torch.__version__, "results": summaries}
    write_atomically(directory / SUMMARY, lambda file: file.write(json.dumps(record, indent=2).encode() + b"\n"))
    console.print()
    console.print(table(summaries, title=f"{describe(plan)}, {settings.steps} steps, seed {settings.seed}"))
    written = [*(f"{method}.jsonl" for method in runs), SUMMARY]
    if _draw(directory / PICTURE, plan, corpus, runs):
        written.append(PICTURE)
    console.print(f"Written to {directory}: {', '.join(written)}", highlight=False)
    return status


def _draw(path: Path, plan: Plan, corpus: text.Corpus, runs: dict[str, list[dict[str, Any]]]) -> bool:
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        print(f"No picture: matplotlib is not installed ({DEMO_EXTRA})", file=sys.stderr)
        return False
    from picture import draw

    settings = plan.settings
    rates = ", ".join(f"{METHODS[method].title} {plan.lr[method]:g}" for method in runs)
    rates = f"peak lr {rates}; embedding, head and norms {settings.dense_lr:g} under each"
    length = f"{settings.steps} steps of {settings.batch_size} × {settings.seq_len} bytes, seed {settings.seed}"
    draw(
        path,
        runs,
        title=describe(plan),
        subtitle=f"{corpus.name}; {length}\n{rates}",
        random_overlap=min(1.0, settings.rank / llama.SIZES[settings.model].hidden),
    )
    return True


def main(argv: list[str] | None = None) -> int:
    args = parser().parse_args(argv)
    try:
        return _main(args)
    except (SettingsError, text.TextError, Damaged, OSError) as error:
        print(f"pretrain.py: error: {error}", file=sys.stderr)
        return 2


def _main(args: argparse.Namespace) -> int:
    """If there is a run already, the lock is taken first. If there is none, it is taken last, so that all is
    checked before anything is written."""
    _require("rich", DEMO_EXTRA)
    if args.checkpoint_every < 1:
        raise SettingsError(f"--checkpoint-every must be a positive integer, got {args.checkpoint_every}")
    processes = join()
    if not processes.is_first:
        directory = Path(processes.from_first(None))  # once the first one has checked everything and written the plan
        plan = Plan.load(directory / PLAN)
        return run_beside(plan, _load_text(plan.settings), directory, processes, checkpoint_every=args.checkpoint_every, resume=args.resume)
    directory = getattr(args, "out", None)
    if directory is not None:
        _check_directory(directory)
    if args.resume:
        directory = directory or latest_directory()
        if not (directory / PLAN).exists():
            raise SettingsError(f"--resume: {directory} holds no run")
        with exclusive(directory) as locked:
            plan, corpus = resumed_plan(args, directory, processes)
            _require_package(plan)
            return _run_alone(plan, corpus, directory, args, locked, processes)
    if directory is not None and (directory / PLAN).exists():
        raise _holds_a_run(directory)
    plan, corpus = new_plan(args, processes)
    _require_package(plan)
    if directory is None:
        directory = new_directory(plan.settings.model)
    with exclusive(directory) as locked:
        if (directory / PLAN).exists():  # another process may have written it since the first look
            raise _holds_a_run(directory)
        return _run_alone(plan, corpus, directory, args, locked, processes)


def _check_directory(directory: Path) -> None:
    try:
        str(directory).encode()
    except UnicodeEncodeError:
        raise SettingsError(f"--out: the name {os.fsencode(directory)!r} is not UTF-8") from None
    if directory.exists() and not directory.is_dir():
        raise SettingsError(f"--out {directory} is a file, not a directory")


def _holds_a_run(directory: Path) -> SettingsError:
    return SettingsError(f"--out {directory} already holds a run: add --resume to go on with it, or choose another directory")


def _require_package(plan: Plan) -> None:
    if any(METHODS[method].reads for method in plan.lr):
        _require("lowrank_kernels", "all but adamw need it; in its checkout, pip install -e .")


def _run_alone(
    plan: Plan, corpus: text.Corpus, directory: Path, args: argparse.Namespace, locked: bool, processes: Processes = ALONE
) -> int:
    if locked:
        files = [directory / PLAN, directory / SUMMARY, directory / PICTURE]
        remove_partials(files + [Files.of(directory, method).checkpoint for method in METHODS])
    try:
        return run(plan, corpus, directory, processes, checkpoint_every=args.checkpoint_every, resume=args.resume)
    except OSError as error:  # for example a full disk
        print(f"pretrain.py: error: {error}; --resume --out {directory} goes on from what was saved before", file=sys.stderr)
        return 1


def _require(module: str, remedy: str) -> None:
    try:
        importlib.import_module(module)
    except ImportError as error:
        raise SettingsError(f"{module} cannot be imported ({error}): {remedy}") from None


if __name__ == "__main__":
    sys.exit(main())
