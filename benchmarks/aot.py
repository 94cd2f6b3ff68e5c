"""Ahead-of-time compilation of every kernel configuration, for GPUs that need not be here.

It reports registers, spills and access widths.

    python -m benchmarks.aot                # a table of all configurations
    python -m benchmarks.aot --out FILE     # the same in a file
    python -m benchmarks.aot --json FILE    # the reports as JSON, for tests/kernels/test_aot.py to judge
    python -m benchmarks.aot --sample       # only a few cases

The launchers run for real on unfilled CPU tensors; dry.py explains how. The disassembler is the one in
Triton's wheel.
"""

import argparse
import concurrent.futures
import dataclasses
import itertools
import json
import multiprocessing
import os
import re
import subprocess
import sys
import tempfile
from collections import Counter
from pathlib import Path

import torch
import triton

from lowrank_kernels.backends.triton import back_project, configs, moments, project, single_pass
from lowrank_kernels.backends.triton.table import Rows, pointer_table
from lowrank_kernels.storage.eight_bit import scales_shape

from . import dry

ROOT = Path(__file__).resolve().parent.parent
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
SMALL_TILE_TARGETS = (80, 90, 100, 120)  # targets of the rows for unknown architectures and narrow accesses
WIDE_EXTENT, NARROW_EXTENT = 4096, 1001  # m and n
TABLES = {"project": configs.PROJECT, "back_project": configs.BACK_PROJECT}
OPTIONS = ("8-bit", "stochastic", "on device")  # moments, rounding, counts and learning rate
ROW = torch.empty(1, dtype=torch.int64)  # a row of a pointer table that is never read


@dataclasses.dataclass(frozen=True)
class Case:
    """One launch to compile. `config` is the row that it is meant to reach; rank and kind are chosen so that
    it does."""

    kernel: str
    arch: int
    dtype: str
    kind: str
    config: object
    rank: int
    right: bool = False
    found_inf: bool = False
    normalised: str = "fp32"
    wide: bool = True
    options: tuple[str, ...] = ()  # a subset of OPTIONS


@dataclasses.dataclass
class Report:
    """The compiler's result for a launch. Counters map an instruction to how often it occurs."""

    kernel: str
    arch: int
    dtype: str
    kind: str
    side: str
    found_inf: bool
    normalised: str
    wide: bool
    options: list[str]
    config: dict
    wanted_config: dict
    registers: int
    shared_bytes: int
    stack_bytes: int
    local_bytes: int
    local_accesses: dict
    fp64: dict
    tensor_cores: dict
    global_accesses: dict

    def narrow(self) -> dict[str, int]:
        """Global accesses narrower than 16 bytes."""
        return {name: count for name, count in self.global_accesses.items() if access_bits(name) < 128}


def all_configs() -> set:
    """All rows: (kernel, architecture or None, config)."""
    rows = {("moments", None, configs.MOMENTS), ("moments", None, configs.MOMENTS_8BIT)}
    rows |= {("single_pass", arch, row) for arch, kinds in configs.SINGLE_PASS.items() if arch for rows_ in kinds.values() for row in rows_}
    for kernel, tables in TABLES.items():
        rows |= {(kernel, arch, row) for arch, kinds in tables.items() for kind in kinds.values() for row in kind}
    return rows


def cases() -> list[Case]:
    """Every row × side. 16-bit rows are compiled in bf16, and on sm_90 also in fp16. The back-projection is
    also compiled with N in fp32 and without found_inf.

    The small tiles are also compiled with a shape that allows no 16-byte access; other rows never get such a
    shape. On an architecture that has rows of its own, the small tiles get only such shapes.
    """
    found = []
    for kernel, tables in TABLES.items():
        for arch, kinds in tables.items():
            for target in SMALL_TILE_TARGETS if arch is None else (arch,):
                for kind, rows in kinds.items():
                    for row in rows:
                        for right in (False, True):
                            dtype = "bf16" if kind == "16bit" else "fp32"
                            found += _variants(Case(kernel, target, dtype, kind, row, row.rank_covered, right), arch)
    for target in dry.SHARED_LIMIT:
        for normalised in ("fp32", "bf16"):
            case = Case("moments", target, "fp32", "elementwise", configs.MOMENTS, 128, False, normalised == "bf16", normalised)
            found += [case, dataclasses.replace(case, options=("on device",))]
            case = dataclasses.replace(case, config=configs.MOMENTS_8BIT, options=("8-bit",))
            found += [case, dataclasses.replace(case, options=("8-bit", "on device")), dataclasses.replace(case, wide=False)]
    return single_pass_cases() + found  # the slowest cases go first


