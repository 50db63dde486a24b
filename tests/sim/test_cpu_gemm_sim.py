"""csrc/cpu's GEMM and embedding under ASan and UBSan, against the numpy oracle, bit by bit: every kernel that this CPU
runs, and the models of those that it does not. A case's seeds are its numbers of threads.
"""

import zlib
from pathlib import Path

import numpy as np
import oracle
import pytest
from harness import ABSENT, Case, Report, given, run_cases, statuses, wanted
from pairwise import covering

#: In the order of kEntries (csrc/cpu/gemm.cpp), from 1 on; the flags of /proc/cpuinfo that each needs.
KERNELS = {
    "scalar": (1, ()),
    "avx2": (2, ("avx2", "f16c")),
    "avx_vnni": (3, ("avx2", "f16c", "avx_vnni")),
    "avx512_vnni": (4, ("avx512f", "avx512bw", "avx512dq", "avx512vl", "avx512_vnni")),
    "amx_int8": (5, ("avx512f", "avx512bw", "avx512dq", "avx512vl", "avx512_vnni", "amx_tile", "amx_int8")),
    "model_avx_vnni": (6, ("avx2", "f16c")),
    "model_avx512_vnni": (7, ("avx2", "f16c")),
    "model_amx": (8, ("avx2", "f16c")),
    "model_dotprod": (9, ()),
}
#: (bits, four_level, group size), 0 for no groups.
FORMS = {
    "W8": (8, False, 0),
    "W4": (4, False, 0),
    "ternary": (2, False, 0),
    "four_level": (2, True, 0),
    "W4 g32": (4, False, 32),
    "W4 g128": (4, False, 128),
    "ternary g32": (2, False, 32),
    "four_level g32": (2, True, 32),
    "four_level g64": (2, True, 64),
}
TYPES = {"fp32": 0, "fp16": 1, "bf16": 2, "int8": 3}
MODES = {"per_token": 0, "per_tensor": 1, "static": 2}
ACTIVATIONS = {"none": 0, "relu": 1, "gelu": 2}
NAMES = {"fp32": "float32", "fp16": "float16", "bf16": "bfloat16"}
STORED = {"fp32": np.float32, "fp16": np.float16, "bf16": np.uint16}  # numpy cannot name bfloat16
ACT_SCALE = np.float32(0.0173)


def here() -> list[str]:
    cpuinfo = Path("/proc/cpuinfo")
    flags = cpuinfo.read_text().split() if cpuinfo.exists() else []
    return [name for name, (_, needs) in KERNELS.items() if all(flag in flags for flag in needs)]


AXES = {
    "kernel": here(),
    "form": list(FORMS),
    "m": [1, 2, 3, 5, 17, 40],
    # Columns come 4 and 32 at a time.
    "n": [1, 3, 4, 17, 33, 70],
    # Blocks of 128, vectors of 16 to 64; unpacked rows are cut at 2048 (AVX2, 8 bits) and 4096 codes.
    "k": [1, 31, 33, 64, 127, 129, 300, 385, 2100, 4230],
    "x": list(TYPES),
    "mode": list(MODES),
    "clip": [0.0, 2.5],
    "layout": ["contiguous", "strided", "expanded"],
    "parts": [1, 2, 12],
    "scales": ["per_channel", "per_tensor"],
    "bias": [None, "fp32", "fp16", "bf16"],
    "residual": [None, "fp32", "fp16", "bf16"],
    "activation": ["none", "relu"],
    "y": ["fp32", "fp16", "bf16"],
    "codes": ["random", "lowest", "highest"],
    "special": ["none", "NaN row", "saturated"],
}


def storage(values: np.ndarray, kind: str) -> np.ndarray:
    """float32 -> what lies in memory; 16-bit types as their bits, numbers cut to what the type holds."""
    if kind == "fp32":
        return values.astype(np.float32)
    if kind == "fp16":
        return values.astype(np.float16).view(np.uint16)
    return oracle.bfloat16_bits(values)


def widened(raw: np.ndarray, kind: str) -> np.ndarray:
    if kind == "fp32":
        return raw
    return raw.view(np.float16).astype(np.float32) if kind == "fp16" else (raw.astype(np.uint32) << 16).view(np.float32)


