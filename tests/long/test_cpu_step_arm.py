"""All of csrc/cpu built for Arm, as one program, and run in an emulator: what a decode step has besides its linears.

The ends of a step as in tests/sim/test_cpu_step_sim.py, whose tests these are; attention, the writer of the caches and
the quantizer of rows, which are plain loops there, bit by bit against the plain loops of this machine. Beam candidates
are left out: equal scores come in the order of the C++ library's sorts, which is torch's here and not that of the
compiler for Arm (csrc/cpu/top_k.h; where they differ, `orders_as_torch` leaves the core's out). Needs what
test_cpu_gemm_arm.py needs. With -Werror: every source compiles for Arm without a warning.
"""

import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "tests" / "sim"))

import harness  # noqa: E402
import test_cpu_vnni_sim as cases  # noqa: E402
from test_cpu_gemm_arm import arm_program  # noqa: E402
from test_cpu_step_sim import test_logits, test_positions, test_repeats, test_where_tokens_stand  # noqa: E402, F401

SOURCES = sorted(path.stem for path in (ROOT / "csrc" / "cpu").glob("*.cpp"))
NEEDED = {"attention", "attention_decode", "attention_scalar", "cache_write", "quantize", "threads", "isa"}


@pytest.fixture(scope="module")
def program(tmp_path_factory):
    """step_host.cpp with every source there is."""
    assert set(SOURCES) > NEEDED and len(SOURCES) >= 25
    running = arm_program(tmp_path_factory.mktemp("arm"), "step_host.cpp", SOURCES)
    yield running
    running.close()


@pytest.fixture(scope="module")
def attention(tmp_path_factory):
    """{"scalar": the plain loops here, "dotprod": those of Arm}."""
    there = arm_program(tmp_path_factory.mktemp("arm"), "cpu_attention_host.cpp", sorted(NEEDED))
    sources = [harness.HERE / "cpu_attention_host.cpp"]
    sources += [ROOT / "csrc" / "cpu" / f"{name}.cpp" for name in sorted({*NEEDED, "attention_x86", "quantize_x86"})]
    here = harness.Program(harness.build(sources), {"DQKERNELS_CPU": "scalar"})
    yield {"scalar": here, "dotprod": there}
    here.close()
    there.close()


@pytest.mark.parametrize(("make", "least"), [("prefill_cases", 34), ("decode_cases", 27), ("write_cases", 18)])
def test_attention_has_the_bits_of_this_machine(attention, make, least):
    assert cases.as_scalar(attention, "dotprod", getattr(cases, make)()) == least


def test_the_quantizer_of_rows(attention):
    cases.test_the_quantizer_of_rows(attention, "dotprod")