def sample() -> list[Case]:
    """A sample of the cases for sm_90. It has one case for each kernel and kind of dot, for narrow accesses
    and for 8-bit moments. Each is the case with the most options and the smallest tile. Sides take turns."""
    groups = {}
    for case in cases():
        if case.arch == 90:
            groups.setdefault((case.kernel, case.kind if case.wide else "narrow", "8-bit" in case.options), []).append(case)
    found = []
    for group in groups.values():
        turn = [case for case in group if case.right == bool(len(found) % 2)] or group
        found.append(max(turn, key=lambda case: (len(case.options), case.found_inf, case.normalised != "fp32", -case.rank)))
    return found


def single_pass_cases() -> list[Case]:
    """Every row × side. The largest is also compiled with 8-bit moments and all other options. On sm_90 one
    case is also compiled with each of the other options alone, and in fp16."""
    found = []
    for arch, kinds in configs.SINGLE_PASS.items():
        for (kind, moments_dtype), rows in kinds.items() if arch else ():
            dtype, others = ("bf16", OPTIONS[1:]) if kind == "16bit" else ("fp32", OPTIONS[2:])  # only bf16 is rounded stochastically
            largest = rows[-2:] if (arch, kind) == (90, "16bit") else rows[-1:] if arch == 90 or kind == "16bit" else ()
            for row, right in itertools.product(largest if moments_dtype == "8-bit" else rows, (False, True)):
                case = Case("single_pass", arch, dtype, kind, row, row.BLOCK_R, right, found_inf=True)
                if moments_dtype == "8-bit":
                    found.append(dataclasses.replace(case, options=("8-bit", *others)))
                    continue
                found.append(case)
                if (arch, kind, row.BLOCK_R, right) == (90, "16bit", 128, False):
                    found += [dataclasses.replace(case, options=(option,)) for option in others]
                    found.append(dataclasses.replace(case, dtype="fp16"))
    return found


def _variants(case: Case, arch: int | None) -> list[Case]:
    found = [case]
    if case.dtype == "bf16" and arch == 90:
        found.append(dataclasses.replace(case, dtype="fp16"))
    if case.kernel == "back_project":
        found = [dataclasses.replace(variant, found_inf=True, normalised=variant.dtype) for variant in found]
        if case.dtype == "bf16":
            optioned = dataclasses.replace(case, found_inf=True, normalised="bf16", options=("stochastic", "on device"))
            found += [case, optioned]
            if arch == 90:
                found += [dataclasses.replace(optioned, options=(option,)) for option in optioned.options]
    if arch is None:
        narrow = [dataclasses.replace(case, wide=False, rank=case.rank - 1)]
        narrow += [dataclasses.replace(variant, wide=False, rank=case.rank - 1) for variant in found if variant.options]
        found = narrow if case.arch in configs.PROJECT else narrow + found
    return found


def _launch(case: Case) -> None:
    dtype, m, n = DTYPES[case.dtype], *(2 * [WIDE_EXTENT if case.wide else NARROW_EXTENT])
    bases, matrices = [torch.empty(m, case.rank, dtype=dtype)], [torch.empty(m, n, dtype=dtype)]
    batch = torch.empty(1, case.rank, n, dtype=DTYPES[case.normalised])
    found_inf = torch.empty(1) if case.found_inf else None
    if case.kernel == "project":
        project.project(bases, matrices, case.right)
    elif case.kernel == "single_pass":
        _launch_single_pass(case, bases[0], matrices[0], n, found_inf)
    elif case.kernel == "moments":
        _launch_moments(case, batch, found_inf)
    else:
        _launch_back_project(case, bases[0], matrices[0], batch, found_inf)


def _launch_moments(case: Case, batch: torch.Tensor, found_inf: torch.Tensor | None) -> None:
    coded, _, on_device = (option in case.options for option in OPTIONS)
    state = torch.empty(batch.shape[1:], dtype=torch.uint8 if coded else torch.float32)
    scales = {"exp_avg_scales_at": ROW, "exp_avg_sq_scales_at": ROW} if coded else {}
    launch = moments.prepare(ROW, ROW, state, aligned=True, steps_at=ROW if on_device else None, **scales)
    launch(torch.empty(batch.shape), batch, beta1=0.9, beta2=0.999, eps=1e-8, step=3, found_inf=found_inf)


