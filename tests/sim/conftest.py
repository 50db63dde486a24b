"""Programs on the host simulator, and the line that counts what ran on it."""

from __future__ import annotations

from pathlib import Path

import harness
import pytest

HERE = Path(__file__).resolve().parent


@pytest.fixture(scope="session")
def sim_program():
    """`sim_program(source, ...)`: the running Program of those sources (names in this folder, or paths from csrc's
    parent such as "csrc/cuda/quantize.cu"), compiled with `flags` too, with variables of its environment by name; skips
    where nothing can be simulated."""
    programs: dict[tuple, harness.Program] = {}

    def program(*sources: str, flags: tuple[str, ...] = (), **environment: str) -> harness.Program:
        reason = harness.missing()
        if reason is not None:
            pytest.skip(reason)
        key = (*sources, flags, *sorted(environment.items()))
        if key not in programs:
            paths = [harness.ROOT / name if name.startswith("csrc/") else HERE / name for name in sources]
            try:
                programs[key] = harness.Program(harness.build(paths, flags), environment)
            except harness.BuildError as error:
                pytest.fail(f"the program on the simulator does not compile:\n{error}", pytrace=False)
        return programs[key]

    yield program
    for running in programs.values():
        running.close()


def _only_here(session) -> bool:
    items = getattr(session, "items", [])
    return bool(items) and all(HERE in item.path.parents for item in items)


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_sessionfinish(session):
    """The very last line if these tests are the whole run; else above the word on the GPU, which must stay last."""
    terminal = session.config.pluginmanager.get_plugin("terminalreporter")
    alone = _only_here(session)
    if terminal is not None and harness.PASSED and not alone:
        terminal.section("simulator")
        terminal.write_line(harness.summary())
    result = yield
    if terminal is not None and alone:
        terminal.write_line(harness.summary())
    return result
