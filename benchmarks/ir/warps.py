"""Accesses of two warps of a block that no barrier separates: in shared memory, which ttsem.races finds, and
in that of the tensors.

A program reads and writes its tensors in place. Where one warp reads what another one writes, as with the
scale of a block of 8-bit moments, which many threads need and one stores, a barrier must stand between. In a
layout that repeats an element, each of the warps that have it loads it, and the first of them alone stores
it, as Triton's lowering of loads and stores does.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from ttsem import harness, mlir, races
from ttsem.memory import Memory

_checked: set[tuple] = set()
SCRATCH = 16  # bytes, which anything has that goes through shared memory


@dataclass
class WarpRaces:
    accesses: int
    barriers: int
    faults: list[str]
    gaps: list[str]


class _Warps(races.RaceInterp):
    """With a log of the tensors' elements: (addresses, their warps as bits, whether written, operation) of
    each access since a barrier."""

    def __init__(self, *arguments) -> None:
        super().__init__(*arguments)
        self.step_budget = 10**8
        self.block_barriers, self.log_of_tensors, self.within_warps = 0, [], {}
        self.global_accesses, self.global_races = 0, {}

    def eval_op(self, op) -> None:
        through_shared = "allocation.offset" in op.attrs and op.name not in ("ttg.local_alloc", "tt.call")
        together = op.name in races.BARRIERS or (through_shared and not self._within_warps(op))
        if op.name in ("tt.load", "tt.store"):
            self._note(op, [self.value(name) for name in op.operands])
        if together:
            self.block_barriers += 1
            self.log_of_tensors.clear()
        if through_shared and together:
            self._log_scratch(op, "w")
        self.last = op.name  # before it, since the last one of a block leaves by an exception
        super().eval_op(op)
        if through_shared and together:
            self._log_scratch(op, "r")
        elif through_shared:
            self.epoch[self.group] -= 1  # ttsem counts a barrier for each of these

    def check_op(self, op, args, results) -> None:
        """ttsem's check of an operation's layouts, which looks at types alone: once for equal ones."""
        key = op.name, self.num_warps, tuple((ty.encoding, ty.shape) for ty in (*op.operand_types, *op.result_types))
        if key not in _checked:
            super().check_op(op, args, results)
            _checked.add(key)

    def _within_warps(self, op) -> bool:
        """A conversion of layouts that gives every warp what it had goes through shared memory, too, but
        waits for the warp alone."""
        if op.name != "ttg.convert_layout":
            return False
        types = op.operand_types[0], op.result_types[0]
        key = tuple((ty.encoding, ty.shape) for ty in types)
        if key not in self.within_warps:
            self.within_warps[key] = all(self._same_elements(*types, warp) for warp in range(self.num_warps))
        return self.within_warps[key]

    def _same_elements(self, one, other, warp: int) -> bool:
        both = (set(zip(*(axis.tolist() for axis in self.warp_coords(ty, warp)), strict=True)) for ty in (one, other))
        return next(both) == next(both)

    def _log_scratch(self, op, kind: str) -> None:
        """Every warp's access to the start of the memory through which the data goes, whose length the module
        does not tell."""
        self.instance += 1
        start = races._attr_int(op.attrs, "allocation.offset") + self.frame
        addresses = np.arange(start, start + SCRATCH, dtype=np.int64)
        for warp in range(self.group_warps[self.group]):
            self.log(races.Access(self.group, f"w{warp}", kind, addresses, self.epoch[self.group], op.text or op.name, exact=False))

    def _note(self, op, args) -> None:
        stores = op.name == "tt.store"
        mask_at = 2 if stores else 1
        pointers = np.asarray(args[0], dtype=np.int64)
        live = np.broadcast_to(np.asarray(args[mask_at], bool), pointers.shape) if len(args) > mask_at else np.ones(pointers.shape, bool)
        owners = np.zeros(pointers.shape, np.uint64)
        for warp in range(self.group_warps[self.group]):
            if stores and warp & self._repeated(op.operand_types[0]):
                continue
            coords = self.warp_coords(op.operand_types[0], warp)
            where = tuple(coords) if coords is not None else ...  # a number, which every warp has
            owners[where] |= np.uint64(1 << warp)
        addresses, owners = pointers[live], owners[live]
        if not addresses.size:
            return
        addresses, at = np.unique(addresses, return_inverse=True)
        bits = np.zeros(addresses.shape, np.uint64)
        np.bitwise_or.at(bits, at.reshape(-1), owners.reshape(-1))
        self.global_accesses += 1
        for other, of_other, stored, text in self.log_of_tensors:
            if stores or stored:
                _, mine, its = np.intersect1d(addresses, other, assume_unique=True, return_indices=True)
                both = bits[mine] | of_other[its]
                if count := int(np.count_nonzero(both & (both - np.uint64(1)))):  # more than one warp
                    pair = text, _text(op)
                    self.global_races[pair] = max(count, self.global_races.get(pair, 0))
        self.log_of_tensors.append((addresses, bits, stores, _text(op)))

    def _repeated(self, ty) -> int:
        """The bits of a warp's number that choose nothing in this layout: it has the elements of the warp
        without them."""
        layout = self.layout_of(ty)
        if layout is None:
            return -1  # a number: warp 0 stores it
        return sum(1 << bit for bit, basis in enumerate(layout.bases.get("warp", [])) if not any(basis))


def find(record: harness.LaunchRecord, barriers: str) -> WarpRaces:
    """Executes the module with barriers on the record's tensors, for the first and the last program of the
    grid."""
    module, name, names = mlir.parse(barriers), record.fn_name, harness._runtime_param_names(record)
    warps, threads = (races._attr_int(module.attrs, f"ttg.{attribute}") for attribute in ("num-warps", "threads-per-warp"))
    block = module.funcs[name].regions[0].blocks[0]
    values = harness._arg_values(record, names, block, False)
    values += [np.zeros((), np.int64)] * (len(block.args) - len(values))  # scratch that nothing uses
    found = WarpRaces(0, 0, [], [])
    for program in (0, record.grid[0] - 1):
        memory = Memory()
        for argument in {record.bases[name]: name for name in names if name in record.ptrs}.values():
            memory.register(record.bases[argument], np.array(record.pre[argument], copy=True))
        interpreter = _Warps(module, memory, harness._grid3(record.grid), warps, threads)
        interpreter.run(name, values, (program, 0, 0))
        if interpreter.last != "tt.return":
            raise RuntimeError(f"a program ended with {interpreter.last}")
        found.accesses += len(interpreter.accesses) + interpreter.global_accesses
        found.barriers += interpreter.block_barriers
        written = [race for race in interpreter.races if "w" in (race.first.kind, race.second.kind)]
        shared = {(_short(race.first.op), _short(race.second.op)) for race in written}
        found.faults += [f"shared memory, program {program}: {a} and {b}" for a, b in sorted(shared)]
        found.faults += [f"tensor, program {program}: {a} and {b}: {count} elements" for (a, b), count in interpreter.global_races.items()]
        found.gaps += [f"{operation}: {why}" for operation, why in {**interpreter.gaps, **interpreter.layout_gaps}.items()]
    found.gaps = sorted(set(found.gaps))
    return found


def _text(op) -> str:
    return _short(op.text or op.name)


def _short(text: str) -> str:
    """An operation by name and line of the source."""
    lines = [part.split('"')[0] + part.split('"')[1].split(")")[0] for part in text.split(".py")[1:2] if '"' in part]
    file = text.split(".py")[0].split("/")[-1] if lines else ""
    name = next((part for part in text.split('"') if "." in part and " " not in part), text[:40])
    return f"{name} {file}.py{lines[0]}" if lines else name
