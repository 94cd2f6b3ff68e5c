"""What the compiler made of a launch, read off its machine code and its TTGIR."""

from __future__ import annotations

import re
from dataclasses import dataclass

from .. import dry, sass
from . import launch
from .cases import Case

MULTIPROCESSOR = {80: (164 << 10, 2048), 90: (228 << 10, 2048), 100: (228 << 10, 2048), 120: (100 << 10, 1536)}
"""Bytes of shared memory and threads of a multiprocessor, by architecture. Of the memory each program takes
RESERVED more than it asks for."""
RESERVED = 1 << 10
_BARRIER = re.compile(r"^\s*(gpu|ttg)\.barrier\b", re.MULTILINE)
_LOAD = re.compile(r"(?:tt\.load|ttg\.async_copy_global_to_local)\b.*tensor<\d+x\d+x!tt\.ptr")
_EVICTION = re.compile(r"(tt\.load|tt\.store|ttg\.async_copy_global_to_local)\b.*(?:evict_(first|last)|evictionPolicy = ([23]) : i32)")


@dataclass(frozen=True)
class Loop:
    """A loop that holds no other one, by what its body has. waits: asynchronous copies that may be under way
    after the strictest wait for them; None where it waits for none. Loads and stores are those of global
    memory that move 16 bytes a thread, copies the asynchronous ones."""

    instructions: int
    spills: int
    waits: int | None
    copies: int
    loads: int
    stores: int
    barriers: int
    products: int


@dataclass
class Report:
    """Dictionaries map an instruction to how often it occurs.

    hot_spills: accesses to local memory in loops; cold_spills: all others. programs: how many fit a
    multiprocessor. loops: those with a product. loads_after_loops: 16-byte loads behind the last of them.
    reciprocals: approximate ones, of which each division takes one. scale_stores: stores of scales of 8-bit
    moments; unguarded: those without a barrier since the last load of one. evictions: operations on tiles
    with a cache hint; loads_without: loads without one.
    """

    kernel: str
    arch: int | str
    target: str
    side: str
    dtype: str
    kind: str
    row: str
    shape: str
    options: list[str]
    normalised: str
    wanted_config: dict
    config: dict
    registers: int
    shared_bytes: int
    programs: int
    instructions: int
    hot_spills: int
    cold_spills: int
    loops: list[Loop]
    loads_after_loops: int
    reciprocals: int
    fp64: dict
    tensor_cores: dict
    global_accesses: dict
    scale_stores: int
    unguarded_scale_stores: int
    evictions: dict
    loads_without: int

    @property
    def name(self) -> str:
        """As that of the case."""
        options = "+".join(self.options) or "-"
        return f"{self.kernel} {self.target} {self.side} {self.dtype} {self.kind} {self.row} {self.shape} {options} {self.normalised}"

    @property
    def w_loop(self) -> Loop | None:
        """The loop of the single pass that updates W: the only one that stores."""
        return next((loop for loop in self.loops if loop.stores), None)

    def narrow(self) -> dict[str, int]:
        """Global accesses narrower than 16 bytes."""
        return {name: count for name, count in self.global_accesses.items() if sass.access_bits(name) < 128}


def of(case: Case) -> Report:
    """Compiles the launch of a case."""
    kernel, options = launch.compiled(case)
    scale_stores, unguarded = _scales(kernel.asm["ttgir"], case)
    common = dict(
        kernel=case.kernel, arch=case.arch, target=case.target, side=case.side, dtype=case.dtype, kind=case.kind, row=case.numbers,
        shape=case.shape, options=list(case.options), normalised=case.normalised,
        wanted_config=case.config.launch_options(), config=options, shared_bytes=kernel.metadata.shared,
        scale_stores=scale_stores, unguarded_scale_stores=unguarded, evictions=_evictions(kernel.asm["ttgir"]),
        loads_without=sum(bool(_LOAD.search(line) and not _EVICTION.search(line)) for line in kernel.asm["ttgir"].splitlines()),
    )  # fmt: skip
    return Report(**common, **(_of_nvidia(kernel, case.arch) if isinstance(case.arch, int) else _of_amd(kernel.asm["amdgcn"])))


