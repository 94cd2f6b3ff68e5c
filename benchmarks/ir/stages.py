"""One case through the three stages."""

from __future__ import annotations

import dataclasses
import time

import torch
import triton
from ttsem import harness, sanitize
from ttsem.values import Unsupported

from . import compiler, launches, warps
from .cases import Case

STAGES = ("sanitize", "validate", "races")


@dataclasses.dataclass
class Outcome:
    """What became of a case: a word or two for each stage, what was wrong, and what ttsem could not do."""

    name: str
    stages: dict[str, str] = dataclasses.field(default_factory=dict)
    faults: list[str] = dataclasses.field(default_factory=list)
    unsupported: list[str] = dataclasses.field(default_factory=list)
    seconds: float = 0.0


def run(case: Case, stages: tuple[str, ...] = STAGES) -> Outcome:
    """Needs launches.replace_table and compiler.set_up in this process. sanitize always runs: the others
    start from its results."""
    outcome, start = Outcome(case.name), time.perf_counter()
    torch.manual_seed(0)
    launch, target = launches.launch_of(case), harness.target_for("cpu", case.arch)
    record = _sanitize(launch, target, outcome)
    if record is not None and len(stages) > 1:
        validated = "validate" in stages and case.validated
        modules = compiler.modules_of(record, target, every_pass=validated)
        if validated:
            _validate(record, modules, outcome)
        if "races" in stages:
            _races(record, modules, outcome)
    outcome.seconds = time.perf_counter() - start
    return outcome


def _sanitize(launch: launches.Launch, target, outcome: Outcome) -> harness.LaunchRecord | None:
    """The launch with its tensors before and after, None where it could not be executed."""
    read = harness.ir_for_launch
    harness.ir_for_launch = lambda record, stage, target, *_: compiler.first_module(record, target)  # without a compilation to the end
    try:
        with sanitize.session(target.arch, cuda_is_cpu=False) as session:
            arguments = launch.kernel, launch.arguments, launch.options, launch.grid
            record = harness.record_launch(*arguments, triton.JITFunction.run, launch.kernel.__name__).record
        launch.judge()
    except sanitize.KernelFault as fault:
        outcome.faults.append(f"sanitize: {fault}")
    except sanitize.Unjudged as unjudged:
        wrong = outcome.unsupported if unjudged.verdict == "unsupported" else outcome.faults
        wrong.append(f"sanitize: {unjudged}")
    except AssertionError as error:
        outcome.faults.append(f"sanitize: {error}")
    else:
        if session.races_unchecked:
            outcome.unsupported.append("sanitize: more accesses than the search for races between programs keeps")
        outcome.stages["sanitize"] = "clean"
        return record
    finally:
        harness.ir_for_launch = read
    outcome.stages["sanitize"] = "FAULT" if outcome.faults else "unsupported"
    return None


def _validate(record: harness.LaunchRecord, modules: compiler.Modules, outcome: Outcome) -> None:
    """ttsem.validate's comparison. Passes that change nothing hand the same text on, which is executed
    once."""
    handed_on = {text: name for name, text in reversed(modules.stages)}
    distinct = {compiler.compact(text): name for text, name in handed_on.items()}
    agreed = {"match": 0, "approx": 0}
    for text, name in reversed(distinct.items()):
        found = harness.run_launch(record, text)
        if found.verdict in agreed:
            agreed[found.verdict] += 1
        elif found.verdict == "unsupported":
            outcome.unsupported.append(f"validate: {', '.join(found.unsupported) or found.message}")
        else:
            where = f"the module that '{name.removeprefix('Before ')}' receives"
            outcome.faults.append(f"validate: {found.verdict} in {where}: {found.n_diff} elements differ {found.message}")
    rounding = f" ~{agreed['approx']}" if agreed["approx"] else ""
    outcome.stages["validate"] = f"{sum(agreed.values())}/{len(distinct)} of {len(modules.stages)}{rounding}"


def _races(record: harness.LaunchRecord, modules: compiler.Modules, outcome: Outcome) -> None:
    try:
        found = warps.find(record, compiler.compact(modules.barriers))
        if found.faults:
            found = warps.find(record, modules.barriers)  # with lines of the source
    except Unsupported as unsupported:
        outcome.unsupported.append(f"races: {unsupported}")
        return
    outcome.faults += [f"races: {fault}" for fault in found.faults]
    outcome.unsupported += [f"races: {gap}" for gap in found.gaps]
    outcome.stages["races"] = f"{len(found.faults)} in {found.accesses}, {found.barriers} barriers"
