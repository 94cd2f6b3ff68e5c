"""How well each optimizer learns, by the pretraining example over a grid of settings and seeds.

Each run writes one JSON line.

    python benchmarks/learning.py short-gap --optimizer galore i3s --seeds 0 1 2 --rank 8 32
        --update-proj-gap 10 50 --lr 1e-2 2e-2
    python benchmarks/learning.py short-gap --report
    python -m benchmarks.learning --report          # the study of all methods, FAMILY

Options that take several values span the grid. --lr is the peak rate of the matrices within the decoder,
--dense-lr that of embedding, head and norms under every optimizer. The first results have no dense_lr in
their settings; in them everything trained at lr. Runs already in results/learning/NAME.jsonl are skipped, and
an interrupted run goes on from its checkpoint, so the same command may be stopped and repeated. Results are
appended, never rewritten.
"""

from __future__ import annotations

import argparse
import dataclasses
import datetime
import hashlib
import itertools
import json
import os
import platform
import shutil
import subprocess
import sys
from collections import defaultdict
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path
from statistics import mean, stdev
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # as in examples/pretrain.py, before torch is loaded
ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT / "examples"), str(ROOT)]

import llama  # noqa: E402
import text  # noqa: E402
import torch  # noqa: E402
import training  # noqa: E402
from methods import METHODS, default_lr  # noqa: E402
from settings import ADDED, Settings, SettingsError, defaults, flag  # noqa: E402
from stopping import stop_on_signal  # noqa: E402

RESULTS = ROOT / "benchmarks" / "results" / "learning"
SCRATCH = ROOT / "runs" / "learning"
FAMILY = "family"
PARTS = ("weight", "gradient", "state", "activation")
"""Of the memory of a run."""
METHODS_OWN = tuple(dict.fromkeys(name for method in METHODS.values() for name in method.reads))
GRID = ("lean", "steps", "batch_size", "seq_len", "weight_decay", "clip", "dense_lr", *METHODS_OWN)
NEWER = ("state_bits", "rounding", *ADDED)
"""Settings that the first results do not have. A key names them only where they are not the default."""


@dataclasses.dataclass(frozen=True)
class Run:
    method: str
    lr: float
    settings: Settings

    def key(self) -> str:
        """Equal for runs of the same experiment. The number of threads is not part of it: it changes last
        bits, not what is learnt."""
        settings = dataclasses.asdict(self.settings)
        del settings["threads"]
        others = set(METHODS_OWN) - set(METHODS[self.method].reads)
        for name in {*others, *(name for name in NEWER if settings[name] == getattr(Settings(), name))}:
            del settings[name]
        return json.dumps([self.method, self.lr, settings], sort_keys=True)

    def __str__(self) -> str:
        s = self.settings
        own = "".join(f" {name} {value}" for name in METHODS[self.method].reads if (value := getattr(s, name)) != getattr(Settings(), name))
        return f"{self.method} lr {self.lr:g} dense {s.dense_lr:g}{own} {s.model} {s.steps} steps seed {s.seed}"


def parser() -> argparse.ArgumentParser:
    result = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    result.add_argument("name", nargs="?", default=FAMILY, help=f"of the study: results/learning/NAME.jsonl ({FAMILY})")
    result.add_argument("--report", action="store_true", help="print what is there, mean ± standard deviation over seeds, and run nothing")
    result.add_argument("--model", choices=list(llama.SIZES), default="tiny")
    result.add_argument("--data", type=Path, help="as in examples/pretrain.py")
    result.add_argument("--optimizer", nargs="+", choices=list(METHODS), default=list(METHODS))
    result.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    result.add_argument(
        "--lr", nargs="+", type=float, help="peak learning rates of the matrices, each for every optimizer (each one's default)"
    )
    for name in GRID:
        kind = type(getattr(Settings(), name))
        kind = _on_or_off if kind is bool else kind
        result.add_argument(flag(name), dest=name, nargs="+", type=kind, help="one or more values (the model's default)")
    result.add_argument("--eval-sequences", type=int, default=512)
    result.add_argument("--dtype", choices=["fp32", "bf16"], default="fp32")
    result.add_argument("--device", default="cpu")
    result.add_argument("--threads", type=int, default=torch.get_num_threads(), help="CPU threads; 1 leaves the other cores alone")
    return result


def _on_or_off(value: str) -> bool:
    if value not in ("on", "off"):
        raise argparse.ArgumentTypeError(f"on or off, got {value!r}")
    return value == "on"