def _of_nvidia(kernel: object, arch: int) -> dict:
    code = sass.disassemble(kernel.asm["cubin"])
    bodies = code.loops()
    hot = sum(_count(body, sass.LOCAL) for body in bodies)
    with_products = [body for body in bodies if _count(body, sass.MATRIX_UNITS + r"|(FFMA2?)\b")]
    end = max((body[-1].address for body in with_products), default=code.instructions[-1].address)
    behind = [each for each in code.instructions if each.address > end]
    return dict(
        registers=code.usage["REG"],
        programs=_programs(code.usage["REG"], kernel.metadata, arch),
        instructions=len(code.instructions),
        hot_spills=hot,
        cold_spills=_count(code.instructions, sass.LOCAL) - hot,
        loops=[_loop(body) for body in with_products],
        loads_after_loops=_wide(behind, r"LDG\b"),
        reciprocals=_count(code.instructions, r"MUFU\.RCP\b"),
        fp64=sass.select(code.instructions, sass.FP64),
        tensor_cores=sass.select(code.instructions, sass.MATRIX_UNITS),
        global_accesses=sass.select(code.instructions, sass.GLOBAL),
    )


def _loop(body: list[sass.Instruction]) -> Loop:
    return Loop(
        instructions=len(body),
        spills=_count(body, sass.LOCAL),
        waits=sass.waits(body),
        copies=_wide(body, sass.ASYNC_COPIES),
        loads=_wide(body, r"LDG\b"),
        stores=_wide(body, r"STG\b"),
        barriers=_count(body, r"BAR\b"),
        products=_count(body, sass.MATRIX_UNITS),
    )


def _count(instructions: list[sass.Instruction], pattern: str) -> int:
    return sum(sass.select(instructions, pattern).values())


def _wide(instructions: list[sass.Instruction], pattern: str) -> int:
    return sum(count for name, count in sass.select(instructions, pattern).items() if sass.access_bits(name) >= 128)


def _programs(registers: int, metadata: object, arch: int) -> int:
    """How many programs a multiprocessor has room for."""
    shared, most_threads = MULTIPROCESSOR[arch]
    threads = 32 * metadata.num_warps
    granules = -(-registers // dry.REGISTER_GRANULE) * dry.REGISTER_GRANULE
    return min(dry.REGISTERS // (granules * threads), shared // (metadata.shared + RESERVED), most_threads // threads)


def _of_amd(assembly: str) -> dict:
    """The compiler states registers and spills; loops and access widths are not looked at."""
    stated = {
        name: int(value) for name, value in re.findall(r"\.(vgpr_count|agpr_count|vgpr_spill_count|sgpr_spill_count):\s+(\d+)", assembly)
    }
    instructions = re.findall(r"^\s+([a-z]\w+)(?:\s|$)", assembly, re.MULTILINE)
    matrix = [name for name in instructions if name.startswith("v_mfma")]
    return dict(
        registers=stated["vgpr_count"],
        programs=0,
        instructions=sum(name.startswith(("v_", "s_", "global_", "ds_", "buffer_")) for name in instructions),
        hot_spills=0,
        cold_spills=stated["vgpr_spill_count"] + stated["sgpr_spill_count"],
        loops=[],
        loads_after_loops=0,
        reciprocals=sum(name.startswith("v_rcp_f32") for name in instructions),
        fp64={},
        tensor_cores={name: matrix.count(name) for name in sorted(set(matrix))},
        global_accesses={},
    )


def _scales(ttgir: str, case: Case) -> tuple[int, int]:
    """Stores of tiles of scales, and how many of them have no barrier between them and the last load of
    one."""
    if not case.has("8-bit"):
        return 0, 0
    config = case.config
    moments = case.kernel == "moments"
    rows, columns = (config.ROWS, config.COLUMNS) if moments else (config.BLOCK_R // config.SLICES, config.BLOCK_N)
    of_scales = re.compile(rf"\btt\.(load|store)\b.*: tensor<{rows}x{columns // 64}x!tt\.ptr<f32>")
    stores = unguarded = 0
    loaded = False
    for line in ttgir.splitlines():
        if _BARRIER.match(line):
            loaded = False
        elif found := of_scales.search(line):
            if found.group(1) == "load":
                loaded = True
            else:
                stores += 1
                unguarded += loaded
    return stores, unguarded


def _evictions(ttgir: str) -> dict[str, int]:
    """{"load first": …, "store first": …, "load last": …}: how many operations have which hint."""
    found: dict[str, int] = {}
    for operation, word, number in _EVICTION.findall(ttgir):
        key = f"{'store' if operation == 'tt.store' else 'load'} {word or {'2': 'first', '3': 'last'}[number]}"
        found[key] = found.get(key, 0) + 1
    return dict(sorted(found.items()))
