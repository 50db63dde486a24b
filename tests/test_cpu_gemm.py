"""The CPU GEMM and embedding through torch: exact on every kernel of this CPU, threads, processes, refusals, names.

Under sanitizers, with the models of the instruction sets that are not here: tests/sim/test_cpu_gemm_sim.py.
"""

import functools
import itertools
import json
import multiprocessing
import os
import random
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import oracle
import pytest
import torch
from compare import assert_bounded, assert_equal, assert_same_bits
from native_gemm_checks import CHECKS
from torch.utils._python_dispatch import TorchDispatchMode

import dqkernels
from dqkernels import DQConfig, backends, fused, nn, ops, reference
from dqkernels.kernels import cpu_gemm, native
from dqkernels.kernels.cpu_step import Tape

pytestmark = pytest.mark.skipif(native.native() is None, reason=native.why_absent() or "present")

#: (bits, four_level, group_size)
FORMS = [
    (8, False, -1), (4, False, -1), (2, False, -1), (2, True, -1), (4, False, 32), (4, False, 64), (4, False, 128),
    (2, False, 32), (2, True, 32), (2, True, 128),
]  # fmt: skip
ROWS = (0, 1, 2, 3, 7, 8, 15, 16, 17, 33, 64, 65, 129)
SIZES = ((1, 1), (5, 7), (17, 33), (33, 129), (70, 300))
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
HERE = Path(__file__).resolve().parent


def kernels():
    """Those of this build that this CPU runs."""
    core = native.native()
    # AMX, which nobody takes unasked, was never run on its hardware: tests/long/test_cpu_gemm_amx.py does.
    return [name for name in core.cpu_gemm_kernels() if name in core.cpu_isas() and name != "amx_int8"] if core else []


