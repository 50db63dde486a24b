"""All of csrc/cpu built for Arm, as one program, and run in an emulator: what a decode step has besides its linears.

The ends of a step as in tests/sim/test_cpu_step_sim.py, whose tests these are; attention, the writer of the caches, the
quantizer of rows, LayerNorm and GELU, in their loops for Arm, bit by bit against the plain loops of this machine. Beam
candidates are left out: equal scores come in the order of the C++ library's sorts, which is torch's here and not that
of the compiler for Arm (csrc/cpu/top_k.h; where they differ, `orders_as_torch` leaves the core's out). Needs what
test_cpu_gemm_arm.py needs. With -Werror: every source compiles for Arm without a warning.
"""

import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "tests" / "sim"))

import harness  # noqa: E402
import test_cpu_neon_sim as neon  # noqa: E402
import test_cpu_vnni_sim as cases  # noqa: E402
from test_cpu_gemm_arm import arm_program, emulated  # noqa: E402
from test_cpu_step_sim import test_logits, test_positions, test_repeats, test_where_tokens_stand  # noqa: E402, F401

SOURCES = sorted(path.stem for path in (ROOT / "csrc" / "cpu").glob("*.cpp"))
NEEDED = {*neon.SHARED, *neon.NEON, "isa"}


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
    sources += [ROOT / "csrc" / "cpu" / f"{name}.cpp" for name in sorted({*neon.SHARED, *neon.X86, "isa"})]
    here = harness.Program(harness.build(sources), {"DQKERNELS_CPU": "scalar"})
    yield {"scalar": here, "dotprod": there}
    here.close()
    there.close()


def test_which_loops_run(attention):
    neon.test_which_loops_run(attention)


@pytest.mark.parametrize(("make", "least"), [("prefill_cases", 34), ("decode_cases", 27), ("write_cases", 18)])
def test_attention_has_the_bits_of_this_machine(attention, make, least):
    assert cases.as_scalar(attention, "dotprod", getattr(cases, make)()) == least


def test_the_quantizer_of_rows(attention):
    cases.test_the_quantizer_of_rows(attention, "dotprod")


def test_what_the_loops_for_arm_add(attention):
    neon.test_the_largest_sums_over_values(attention)
    neon.test_layer_norm(attention)
    neon.test_gelu(attention)


def test_an_arm_without_the_dot_product(attention):
    """Finds none, takes the plain loops, and meets no instruction that it lacks."""
    old = emulated(attention["dotprod"].binary.parent, "cortex-a53")
    assert neon.loops_of(old) == [0, 0, 0]
    assert cases.as_scalar({"scalar": old, "dotprod": attention["dotprod"]}, "dotprod", cases.decode_cases()) == 27
    old.close()
