"""pytest plugin of `make gpu-dry`: the host side of the GPU path, tested on a machine without a GPU.

    python -m pytest -p tests.dry_lane --dry-arch 90

Without other arguments it runs the tests marked `gpu` of LANE. The operators run what they run on a GPU, on
CPU tensors, up to the launch of a kernel; benchmarks/dry.py compiles that for the architecture and holds it
to its limits. Nothing is computed, so comparisons of results are left out: the helpers named below say yes to
everything, and a test that launched kernels and then fails on an `assert` of its own ends there and counts as
passed. All else fails as ever: exceptions, failures before the first launch, assertions outside of tests/,
and launches that a GPU would refuse.
"""

from __future__ import annotations

import os
import sys
from collections import Counter
from pathlib import Path

import pytest
from hypothesis.errors import Flaky

os.environ["TRITON_INTERPRET"] = "0"  # before the kernels are imported

TESTS = Path(__file__).parent
ARCHITECTURES = (80, 90, 100)
LANE = ("kernels", "test_fuzz.py", "test_step_parts.py", "optim")
"""Where tests launch the kernels of a step."""
COMPARISONS = {
    "assert_within": lambda *arguments, **keywords: None,
    "assert_codes": lambda *arguments, **keywords: None,
    "judge": lambda *arguments, **keywords: None,
    "same_bits": lambda a, b: True,
    "same": lambda a, b: True,
}
"""Helpers of the tests that compare what kernels computed. They are replaced so that a test goes on to its
next launch."""
KEY = "dry lane"


class DryLane:
    def __init__(self, arch: int) -> None:
        self.arch = arch
        self.launched: Counter[str] = Counter()
        self.totals: Counter[str] = Counter()

    def on_launch(self, kernel: object, grid: tuple[int, ...], keywords: dict) -> None:
        from benchmarks import dry

        self.launched[kernel.metadata.name] += 1
        dry.check(kernel, grid, self.arch)

    @pytest.hookimpl(trylast=True)
    def pytest_collection_modifyitems(self) -> None:
        """The test modules are imported now, and have the helpers under names of their own."""
        for module in list(sys.modules.values()):
            if TESTS in Path(getattr(module, "__file__", None) or "/").parents:
                for name in COMPARISONS.keys() & vars(module).keys():
                    setattr(module, name, COMPARISONS[name])

    @pytest.hookimpl(wrapper=True)
    def pytest_sessionstart(self):
        """Some tests ask for the architecture when they are collected, so it is named from here on."""
        from benchmarks import dry

        self.stubbed = dry.launches(self.arch, self.on_launch)
        self.stubbed.__enter__()
        return (yield)

    def pytest_sessionfinish(self) -> None:
        self.stubbed.__exit__(None, None, None)

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_call(self, item: pytest.Item):
        self.launched.clear()
        ending = "to its end"
        try:
            return (yield)
        except (AssertionError, Flaky) as error:
            # What a kernel would have computed is uninitialised memory. With it an example of hypothesis may
            # fail and then pass, which hypothesis reports as a Flaky with the failures in it.
            failures = getattr(error, "exceptions", [error])
            if not self.launched or not all(isinstance(each, AssertionError) and _of_a_test(each) for each in failures):
                raise
            ending = "to a comparison"
        finally:
            item.user_properties.append((KEY, [ending if self.launched else "without a launch", sum(self.launched.values())]))

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        for _, (ending, launches) in (pair for pair in report.user_properties if pair[0] == KEY and report.when == "call"):
            self.totals[ending] += report.passed
            self.totals["launches"] += launches

    def pytest_terminal_summary(self, terminalreporter: pytest.TerminalReporter) -> None:
        endings = ", ".join(f"{self.totals[ending]} {ending}" for ending in ("to its end", "to a comparison", "without a launch"))
        terminalreporter.write_line(f"sm_{self.arch}: {self.totals['launches']} launches compiled, not run; passed: {endings}")


def _of_a_test(error: AssertionError) -> bool:
    """Whether the `assert` stands in a test, not in this package or in Triton."""
    traceback = error.__traceback__
    while traceback.tb_next is not None:
        traceback = traceback.tb_next
    return TESTS in Path(traceback.tb_frame.f_code.co_filename).parents


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--dry-arch", type=int, default=90, choices=ARCHITECTURES, help="the GPU's architecture: 90 for sm_90")


def pytest_configure(config: pytest.Config) -> None:
    from benchmarks import dry

    if config.args_source is not pytest.Config.ArgsSource.ARGS:
        config.args = [str(TESTS / name) for name in LANE]
    config.option.markexpr = config.option.markexpr or "gpu"
    dry.backend_of_a_gpu()
    config.pluginmanager.register(DryLane(config.getoption("dry_arch")))