def operands(form, m, n, k, seed=0, per_tensor=False):
    """codes int64 [N, K], and q, act_scale, qweight, weight_scale, group_mult as tensors."""
    bits, four_level, group = form
    rng = np.random.default_rng(seed)
    low = -127 if bits == 8 else -(1 << (bits - 1))
    codes = rng.integers(low, 1 << (bits - 1), (n, k))
    q = torch.from_numpy(rng.integers(-127, 128, (m, k)).astype(np.int8))
    scale = torch.from_numpy(rng.random(1 if per_tensor else n).astype(np.float32) * 0.01 + 1e-4)
    act_scale = torch.from_numpy(rng.random(m).astype(np.float32) * 0.02 + 1e-3)
    mult = None
    if group != -1:
        limit = oracle.mult_max(bits, four_level, k)
        mult = torch.from_numpy(rng.integers(1, limit + 1, (n, -(-k // group))).astype(np.uint8))
    return codes, (q, act_scale, torch.from_numpy(oracle.pack_fast(codes, bits)), scale, mult)


def facts_of(form, activation="none", out_dtype=torch.float32):
    return {"bits": form[0], "four_level": form[1], "group_size": form[2], "activation": activation,
            "out_dtype": out_dtype}  # fmt: skip


@pytest.mark.parametrize("kernel", kernels())
@pytest.mark.parametrize("form", FORMS, ids=str)
def test_every_row_count_and_epilogue_is_the_oracle(form, kernel):
    """All M, the sizes and options drawn; each form meets each bias, residual, output type and activation often."""
    for m, (n, k) in itertools.product(ROWS, SIZES):
        draw = random.Random(f"{form} {m} {n}")
        per_tensor = form[2] == -1 and draw.random() < 0.3
        codes, (q, act_scale, qweight, scale, mult) = operands(form, m, n, k, m + n, per_tensor)
        if m > 2:
            act_scale[1] = float("nan")
        bias_type, residual_type, out = (draw.choice((None, *DTYPES)) for _ in range(3))
        out, activation = out or torch.float32, draw.choice(("none", "relu"))
        bias = None if bias_type is None else torch.randn(n).to(bias_type)
        residual = None if residual_type is None else torch.randn(m, n).to(residual_type)
        part = cpu_gemm.part(qweight, scale, mult, bias, residual, n)
        (y,) = cpu_gemm.gemm(q, [part], **facts_of(form, activation, out), act_scale=act_scale, kernel=kernel)
        acc = oracle.accumulate(q.numpy(), codes, None if mult is None else mult.numpy(), form[1], form[2])
        wanted = oracle.epilogue(
            acc, act_scale.numpy(), scale.numpy(), None if bias is None else bias.float().numpy(),
            None if residual is None else residual.float().numpy(), activation,
        )  # fmt: skip
        wanted = oracle.round_to(wanted, str(out).removeprefix("torch."))
        assert y.dtype == out
        assert_equal(y, wanted, f"{kernel} {form} {m}x{n}x{k} {activation}", may_be_zero=m * n < 8)
        assert m < 3 or bool(y[1].isnan().all()) and not bool(y[0].isnan().any()), "a NaN scale marks its row alone"


@pytest.mark.parametrize("kernel", kernels())
@pytest.mark.parametrize("form", FORMS, ids=str)
def test_saturated_codes(form, kernel):
    """All -8, all -2, all +-127 against +-127, and -128: where a sum of pairs in int16 would saturate or wrap."""
    bits, four_level, group = form
    n, k = 9, 1300
    for code, largest in itertools.product({8: (-127, 127), 4: (-8, 7), 2: (-2, 1)}[bits], (127, -127, -128)):
        codes = np.full((n, k), code)
        q = torch.full((19, k), largest, dtype=torch.int8)  # from 8 rows on: columns in lanes, in sums of their own
        q[1, ::2] = -127
        q[7, ::4], q[7, 1::4] = -127, -127
        q[17, 64:] = 127 if largest < 0 else -127
        mult = None
        if group != -1:
            mult = np.full((n, -(-k // group)), oracle.mult_max(bits, four_level, k), np.uint8)
        qweight, scale = torch.from_numpy(oracle.pack_fast(codes, bits)), torch.ones(n)
        part = cpu_gemm.part(qweight, scale, None if mult is None else torch.from_numpy(mult), None, None, n)
        for m in (1, 5, 19):
            (y,) = cpu_gemm.gemm(q[:m], [part], **facts_of(form), act_scale=torch.ones(m), kernel=kernel)
            acc = oracle.accumulate(q[:m].numpy(), codes, mult, four_level, group)
            assert_equal(y, acc.astype(np.float32), f"{kernel} {form} code {code} of {largest} M={m}")


@pytest.mark.parametrize("mode", ["per_token", "per_tensor", "static"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_linear_quantizes_as_the_quantizer_does(dtype, mode):
    """Float rows of any layout, quantized inside, for one part and twelve, each with its own kind of scale and bias."""
    form, k = (4, False, -1), 131
    static = torch.tensor([0.021]) if mode == "static" else None
    for m in (1, 5, 70):
        x = torch.randn(m, k + 3).to(dtype)[:, 2:-1]
        if mode != "per_tensor":
            x[m // 2, 7] = float("inf")
        parts, wanted = [], []
        q, scale, row_sum = ops.quantize_activation(x, mode, 2.5, True, static, "eager")
        for index, n in enumerate((4, 33, 7, *range(1, 10))):
            _, (_, _, qweight, weight_scale, mult) = operands(form, 1, n, k, index, per_tensor=index % 5 == 1)
            bias = (None, torch.randn(n), torch.randn(n).to(dtype))[index % 3]
            parts.append(cpu_gemm.part(qweight, weight_scale, mult, bias, None, n))
            how = {**facts_of(form, out_dtype=dtype), "out_features": n}
            wanted.append(reference.qgemm(q, scale, row_sum, qweight, weight_scale, mult, bias, None, **how))
        options = {**facts_of(form, out_dtype=dtype), "mode": mode, "clip": 2.5, "act_scale": static}
        for rows in (x, x.t().contiguous().t(), x.reshape(m, 1, k).expand(m, 2, k)):
            for got, want in zip(cpu_gemm.gemm(rows, parts, **options), wanted, strict=True):
                want = want if rows.dim() == 2 else want.reshape(m, 1, -1).expand(m, 2, -1)
                assert_same_bits(got, want.contiguous(), f"{mode} {m} {rows.stride()}")
        for part, want in zip(parts, wanted, strict=True):
            assert_same_bits(cpu_gemm.gemm(x, [part], **options)[0], want)


@pytest.mark.parametrize("kernel", kernels())
def test_gelu_is_near_the_truth_and_alike_in_all_kernels(kernel):
    form = (8, False, -1)
    codes, (q, act_scale, qweight, scale, _) = operands(form, 64, 300, 200)
    for factor in (0.1, 1.0, 10.0):
        part = cpu_gemm.part(qweight, scale * factor, None, torch.randn(300), None, 300)
        run = functools.partial(cpu_gemm.gemm, q, [part], act_scale=act_scale)
        (pre,) = run(**facts_of(form), kernel=kernel)
        (y,) = run(**facts_of(form, "gelu"), kernel=kernel)
        truth = oracle.gelu64(pre.numpy())
        assert_bounded(y, torch.from_numpy(truth), torch.nn.functional.gelu(pre), f"factor {factor}")
        assert_same_bits(y, run(**facts_of(form, "gelu"), kernel="scalar")[0], "another kernel")
        for row in (0, 17, 63):
            (alone,) = cpu_gemm.gemm(q[row : row + 1], [part], **facts_of(form, "gelu"), act_scale=act_scale[row], kernel=kernel)  # fmt: skip # noqa: E501
            assert_same_bits(alone[0], y[row], "alone")
    special = torch.tensor([float("nan"), float("inf"), float("-inf"), 0.0, -7.0])
    part = cpu_gemm.part(torch.zeros(16, 128, dtype=torch.uint8), torch.ones(5), None, special, None, 5)
    (y,) = cpu_gemm.gemm(torch.ones(1, 3), [part], **facts_of(form, "gelu"), kernel=kernel)
    wanted = torch.nn.functional.gelu(special)
    wanted[1] = torch.inf  # of which torch's loop for AVX-512 makes a NaN, its others and its float64 do not
    assert_equal(y[0], wanted, "NaN, Inf and the far tail as torch has them")


# --------------------------------------------------------------------------------------------------- embedding


@pytest.mark.parametrize("kernel", kernels())
@pytest.mark.parametrize("form", FORMS, ids=str)
def test_embedding_is_the_reference(form, kernel):
    rows, width = 53, 200
    _, (_, _, qweight, scale, mult) = operands(form, 1, rows, width)
    ids = torch.randint(0, rows, (3, 41))
    facts = {"bits": form[0], "four_level": form[1], "group_size": form[2], "embedding_dim": width, "embed_scale": 27.7}
    for position, dtype in itertools.product((None, torch.randn(41, width), torch.randn(3, 41, width).half()), DTYPES):
        want = reference.qembedding(ids, qweight, scale, mult, position, **facts, out_dtype=dtype)
        for index in (ids, ids.int(), ids.t().contiguous().t()):
            got = cpu_gemm.embedding(index, qweight, scale, mult, position, **facts, out_dtype=dtype, kernel=kernel)
            assert_same_bits(got, want, f"{form} {dtype}")


def test_ids_without_a_row_are_refused():
    _, (_, _, qweight, scale, mult) = operands((4, False, 32), 1, 5, 40)
    facts = {"bits": 4, "four_level": False, "group_size": 32, "embedding_dim": 40, "embed_scale": 1.0,
             "out_dtype": torch.float32}  # fmt: skip
    for bad in (-1, 5, 2**31, -(2**40)):
        with pytest.raises(IndexError, match="ids must lie in"):
            cpu_gemm.embedding(torch.tensor([0, bad]), qweight, scale, mult, None, **facts)
        with pytest.raises(IndexError, match=r"ids must be in 0\.\.4"):
            ops.qembedding(torch.tensor([bad]), qweight, scale, mult, None, 4, False, 32, 5, 40, 1.0, torch.float32)
    assert cpu_gemm.embedding(torch.tensor([4]), qweight, scale, mult, None, **facts).shape == (1, 40)
    assert cpu_gemm.embedding(torch.empty(0, 3, dtype=torch.long), qweight, scale, mult, None, **facts).shape == (
        0, 3, 40,
    )  # fmt: skip


# ---------------------------------------------------------------------------------------- threads and processes

#: Large enough to be shared among threads.
LARGE = ((64, 768, 300), (1, 9000, 1000), (300, 700, 64))


def large_cases():
    for index, (form, (m, n, k)) in enumerate(
        itertools.product(((8, False, -1), (4, False, 32), (2, True, -1)), LARGE)
    ):
        codes, (q, act_scale, qweight, scale, mult) = operands(form, m, n, k, index)
        run = functools.partial(
            cpu_gemm.gemm, q, [cpu_gemm.part(qweight, scale, mult, None, None, n)], **facts_of(form, "gelu"),
            act_scale=act_scale,
        )  # fmt: skip
        yield f"{form} {m}x{n}x{k}", run


@pytest.fixture
def threads():
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


def test_any_number_of_threads_gives_the_same_bits(threads):
    """Between ops of torch that use its own threads: they are the same ones."""
    assert native.native().cpu_threads() == "OpenMP of the process"
    threads(1)
    alone = {name: run()[0] for name, run in large_cases()}
    busy = torch.randn(700, 700)
    for count in (2, 3, 8):
        threads(count)
        for name, run in large_cases():
            busy = torch.tanh(busy @ busy)
            assert_same_bits(run()[0], alone[name], f"{name}, {count} threads")
    assert bool(busy.isfinite().all())


def test_eight_threads_at_once(threads):
    threads(2)
    cases = list(large_cases())
    wanted = [run()[0] for _, run in cases]
    start, wrong = threading.Barrier(8), []

    def work(seed):
        torch.set_num_threads(2)  # of the calling thread, in OpenMP
        start.wait()
        for index in range(len(cases)):
            name, run = cases[(index + seed) % len(cases)]
            if not torch.equal(run()[0], wanted[(index + seed) % len(cases)]):
                wrong.append(name)

    workers = [threading.Thread(target=work, args=(seed,)) for seed in range(8)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert not wrong, wrong


def _in_a_child(queue, count):
    torch.set_num_threads(count)
    queue.put([run()[0].numpy() for _, run in large_cases()])


def test_a_forked_child_computes(threads):
    """As a worker of a DataLoader does; also with more threads, where the runtime that the child inherited would wait
    for threads that the fork did not copy."""
    threads(2)
    wanted = [run()[0].numpy() for _, run in large_cases()]
    context = multiprocessing.get_context("fork")
    for count in (1, 2):
        queue = context.Queue()
        child = context.Process(target=_in_a_child, args=(queue, count))
        child.start()
        found = queue.get(timeout=120)
        child.join(timeout=60)
        assert child.exitcode == 0
        assert all(np.array_equal(a, b) for a, b in zip(found, wanted, strict=True))


def program(isa, *arguments):
    """tests/native_gemm_checks.py, without torch, under DQKERNELS_CPU=isa."""
    command = [sys.executable, str(HERE / "native_gemm_checks.py"), native.native().__file__, *arguments]
    return subprocess.run(
        command, env={**os.environ, "DQKERNELS_CPU": isa}, capture_output=True, text=True, timeout=300, check=False
    )


@pytest.mark.parametrize("isa", kernels())
def test_between_guard_pages_and_without_torch(isa):
    done = program(isa)
    assert done.returncode == 0, done.stderr
    said = json.loads(done.stdout)
    assert (said.pop("isa"), said.pop("kernel")) == (isa, isa)
    assert len(said) == len(CHECKS) and all(said.values())


# ----------------------------------------------------------------------------------------- what is said and chosen


def test_auto_takes_the_core_and_eager_stays_reachable(monkeypatch):
    monkeypatch.delenv("DQKERNELS_BACKEND", raising=False)
    backends.refresh()
    for op, facts in (("qgemm", {"bits": 4, "group_size": 64}), ("qembedding", {"bits": 2})):
        assert backends.choose(op, "cpu", **facts) == backends.Choice("cpu", "first choice for this device")
        assert backends.choose(op, "cpu", "eager", **facts).backend == "eager"
    packed = nn.QLinear.from_linear(torch.nn.Linear(40, 24), DQConfig(weight_bits=4))
    assert packed.kernel() == "cpu (first choice for this device)"
    x = torch.randn(3, 40)
    taken = packed(x)
    packed.backend = "eager"
    assert_same_bits(packed(x), taken)
    packed.backend, packed.strict = "auto", True
    assert_same_bits(packed(x), taken, "strict has nothing to refuse")
    assert backends.one_kernel("qlinear_multi", "cpu", bits=4, group_size=-1, norm=None).backend == "cpu"
    assert backends.one_kernel("qlinear_multi", "cpu", bits=4, group_size=-1, norm=True) is None


def test_the_instruction_set_and_its_kernel_are_named(monkeypatch):
    isa, kernel = native.native().cpu_isa(), native.native().cpu_gemm_kernel()
    assert isa in str(dqkernels.info())
    from dqkernels.backends import cpu

    assert cpu.available("cpu")[1].startswith(f"compiled core, {isa}")

    class Core:
        def __getattr__(self, name):
            return getattr(native._load()[0], name)

        def cpu_isa(self):
            return "amx_int8"

        def cpu_gemm_kernel(self):
            return "avx512_vnni"

    monkeypatch.setattr(native, "native", Core)
    assert cpu.available("cpu") == (True, "compiled core, amx_int8 (its GEMM: avx512_vnni)")
    monkeypatch.setattr(Core, "cpu_isa", lambda self: "dotprod")
    monkeypatch.setattr(Core, "cpu_gemm_kernel", Core.cpu_isa)
    assert cpu.available("cpu") == (True, "compiled core, dotprod")
    assert kernel in native._load()[0].cpu_gemm_kernels()


def test_what_the_core_cannot_do_is_refused_in_words():
    codes, (q, act_scale, qweight, scale, _) = operands((8, False, -1), 2, 5, 40)
    part = cpu_gemm.part(qweight, scale, None, None, None, 5)
    with pytest.raises(ValueError, match="x must be float32, float16 or bfloat16, got torch.float64"):
        cpu_gemm.gemm(torch.randn(2, 40).double(), [part], **facts_of((8, False, -1)))
    with pytest.raises(ValueError, match="out_dtype must be"):
        cpu_gemm.gemm(q, [part], **facts_of((8, False, -1), out_dtype=torch.float64), act_scale=act_scale)
    for count, tape in ((65, None), (4, Tape())):
        with pytest.raises(ValueError, match=r"1 to 64 parts \(1 to 3 where it is kept\)"):
            cpu_gemm.gemm(q, [part] * count, **facts_of((8, False, -1)), act_scale=act_scale, into=tape)
    grouped = part._replace(group_mult=torch.ones(5, 2, dtype=torch.uint8))
    with pytest.raises(ValueError, match="group_size must be 32, 64 or 128"):
        cpu_gemm.gemm(q, [grouped], **facts_of((8, False, 32)), act_scale=act_scale)
    with pytest.raises(ValueError, match="group_mult is a null pointer"):
        cpu_gemm.gemm(q, [part], **facts_of((4, False, 32)), act_scale=act_scale)
    with pytest.raises(ValueError, match="clip must be positive"):
        cpu_gemm.gemm(torch.randn(2, 40), [part], **facts_of((8, False, -1)), clip=-1.0)
    absent = next((n for n in native.native().cpu_gemm_kernels() if n not in kernels()), None)
    if absent is not None:
        with pytest.raises(ValueError, match="kernel must be 0, or 1"):
            cpu_gemm.gemm(q, [part], **facts_of((8, False, -1)), act_scale=act_scale, kernel=absent)
    assert cpu_gemm.gemm(q, [part], **facts_of((8, False, -1)), act_scale=act_scale)[0].shape == (2, 5)
    from dqkernels.backends import cpu

    assert "only -1, and 32, 64 or 128 at 2 and 4 bits" in cpu.supports("qgemm", bits=8, group_size=32)


# --------------------------------------------------------------------------------- past the dispatcher, unwatched


class Calls(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.append(func.name())
        return func(*args, **(kwargs or {}))


def test_a_linear_goes_past_the_dispatcher_only_unwatched(monkeypatch):
    packed = nn.QLinear.from_linear(torch.nn.Linear(40, 24), DQConfig(weight_bits=4))
    x = torch.randn(3, 40)
    reached = []
    real = ops._qlinear
    monkeypatch.setattr(ops, "_qlinear", lambda *args: reached.append("direct") or real(*args))
    plain = packed(x)
    assert reached == ["direct"]
    with Calls() as seen:
        assert_same_bits(packed(x), plain, "under a mode")
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert_same_bits(packed(x), plain, "under autocast")
    learned = x.clone().requires_grad_()
    y = packed(learned)
    y.sum().backward()
    assert_same_bits(y.detach(), plain, "with a gradient")
    assert learned.grad is not None
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        packed(x)
    assert reached == ["direct"], "who watches sees the op"
    assert "dqkernels::qlinear" in seen.names
    assert "dqkernels::qlinear" in {event.key for event in profile.key_averages()}
    with torch.no_grad():
        assert_same_bits(packed(learned), plain)
    assert reached == ["direct"] * 2
    lists = [packed.qweight], [packed.weight_scale], [None], [packed.bias]
    rest = (4, False, -1, [24], "per_token", None, None, "none", torch.float32)
    assert_same_bits(fused.linears(x, None, None, 0.0, *lists, *rest, "auto", False)[0], plain)
    with Calls() as seen:
        fused.linears(x, None, None, 0.0, *lists, *rest, "auto", False)
    assert "dqkernels::qlinear_multi" in seen.names
