"""The modules that the compiler's passes receive, up to the lowering to LLVM, and the barriers that this
lowering puts in.

Triton prints the module before each pass where MLIR_ENABLE_DUMP asks for it. Nothing from LLVM on is run: it
would take most of the time.
"""

from __future__ import annotations

import os
import re
import tempfile
from dataclasses import dataclass
from pathlib import Path

from triton._C.libtriton import ir, nvidia, passes
from triton.backends.compiler import GPUTarget
from triton.compiler import make_backend
from ttsem import harness, validate

LAST = "Before ConvertTritonGPUToLLVM"
UNLOWERED = "ttg.predicate_stage"
"""An operation of the pipeliner's, which no pass lowers to LLVM."""

_dump = Path(tempfile.gettempdir()) / f"lowrank_kernels_ir_{os.getpid()}.mlir"


@dataclass
class Modules:
    """(pass, module that it receives), in order, in the generic form. barriers: the last of them after the
    lowering to LLVM put its barriers in, with the function's own head lowered.
    """

    stages: list[tuple[str, str]]
    barriers: str


class _LoweringReached(Exception):
    """Raised in place of the pass that lowers to LLVM: its pass manager, with the passes before it, and its
    arguments."""


def set_up() -> None:
    """For the rest of this process, before anything is compiled. A file of its own takes the dumps, which
    stderr would take unbuffered."""
    os.environ["MLIR_DUMP_PATH"] = str(_dump)


def clean_up() -> None:
    _dump.unlink(missing_ok=True)


def compact(module: str) -> str:
    """The same module in a fraction of the text, all of which ttsem must read: without locations, layouts
    spelled out once, as aliases."""
    kept, end = [], 0
    while (start := module.find(" loc(", end)) >= 0:
        kept.append(module[end:start])
        end = _end_of_group(module, start, "()")
    module, kept, end, aliases = "".join(kept) + module[end:], [], 0, {}
    for match in _LAYOUT.finditer(module):
        if match.start() < end:
            continue  # inside of the one before
        stop = _end_of_group(module, match.start(), "<>")
        alias = aliases.setdefault(module[match.start() + 2 : stop], f"#layout{len(aliases)}")
        kept += [module[end : match.start()], ", ", alias]
        end = stop
    return "".join(f"{alias} = {layout}\n" for layout, alias in aliases.items()) + "".join(kept) + module[end:]


_LAYOUT = re.compile(r", #tt\w+\.\w+<")


def _end_of_group(text: str, start: int, brackets: str) -> int:
    """Where the first group of brackets from start on ends."""
    depth = 0
    for match in re.compile(rf'[{brackets}]|"[^"]*"|->').finditer(text, start):
        depth += {brackets[0]: 1, brackets[1]: -1}.get(match.group(), 0)
        if not depth and match.group() == brackets[1]:
            return match.end()
    raise ValueError(f"no end of {text[start : start + 80]}")


def first_module(record: harness.LaunchRecord, target: GPUTarget) -> str:
    """TTIR as the front end and its first passes leave it."""
    return compact(harness._stage_text(record, "ttir", target))


def modules_of(record: harness.LaunchRecord, target: GPUTarget, *, every_pass: bool = True) -> Modules:
    """Those of every pass, or the last one alone, which takes less time."""
    if not every_pass:
        module, _, arguments = _before_llvm(record, target)
        return Modules([(LAST, str(module))], _with_barriers(str(module), arguments))
    begin = _dump.stat().st_size if _dump.exists() else 0
    os.environ["MLIR_ENABLE_DUMP"] = "1"
    try:
        module, context, arguments = _before_llvm(record, target)
        # The dump is written in blocks: one more module pushes the last one out.
        _run(context, module, passes.common.add_symbol_dce)
    finally:
        del os.environ["MLIR_ENABLE_DUMP"]
    with _dump.open("rb") as file:
        file.seek(begin)
        text = file.read().decode()
    os.truncate(_dump, 0)  # Triton goes on where it was, so what was read is a hole
    last = str(module)
    stages = [*validate.split_dump(text)[:-1], (LAST, last)]
    return Modules(stages, _with_barriers(last, arguments))