def _launch_back_project(
    case: Case, basis: torch.Tensor, weight: torch.Tensor, normalised: torch.Tensor, found_inf: torch.Tensor | None
) -> None:
    _, stochastic, on_device = (option in case.options for option in OPTIONS)
    launch = back_project.prepare(ROW, ROW, weight, basis, right=case.right, aligned=True, steps_at=ROW if on_device else None)
    launch(
        normalised, lr=1e-2, scale=0.25, weight_decay=0.1, found_inf=found_inf, step=3,
        device_lr=torch.empty(()) if on_device else None, rounding_seeds=torch.empty(1, dtype=torch.int64) if stochastic else None,
    )  # fmt: skip


def _launch_single_pass(case: Case, basis: torch.Tensor, matrix: torch.Tensor, n: int, found_inf: torch.Tensor | None) -> None:
    coded, stochastic, on_device = (option in case.options for option in OPTIONS)
    state = torch.empty(case.rank, n, dtype=torch.uint8 if coded else torch.float32)
    lists = {"weights": matrix, "grads": matrix, "bases": basis, "exp_avgs": state, "exp_avg_sqs": state}
    if coded:
        lists["exp_avg_scales"] = lists["exp_avg_sq_scales"] = torch.empty(scales_shape(state.shape))
    if on_device:
        lists["steps"] = torch.empty(())
    rows = Rows(**dict(zip(lists, pointer_table(*([tensor] for tensor in lists.values())), strict=True)))
    options = {"count": 1, "right": case.right, "aligned": True, "stochastic": stochastic}
    single_pass.prepare(rows, matrix, matrix, basis, state, **options)(
        lr=1e-2, beta1=0.9, beta2=0.999, eps=1e-8, weight_decay=0.1, scale=0.25, step=3, found_inf=found_inf,
        device_lr=torch.empty(()) if on_device else None, rounding_seeds=torch.empty(1, dtype=torch.int64) if stochastic else None,
    )  # fmt: skip


def compile_case(case: Case) -> Report:
    """Runs the launcher up to the launch and disassembles the compiled kernel. The process must not have
    TRITON_INTERPRET set."""
    compiled = []
    precision = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high" if case.kind == "tf32" else "highest")
    try:
        with dry.launches(case.arch, lambda kernel, grid, config: compiled.append((kernel, config))):
            _launch(case)
    finally:
        torch.set_float32_matmul_precision(precision)
    [(kernel, config)] = compiled
    usage, instructions = disassemble(kernel.asm["cubin"])
    return Report(
        kernel=case.kernel,
        arch=case.arch,
        dtype=case.dtype,
        kind=case.kind,
        side="-" if case.kernel == "moments" else "right" if case.right else "left",
        found_inf=case.found_inf,
        normalised=case.normalised,
        wide=case.wide,
        options=list(case.options),
        config=config,
        wanted_config=vars(case.config),
        registers=usage["REG"],
        shared_bytes=kernel.metadata.shared,
        stack_bytes=usage["STACK"],
        local_bytes=usage["LOCAL"],
        local_accesses=_select(instructions, r"(LDL|STL)\b"),
        fp64=_select(instructions, r"D(ADD|MUL|FMA|SETP|MNMX|MMA)\b|(F2F|I2F|F2I|MUFU)\b.*(F64|64H)"),
        tensor_cores=_select(instructions, r"(HMMA|IMMA|HGMMA|QGMMA|UTC\w*MMA|OMMA|QMMA)\b"),
        global_accesses=_select(instructions, r"(LDG|STG|LDGSTS|LD|ST|RED|ATOM|ATOMG|UTMA\w+|UBLKCP)\b"),
    )


def disassemble(cubin: bytes) -> tuple[dict[str, int], Counter]:
    """Resource usage (REG, STACK, LOCAL) and how often each SASS instruction occurs."""
    text = dry.cuobjdump(cubin, "--dump-resource-usage", "--dump-sass")
    instructions = Counter(re.findall(r"^\s+/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][\w.]+)", text, re.MULTILINE))
    if not instructions:
        raise RuntimeError(f"no SASS in the output of cuobjdump:\n{text[:2000]}")
    return dry.resource_usage(text), instructions


def access_bits(instruction: str) -> int:
    """Bits that a thread moves: LDG.E.128 → 128, LDG.E.U8 → 8, LDG.E → 32; bulk copies count as wide."""
    if instruction.startswith(("UTMA", "UBLKCP")):
        return 1024
    widths = [int(width) for width in re.findall(r"\.[US]?(8|16|64|128|256)\b", instruction)]
    return max(widths, default=32)