def codes_of(options, rng, n: int, k: int) -> np.ndarray:
    bits, four_level, _ = FORMS[options["form"]]
    low, high = -(1 << (bits - 1)), (1 << (bits - 1)) - 1
    low = -127 if bits == 8 else -1 if bits == 2 and not four_level else low
    if options["codes"] == "random":
        return rng.integers(low, high + 1, (n, k))
    return np.full((n, k), low if options["codes"] == "lowest" else high)


def gemm_case(options: dict) -> Case:
    name = " ".join(f"{axis}={value}" for axis, value in options.items())
    rng = np.random.default_rng(zlib.crc32(name.encode()))
    m, n, k = options["m"], options["n"], options["k"]
    bits, four_level, group = FORMS[options["form"]]
    kind, special = options["x"], options["special"]
    mode = options["mode"] if kind != "int8" else "per_token"
    rows = 1 if options["layout"] == "expanded" else m
    q = act_scale = None
    if kind == "int8":
        q = rng.integers(-127, 128, (rows, k)).astype(np.int8)
        if special == "saturated":
            q = np.where(rng.random((rows, k)) < 0.5, -127, 127).astype(np.int8)
        act_scale = (rng.random(m) * 0.02 + 1e-3).astype(np.float32)
        if special == "NaN row":
            act_scale[m // 2] = np.nan
        raw = q
    else:
        x = (rng.standard_normal((rows, k)) * 2).astype(np.float32)
        if special == "saturated":
            x = np.sign(x) * 3
        if special == "NaN row":
            x[rows // 2, k - 1] = np.nan
        raw = storage(x, kind)
        flat = np.broadcast_to(widened(raw, kind), (m, k))
        static = ACT_SCALE if mode == "static" else None
        codes, act_scale, _ = oracle.quantize_activation(flat.copy(), mode, options["clip"] or None, static)
    if q is not None:
        codes = np.broadcast_to(q, (m, k)).astype(np.int64)
    stride = {"contiguous": k, "strided": k + 3, "expanded": 0}[options["layout"]]
    if options["layout"] == "strided":
        padded = np.full((m - 1) * stride + k, 99, raw.dtype)  # no byte behind the last row
        for row in range(m):
            padded[row * stride : row * stride + k] = raw[row]
        raw = padded
    scalars = [KERNELS[options["kernel"]][0], m, k, stride, TYPES[kind], MODES[mode], options["clip"],
               float(ACT_SCALE if mode == "static" else 0), bits, int(four_level), group,
               ACTIVATIONS[options["activation"]], TYPES[options["y"]], options["parts"]]  # fmt: skip
    buffers = [given(raw), given(act_scale.astype(np.float32)) if kind == "int8" else ABSENT]
    expected = []
    for part in range(options["parts"]):
        columns = n + 5 * part
        weight = codes_of(options, rng, columns, k)
        count = 1 if options["scales"] == "per_tensor" else columns
        scale = (rng.random(count) * 0.01 + 1e-4).astype(np.float32)
        mult = None
        if group:
            limit = oracle.mult_max(bits, four_level, k)
            mult = rng.integers(1, limit + 1, (columns, -(-k // group))).astype(np.uint8)
        bias_kind, residual_kind = options["bias"], options["residual"]
        bias = None if bias_kind is None else storage(rng.standard_normal(columns).astype(np.float32), bias_kind)
        residual = rng.standard_normal((m, columns)).astype(np.float32)
        residual = None if residual_kind is None else storage(residual, residual_kind)
        scalars += [columns, int(count == 1), TYPES[bias_kind or "fp32"], TYPES[residual_kind or "fp32"]]
        buffers += [given(oracle.pack_fast(weight, bits)), given(scale), ABSENT if mult is None else given(mult),
                    ABSENT if bias is None else given(bias), ABSENT if residual is None else given(residual),
                    wanted((m, columns), STORED[options["y"]])]  # fmt: skip
        acc = oracle.accumulate(codes, weight, mult, four_level, group)
        t = oracle.epilogue(
            acc, act_scale, scale,
            None if bias is None else widened(bias, bias_kind),
            None if residual is None else widened(residual, residual_kind), options["activation"],
        )  # fmt: skip
        expected.append(stored(t, options["y"]))
    return Case(name, "gemm", scalars, buffers, expected)


def stored(t: np.ndarray, kind: str) -> np.ndarray:
    """float32 rounded to the type of y; a NaN of bfloat16 is 0x7FC0 everywhere."""
    with np.errstate(over="ignore"):
        raw = storage(oracle.round_to(t, NAMES[kind]), kind)
    return raw.view(STORED[kind])


@pytest.fixture
def program(sim_program):
    return sim_program(
        "gemm_host.cpp", "gemm_dotprod_model.cpp", "gemm_amx_model.cpp", "gemm_avx512_model.cpp",
        "gemm_avx_vnni_model.cpp", "csrc/cpu/gemm.cpp",
        "csrc/cpu/gemm_scalar.cpp", "csrc/cpu/gemm_avx2.cpp", "csrc/cpu/gemm_avx_vnni.cpp",
        "csrc/cpu/gemm_avx512_vnni.cpp", "csrc/cpu/gemm_amx.cpp", "csrc/cpu/embedding.cpp", "csrc/cpu/threads.cpp",
        "csrc/cpu/quantize.cpp", "csrc/cpu/quantize_x86.cpp", "csrc/cpu/isa.cpp",
    )  # fmt: skip


GRID = [options for seed in range(4) for options in covering(AXES, seed=seed)]
#: Threads less one.
SEEDS = (0, 2)


@pytest.mark.parametrize("kernel", here())
@pytest.mark.parametrize("form", FORMS)
def test_sums_and_epilogue(program, form, kernel):
    """Any two options of AXES meet in some case, four times over."""
    chosen = [options for options in GRID if (options["form"], options["kernel"]) == (form, kernel)]
    assert run_cases(program, map(gemm_case, chosen), SEEDS) >= 4


@pytest.mark.parametrize("kernel", here())
def test_every_number_of_rows(program, kernel):
    """The paths of one, a few and many rows, what their tiles leave over, blocks of rows; 129 make several tasks."""
    plain = {"n": 5, "k": 130, "x": "fp32", "mode": "per_token", "clip": 0.0, "layout": "contiguous", "parts": 1,
             "scales": "per_channel", "bias": "fp32", "residual": None, "activation": "none", "y": "fp32",
             "codes": "random", "special": "none"}  # fmt: skip
    cases = [
        gemm_case({"kernel": kernel, "form": form, "m": m, **plain})
        for form in ("W8", "W4", "ternary", "four_level", "W4 g32", "four_level g64")
        for m in (1, 2, 3, 4, 6, 7, 8, 9, 15, 16, 17, 18, 19, 20, 33, 64, 65, 129)
    ]
    assert run_cases(program, cases, SEEDS) == len(cases)


#: K, and the lowest activation.
EXTREMES = [(131_071, -127), (300, -128)]


@pytest.mark.parametrize(("k", "lowest"), EXTREMES)
@pytest.mark.parametrize("kernel", here())
def test_the_largest_sums(program, kernel, k, lowest):
    """K = 131,071 with every code and activation at its largest: an int32 that nearly wraps, and the int16 of AVX2,
    which a -128, that no quantizer gives, does not wrap."""
    cases = []
    for form, (bits, four_level, group) in FORMS.items():
        largest = {8: -127, 4: -8, 2: -2 if four_level else -1}[bits]
        q = np.full((24, k), 127, np.int8)  # columns in the lanes: from 8 on, with AVX-512 from 20
        q[1] = lowest
        q[2, ::2] = -127
        q[5, ::4], q[5, 1::4] = -127, -127
        weight = np.full((2, k), largest)
        weight[1] = {8: 127, 4: 7, 2: 1}[bits]
        mult = None
        if group:
            mult = np.full((2, -(-k // group)), oracle.mult_max(bits, four_level, k), np.uint8)
        scale, act_scale = np.full(2, 2.0**-20, np.float32), np.ones(24, np.float32)
        acc = oracle.accumulate(q.astype(np.int64), weight, mult, four_level, group)
        for rows in (1, 3, 8, 24):
            scalars = [
                KERNELS[kernel][0],
                rows,
                k,
                k,
                3,
                0,
                0.0,
                0.0,
                bits,
                int(four_level),
                group,
                0,
                0,
                1,
                2,
                0,
                0,
                0,
            ]
            buffers = [given(q[:rows]), given(act_scale[:rows]), given(oracle.pack_fast(weight, bits)), given(scale),
                       ABSENT if mult is None else given(mult), ABSENT, ABSENT,
                       wanted((rows, 2), np.float32)]  # fmt: skip
            expected = [oracle.epilogue(acc[:rows], act_scale[:rows], scale)]
            cases.append(Case(f"{kernel} {form} M={rows}", "gemm", scalars, buffers, expected))
    assert run_cases(program, cases, (0,)) == len(cases)


def test_gelu_is_the_same_in_every_kernel_and_near_the_truth(program):
    """The form is plain IEEE arithmetic, so kernels agree bit for bit, whatever vectors they use."""
    n, k = 70, 64
    rng = np.random.default_rng(5)
    q = rng.integers(-127, 128, (3, k)).astype(np.int8)
    weight = rng.integers(-127, 128, (n, k))
    scale, act_scale = np.full(n, 1e-3, np.float32), np.array([0.02, 0.2, 1.0], np.float32)
    before = oracle.epilogue(q.astype(np.int64) @ weight.T, act_scale, scale)
    assert np.abs(before).max() > 8 and np.abs(before).min() < 0.01
    for m in (1, 3):
        buffers = [given(q[:m]), given(act_scale[:m]), given(oracle.pack_fast(weight, 8)), given(scale), ABSENT, ABSENT,
                   ABSENT, wanted((m, n), np.float32)]  # fmt: skip
        found = []
        for kernel in here():
            scalars = [KERNELS[kernel][0], m, k, k, 3, 0, 0.0, 0.0, 8, 0, 0, 2, 0, 1, n, 0, 0, 0]
            status, (y,) = program.call("gemm", scalars, buffers, 0)
            assert status == 0
            found.append(y)
        assert all(np.array_equal(y, found[0]) for y in found)
        truth = oracle.gelu64(before[:m])
        # torch's own error is 3.8e-7 for |x| < 16; two of it, and half a last digit of the largest value.
        assert np.abs(found[0] - truth).max() < 7.6e-7 + np.abs(truth).max() * 2.0**-24


EMBEDDING_AXES = {
    "kernel": here(),
    "form": list(FORMS),
    "count": [0, 1, 3, 40],
    "rows": [1, 17, 53],
    "k": [1, 31, 70, 128, 129, 300],
    "ids32": [False, True],
    "scales": ["per_channel", "per_tensor"],
    "embed_scale": [1.0, float(np.float32(27.7))],
    "position": [None, "fp32", "fp16", "bf16"],
    "position_rows": ["each", "one"],
    "y": ["fp32", "fp16", "bf16"],
}


def embedding_case(options: dict) -> Case:
    name = " ".join(f"{axis}={value}" for axis, value in options.items())
    rng = np.random.default_rng(zlib.crc32(name.encode()))
    count, rows, k = options["count"], options["rows"], options["k"]
    bits, four_level, group = FORMS[options["form"]]
    low = -127 if bits == 8 else -(1 << (bits - 1))
    codes = rng.integers(low, (1 << (bits - 1)), (rows, k))
    scale = rng.random(1 if options["scales"] == "per_tensor" else rows).astype(np.float32)
    mult = rng.integers(1, 128, (rows, -(-k // group))).astype(np.uint8) if group else None
    ids = rng.integers(0, rows, count).astype(np.int32 if options["ids32"] else np.int64)
    kind, one = options["position"], options["position_rows"] == "one"
    position = None
    if kind is not None:
        position = storage(rng.standard_normal((1 if one else count, k)).astype(np.float32), kind)
    want = oracle.qembedding(
        ids.astype(np.int64), codes, scale, mult, four_level=four_level, group_size=group or -1,
        embed_scale=options["embed_scale"], position=None if position is None else widened(position, kind),
        dtype="float32",
    )  # fmt: skip
    scalars = [KERNELS[options["kernel"]][0], int(options["ids32"]), count, rows, k, bits, int(four_level), group,
               int(scale.size == 1), options["embed_scale"], TYPES[kind or "fp32"], 0 if one else k,
               TYPES[options["y"]]]  # fmt: skip
    buffers = [given(ids), given(oracle.pack_fast(codes, bits)), given(scale), ABSENT if mult is None else given(mult),
               ABSENT if position is None else given(position), wanted((count, k), STORED[options["y"]])]  # fmt: skip
    return Case(name, "embedding", scalars, buffers, [stored(want.reshape(count, k), options["y"])])


@pytest.mark.parametrize("kernel", here())
def test_embedding_rows(program, kernel):
    """Any two options of EMBEDDING_AXES meet in some case."""
    chosen = [o for seed in range(3) for o in covering(EMBEDDING_AXES, seed=seed) if o["kernel"] == kernel]
    assert run_cases(program, map(embedding_case, chosen), SEEDS) >= 25


def test_refusals_come_before_any_memory_is_touched(program):
    nothing, status = [ABSENT] * (2 + 6 * 64), statuses().index
    plain = [0, 1, 4, 4, 0, 0, 0.0, 0.0, 8, 0, 0, 0, 0, 1, *[4, 0, 0, 0] * 64]

    def changed(name, word, **fields):
        places = {"kernel": 0, "m": 1, "k": 2, "stride": 3, "x": 4, "clip": 6, "bits": 8, "group": 10, "activation": 11,
                  "y": 12, "parts": 13, "n": 14}  # fmt: skip
        scalars = list(plain)
        for field, value in fields.items():
            scalars[places[field]] = value
        return Case(name, "gemm", scalars, nothing, [], status(word))

    run_cases(program, [
        changed("no weights", "bad_cpu_part"),
        changed("three bits", "bad_bits", bits=3),
        changed("groups at 8 bits", "bad_group_size", group=32),
        changed("groups of 48", "bad_group_size", bits=4, group=48),
        changed("k = 0", "bad_size", k=0),
        changed("k past int32", "k_too_large", k=131_072),
        changed("no such activation", "bad_activation", activation=3),
        changed("int8 output", "bad_dtype", y=3),
        changed("no parts", "bad_cpu_part", parts=0),
        changed("65 parts", "bad_cpu_part", parts=65),
        changed("codes without scales", "bad_cpu_part", x=3),
        changed("negative stride", "bad_size", stride=-1),
        changed("negative clip", "bad_clip", clip=-1.0),
        changed("n = 0", "bad_cpu_part", n=0),
        Case("an id too high", "embedding", [0, 0, 1, 4, 8, 4, 0, 0, 1, 1.0, 0, 8, 0],
             [given(np.array([4])), given(np.zeros((16, 64), np.uint8)), given(np.ones(1, np.float32)), ABSENT, ABSENT,
              given(np.zeros((1, 8), np.float32))], [], status("bad_id")),
        Case("a negative id", "embedding", [0, 0, 1, 4, 8, 4, 0, 0, 1, 1.0, 0, 8, 0],
             [given(np.array([-1])), given(np.zeros((16, 64), np.uint8)), given(np.ones(1, np.float32)), ABSENT, ABSENT,
              given(np.zeros((1, 8), np.float32))], [], status("bad_id")),
    ], (0,))  # fmt: skip


def test_a_missing_byte_is_seen(program):
    """The positive control: weights one byte short."""
    case = gemm_case({"kernel": "scalar", "form": "W4", "m": 2, "n": 16, "k": 128, "x": "int8", "mode": "per_token",
                      "clip": 0.0, "layout": "contiguous", "parts": 1, "scales": "per_channel", "bias": None,
                      "residual": None, "activation": "none", "y": "fp32", "codes": "random",
                      "special": "none"})  # fmt: skip
    short = given(case.buffers[2].array.ravel()[:-1])
    with pytest.raises(Report, match="heap-buffer-overflow"):
        program.call(case.function, case.scalars, [*case.buffers[:2], short, *case.buffers[3:]], 0)