def grid(args: argparse.Namespace, digest: str) -> Iterator[Run]:
    """Seeds are the outermost loop, so that an interrupted study has whole repetitions."""
    varied = {name: values for name in GRID if (values := getattr(args, name))}
    seen = set()
    for seed, *values, method in itertools.product(args.seeds, *varied.values(), args.optimizer):
        settings = dataclasses.replace(
            defaults(args.model),
            **dict(zip(varied, values, strict=True)),
            seed=seed,
            data=str(args.data.resolve()) if args.data else None,
            data_digest=digest,
            eval_sequences=args.eval_sequences,
            dtype=args.dtype,
            device=args.device,
            threads=args.threads,
        )
        settings = dataclasses.replace(settings, warmup=settings.steps // 10, eval_every=max(1, settings.steps // 10)).check()
        for lr in args.lr or [default_lr(method, llama.SIZES[args.model].hidden)]:
            run = Run(method, lr, settings)
            if run.key() not in seen:
                seen.add(run.key())
                yield run


def perform(run: Run, corpus: text.Corpus, scratch: Path, stopping: list[int]) -> dict[str, Any]:
    """Trains (or goes on from the checkpoint in `scratch`) and returns what belongs to the result."""
    scratch.mkdir(parents=True, exist_ok=True)
    files = training.Files.of(scratch, run.method)
    try:
        rows = training.train(
            run.settings, run.method, run.lr, corpus, files, checkpoint_every=500, resume=True, should_stop=lambda: bool(stopping)
        )
    except training.Diverged as error:
        return {"diverged": str(error)}
    steps = [row for row in rows if row["event"] == "step"]
    overlaps = [row["overlap"] for row in steps if row.get("overlap") is not None]
    val_curve = [(row["step"], row["val_loss"]) for row in rows if row["event"] == "eval"]
    tail = [row["loss"] for row in steps[-max(1, len(steps) // 20) :]]
    return {
        "val_loss": val_curve[-1][1],
        "train_loss_tail": mean(tail),  # over the last twentieth of the steps
        "overlap": mean(overlaps) if overlaps else None,
        "overlap_second_half": mean(overlaps[len(overlaps) // 2 :]) if overlaps else None,
        "wall_s": rows[-1]["wall_s"],
        "bytes": {part: rows[-1][f"{part}_bytes"] for part in PARTS},
        "val_curve": val_curve,
        "overlaps": overlaps,
    }


def provenance() -> dict[str, Any]:
    def git(*command: str) -> str | None:
        done = subprocess.run(["git", "-C", str(ROOT), *command], capture_output=True, text=True)
        return done.stdout.strip() if done.returncode == 0 else None

    def version(package: str) -> str | None:
        try:
            return metadata.version(package)
        except metadata.PackageNotFoundError:
            return None

    changed = git("status", "--porcelain", "--untracked-files=no")
    return {
        "time": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "commit": git("rev-parse", "--verify", "HEAD"),
        "uncommitted_changes": None if changed is None else bool(changed),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "lowrank_kernels": version("lowrank-kernels"),
        "machine": f"{platform.machine()}, {os.cpu_count()} CPUs",
    }


def read(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def append(path: Path, record: dict[str, Any]) -> None:
    """Appends one line in one write, so that studies that share a file do not mix their lines."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "ab", buffering=0) as file:
        file.write(json.dumps(record, allow_nan=False).encode() + b"\n")
        os.fsync(file.fileno())


def report(records: list[dict[str, Any]], name: str) -> None:
    """A row for each setting, a column for each setting that varies."""
    from rich.console import Console
    from rich.table import Table

    def described(record: dict[str, Any]) -> dict[str, Any]:
        hidden = {"seed", "threads", "data_digest", "eval_sequences", "eval_every", "warmup"}
        shown = {key: value for key, value in record["settings"].items() if key not in hidden}
        reads = METHODS[record["optimizer"]].reads
        shown = {name: getattr(Settings(), name) for name in METHODS_OWN} | shown
        shown |= {name: None for name in METHODS_OWN if name not in reads}
        dense_lr = shown.pop("dense_lr", record["lr"])
        return {**shown, "dense_lr": dense_lr, "lr": record["lr"], "optimizer": record["optimizer"]}

    groups = defaultdict(list)
    for record in records:
        groups[tuple(described(record).items())].append(record)
    columns = {key: {value for group in groups if (value := dict(group)[key]) is not None} for key, _ in next(iter(groups))}
    columns = [key for key, values in columns.items() if len(values) > 1 or key in ("optimizer", "lr")]
    result = Table(title=f"{name}: mean ± standard deviation over seeds")
    for column in [*columns, "seeds", "held-out loss", "overlap", "overlap, 2nd half", "state MB", "MB in all", "s a run"]:
        result.add_column(column, justify="left" if column == "optimizer" else "right")

    def spread(group: list[dict[str, Any]], key: str, digits: int) -> str:
        values = [record[key] for record in group if record.get(key) is not None]
        if not values:
            return "–"
        return f"{mean(values):.{digits}f}" + (f" ± {stdev(values):.{digits}f}" if len(values) > 1 else "")

    def megabytes(group: list[dict[str, Any]], parts: tuple[str, ...]) -> str:
        held = next((record["bytes"] for record in group if "bytes" in record), None)
        return "–" if held is None else f"{sum(held[part] for part in parts) / 1e6:.2f}"

    def order(group: tuple[tuple[str, Any], ...]) -> list[tuple[bool, Any]]:
        return [(value is not None, "" if value is None else value) for value in (dict(group)[column] for column in columns)]

    for group in sorted(groups, key=order):
        runs = groups[group]
        diverged = sum("diverged" in record for record in runs)
        setting = ["–" if dict(group)[column] is None else str(dict(group)[column]) for column in columns]
        result.add_row(
            *setting,
            str(len(runs)) + (f" ({diverged} diverged)" if diverged else ""),
            spread(runs, "val_loss", 4),
            spread(runs, "overlap", 3),
            spread(runs, "overlap_second_half", 3),
            megabytes(runs, ("state",)),
            megabytes(runs, PARTS),
            spread(runs, "wall_s", 0),
        )
    console = Console(width=None if sys.stdout.isatty() else 160)
    console.print(result)
    if name == FAMILY:
        console.print(by_memory(records, columns))


def by_memory(records: list[dict[str, Any]], columns: list[str]) -> Any:
    """The runs by what they hold in all, with the loss above that of AdamW with the same seed. A difference
    counts as one where it is more than two of its standard deviations over the seeds, and there are three."""
    from rich.table import Table

    full = {record["settings"]["seed"]: record["val_loss"] for record in records if record["optimizer"] == "adamw" and "val_loss" in record}
    groups = defaultdict(list)
    for record in records:
        if "val_loss" in record:
            settings = record["settings"] | {"lr": record["lr"], "optimizer": record["optimizer"]}
            reads = (*METHODS[record["optimizer"]].reads, "optimizer", "lr")
            groups[tuple(settings.get(column) if column in reads else None for column in columns)].append(record)
    result = Table(title="by memory: weights, gradients, optimizer state and saved activations")
    for column in [*columns, "MB in all", "state MB", "held-out loss", "above AdamW, same seed", "two deviations"]:
        result.add_column(column, justify="left" if column == "optimizer" else "right")
    total = {key: sum(runs[0]["bytes"][part] for part in PARTS) / 1e6 for key, runs in groups.items()}
    for key in sorted(groups, key=total.__getitem__):
        runs = groups[key]
        losses = [record["val_loss"] for record in runs]
        above = [record["val_loss"] - full[record["settings"]["seed"]] for record in runs if record["settings"]["seed"] in full]
        spread = stdev(above) if len(above) > 1 else None
        verdict = "–" if key[columns.index("optimizer")] == "adamw" or len(above) < 3 else "yes" if abs(mean(above)) > 2 * spread else "no"
        result.add_row(
            *("–" if value is None else str(value) for value in key),
            f"{total[key]:.1f}",
            f"{runs[0]['bytes']['state'] / 1e6:.2f}",
            f"{mean(losses):.4f}" + (f" ± {stdev(losses):.4f}" if len(losses) > 1 else ""),
            "–" if not above else f"{mean(above):+.4f}" + (f" ± {spread:.4f}" if spread is not None else ""),
            verdict,
        )
    return result


def main() -> int:
    arguments = parser()
    args = arguments.parse_args()
    path = RESULTS / f"{args.name}.jsonl"
    records = read(path)
    if args.report:
        if not records:
            arguments.error(f"{path} holds no runs")
        report(records, args.name)
        return 0

    try:
        corpus = text.load(args.data)
        runs = list(grid(args, corpus.digest))
        for seq_len in {run.settings.seq_len for run in runs}:
            text.check_length(corpus, seq_len)
    except (SettingsError, text.TextError) as error:
        arguments.error(str(error))
    done = {record["key"] for record in records}
    todo = [run for run in runs if run.key() not in done]
    print(f"{args.name}: {len(todo)} runs to do, {len(runs) - len(todo)} in {path}", flush=True)

    with stop_on_signal() as stopping:
        for index, run in enumerate(todo, 1):
            scratch = SCRATCH / args.name / hashlib.sha256(run.key().encode()).hexdigest()[:16]
            try:
                result = perform(run, corpus, scratch, stopping)
            except training.Stopped as stop:
                print(f"stopped at step {stop.step} of: {run}; the same command goes on from there")
                return 130
            append(
                path,
                {
                    "optimizer": run.method,
                    "lr": run.lr,
                    **result,
                    "settings": dataclasses.asdict(run.settings),
                    **provenance(),
                    "key": run.key(),
                },
            )
            shutil.rmtree(scratch)
            outcome = (
                result.get("diverged")
                or f"held-out {result['val_loss']:.4f}"
                + (f", overlap {result['overlap']:.3f}" if result["overlap"] is not None else "")
                + f", {result['wall_s']:.0f} s"
            )
            print(f"[{index}/{len(todo)}] {run}: {outcome}", flush=True)
            if stopping:
                return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