def _before_llvm(record: harness.LaunchRecord, target: GPUTarget):
    """The module that the lowering to LLVM receives, its context, and the lowering's other arguments."""
    options, signature, constexprs, attrs = harness._specialize(record.fn, record.args, record.kwargs, target)
    source = harness._source_class(record.fn)(fn=record.fn, signature=signature, constexprs=constexprs, attrs=attrs)
    backend = make_backend(target)
    options = backend.parse_options(dict(options.__dict__, **source.parse_options()))
    stages = {}
    backend.add_stages(stages, options, source.language)
    context = _context()
    generators = backend.get_codegen_implementation(options), backend.get_module_map()
    module = source.make_ir(target, options, *generators, context)
    metadata = {"target": target, **options.__dict__}
    for name in ("ttir", "ttgir"):
        module = stages[name](module, metadata)
    lower = nvidia.passes.ttgpuir.add_to_llvmir
    nvidia.passes.ttgpuir.add_to_llvmir = _raise_reached
    try:
        stages["llir"](module, metadata)
    except _LoweringReached as reached:
        manager, *arguments = reached.args
        manager.run(module, "before_llvm")
        return module, context, arguments
    finally:
        nvidia.passes.ttgpuir.add_to_llvmir = lower
    raise RuntimeError("the compiler did not lower to LLVM")


def _raise_reached(*arguments) -> None:
    raise _LoweringReached(*arguments)


def _with_barriers(text: str, arguments: list) -> str:
    """The module with the barriers of Triton's analysis of shared memory, which runs inside of the lowering
    to LLVM, before it lowers.

    An operation that it cannot lower makes it fail there and take back all that it has lowered of the body.
    """
    lines = text.split("\n")
    end = max(number for number, line in enumerate(lines) if '"tt.return"' in line)
    lines[end:end] = [
        '%unlowered_0 = "arith.constant"() <{value = 0 : i32}> : () -> i32',
        f'%unlowered_1 = "{UNLOWERED}"(%unlowered_0, %unlowered_0, %unlowered_0) <{{maxStage = 1 : i32, stage = 0 : i32}}>'
        " : (i32, i32, i32) -> i1",
    ]
    context = _context()
    with tempfile.NamedTemporaryFile("w", suffix=".mlir") as file:
        file.write("\n".join(lines))
        file.flush()
        module = ir.parse_mlir_module(file.name, context)
    errors = os.dup(2)
    with open(os.devnull, "w") as nowhere:  # MLIR tells what it could not lower
        os.dup2(nowhere.fileno(), 2)
        try:
            _run(context, module, nvidia.passes.ttgpuir.add_to_llvmir, *arguments)
        except RuntimeError:
            return _restored(str(module), text)
        finally:
            os.dup2(errors, 2)
            os.close(errors)
    raise RuntimeError(f"{UNLOWERED} was lowered to LLVM, where the lowering was to fail")


def _restored(failed: str, before: str) -> str:
    """The module that the failed lowering left, without the operation that made it fail.

    It takes back the branches that it put in, and leaves the blocks cut in two: the second one, which nothing
    reaches, follows the first.
    """
    lines = [line for line in failed.split("\n") if UNLOWERED not in line and not _CUT.fullmatch(line)]
    barriers = "\n".join(lines)
    if _operations(barriers) != _operations(before):
        raise RuntimeError("the lowering to LLVM did not take back all that it had lowered")
    return barriers


_CUT = re.compile(r"\s*\^bb\d+:\s*// no predecessors")


def _operations(module: str) -> list[str]:
    """Names of operations in order, but for barriers, constants, which move, and the function's head."""
    names = re.findall(r'^\s*(?:%[^"]*= )?"([\w.]+)"\(', module, re.MULTILINE)
    apart = (
        "ttg.barrier",
        "gpu.barrier",
        "arith.constant",
        "builtin.unrealized_conversion_cast",
        "tt.func",
        "llvm.func",
        "llvm.mlir.global",
    )
    return [name for name in names if name not in apart]


def _context():
    context = ir.context()
    ir.load_dialects(context)
    nvidia.load_dialects(context)
    return context


def _run(context, module, add, *arguments) -> None:
    manager = ir.pass_manager(context)
    manager.enable_debug()
    add(manager, *arguments)
    manager.run(module, "ir_lane")