def _select(instructions: Counter, pattern: str) -> dict[str, int]:
    return {name: count for name, count in sorted(instructions.items()) if re.match(pattern, name)}


def _worker(cache: str) -> None:
    os.environ["TRITON_CACHE_DIR"] = cache


def compile_all(chosen: list[Case], workers: int = 2) -> list[Report]:
    """Compiles the cases afresh. The cache of compiled kernels is a folder that is removed after the call."""
    with tempfile.TemporaryDirectory() as cache:
        if workers == 1:
            _worker(cache)
            return [compile_case(case) for case in chosen]
        spawn = multiprocessing.get_context("spawn")
        with concurrent.futures.ProcessPoolExecutor(workers, mp_context=spawn, initializer=_worker, initargs=(cache,)) as pool:
            return list(pool.map(compile_case, chosen, chunksize=4))


def compile_in_subprocess(*options: str) -> list[Report]:
    """The reports of `python -m benchmarks.aot`, run in a process of its own, because this one may have
    imported the kernels for the interpreter."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "reports.json")
        command = [sys.executable, "-m", "benchmarks.aot", "--json", str(path), *options]
        done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(f"{' '.join(command)} failed:\n{done.stderr[-8000:]}")
        return read(path)


def read(path: Path) -> list[Report]:
    """The reports that --json wrote."""
    return [Report(**fields) for fields in json.loads(path.read_text())]


def write(reports: list[Report], path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps([dataclasses.asdict(report) for report in reports]))


def versions() -> str:
    ptxas = re.search(r"V[\d.]+", dry.tool("ptxas", "--version")).group()
    blackwell = re.search(r"V[\d.]+", dry.tool("ptxas-blackwell", "--version")).group()
    cuobjdump = re.search(r"V[\d.]+", dry.tool("cuobjdump", "--version")).group()
    return f"torch {torch.__version__}, triton {triton.__version__}, ptxas {ptxas} (sm_100 and later {blackwell}), cuobjdump {cuobjdump}"


def text(reports: list[Report]) -> str:
    """The text that `--out` writes."""
    return f"""{versions()}
config: the blocks in the order of configs.py, warps, stages; N: dtype in which N is stored, - where it stays on the chip
{table(reports)}
"""


def table(reports: list[Report]) -> str:
    header = (
        "kernel",
        "arch",
        "side",
        "dtype",
        "kind",
        "N",
        "shape",
        "options",
        "config",
        "regs",
        "shared",
        "spills",
        "tensor cores",
        "global",
    )
    lines = [header]
    for report in reports:
        numbers = [str(value) for name, value in report.config.items() if name != "enable_fp_fusion"]
        widths = Counter()
        for name, count in report.global_accesses.items():
            widths[access_bits(name) // 8] += count
        lines.append((
            report.kernel, f"sm_{report.arch}", report.side, report.dtype, report.kind,
            "-" if report.kernel in ("project", "single_pass") else report.normalised, "wide" if report.wide else "narrow",
            ", ".join(report.options) or "-", "/".join(numbers), str(report.registers),
            f"{report.shared_bytes / 1024:.0f}K", str(sum(report.local_accesses.values())),
            " ".join(report.tensor_cores) or "-", " ".join(f"{bytes_}B x{count}" for bytes_, count in sorted(widths.items())),
        ))  # fmt: skip
    width = [max(len(line[column]) for line in lines) for column in range(len(header))]
    return "\n".join("  ".join(cell.ljust(size) for cell, size in zip(line, width, strict=True)).rstrip() for line in lines)


def main() -> None:
    parser = argparse.ArgumentParser(description="Compile every kernel configuration ahead of time and print what it uses.")
    parser.add_argument("--json", type=Path, help="write the reports to this file as JSON")
    parser.add_argument("--out", type=Path, help="write the table to this file as well")
    parser.add_argument("--sample", action="store_true", help="a few cases instead of all")
    parser.add_argument("--workers", type=int, default=2)
    arguments = parser.parse_args()
    if dry.interpreted():
        parser.error("TRITON_INTERPRET is set: the interpreter compiles nothing")
    reports = compile_all(sample() if arguments.sample else cases(), arguments.workers)
    if arguments.json:
        write(reports, arguments.json)
    print(text(reports), end="")
    if arguments.out:
        arguments.out.parent.mkdir(parents=True, exist_ok=True)
        arguments.out.write_text(text(reports))


if __name__ == "__main__":
    main()
