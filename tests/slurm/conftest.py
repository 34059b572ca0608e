"""Where SLURM cannot be installed, its tests say so in capital letters."""

import pytest


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    skipped = [report for report in terminalreporter.stats.get("skipped", []) if "slurm" in report.keywords]
    if skipped:
        reason = skipped[0].longrepr[2] if isinstance(skipped[0].longrepr, tuple) else skipped[0].longrepr
        terminalreporter.section("SLURM TESTS WERE NOT RUN", sep="!", red=True, bold=True)
        terminalreporter.write_line(f"{len(skipped)} tests on a real SLURM were not run: {reason}")
