"""What the compiled core computes with one thread, with several, for several callers at once, and with every operand
between pages that cannot be read: the same bytes.

`python tests/native_thread_checks.py <path of _C>` runs all checks, without torch: then the threads are the core's own,
and ThreadSanitizer sees every one of them (long/test_cpu_sanitizers.py). Operands are large enough that each kernel
shares its work. That the bytes are right is for the other check programs to say. Prints a digest of all of them, which
is the same for each instruction set. Names of cases as arguments run these alone.
"""

import functools
import hashlib
import itertools
import json
import os
import sys
import threading

import numpy as np
import oracle
from guarded import guarded
from native_checks import BF16, FP16, FP32, PER_TENSOR, PER_TOKEN, load, narrow

THREADS = (2, 3, 5)
CALLERS = 8
CASES = {}
#: None, or on which side of what a case makes an unreadable page lies: True behind its end, False before its start.
WALL = None


def case(function):
    """function(core, rng) -> a function of (threads, fill): the results, in fresh memory that began as `fill` bytes."""
    CASES[function.__name__] = function
    return function


def walled(array):
    """What the core is given: the array itself, or a copy beside the wall. Contiguous arrays only."""
    return array if WALL is None else guarded(array, WALL)


def floats(rng, shape, dtype=FP32):
    return walled(narrow(rng.standard_normal(shape).astype(np.float32), dtype))


def fresh(shape, dtype, fill):
    out = walled(np.empty(shape, dtype))
    out.view(np.uint8)[...] = fill
    return out


def full(shape, value, dtype):
    return walled(np.full(shape, value, dtype))


def at(array):
    return 0 if array is None else array.ctypes.data


def strides(array):
    return [each // array.itemsize for each in array.strides]


def operand(array, dtype=FP32):
    return at(array), dtype, strides(array)


def cache(codes, scale):
    return at(codes), strides(codes)[:3], at(scale), strides(scale)


def packed(rng, n, k, bits=4):
    """Weights [n, k]: packed codes and scales."""
    codes = rng.integers(-(1 << (bits - 1)) + 1, 1 << (bits - 1), (n, k))
    return walled(oracle.pack_fast(codes, bits)), walled((rng.random(n) * 0.01 + 1e-3).astype(np.float32))


def plan(core, k, parts, x_dtype=FP32, mode=PER_TOKEN, bits=4):
    none = [FP32] * parts
    return lambda n: core.CpuPlan(
        k=k, x_dtype=x_dtype, mode=mode, clip=0.0, bits=bits, four_level=False, group_size=0, activation=2,
        y_dtype=FP32, n=n, tensor_scale=[False] * parts, bias_dtype=none, residual_dtype=none,
    )  # fmt: skip


# ---- the kernels -------------------------------------------------------------------------------------------------


@case
def quantizer(core, rng):
    """It has no threads; its callers have."""
    x = floats(rng, (70, 300))

    def run(threads, fill):
        q, scale, row_sum = fresh((70, 300), np.int8, fill), fresh(70, np.float32, fill), fresh(70, np.int32, fill)
        core.quantize_rows(at(x), FP32, 70, 300, 300, PER_TENSOR, 0.0, 0.0, at(q), at(scale), at(row_sum))
        return q, scale, row_sum

    return run


def linear(core, rng, m, mode, dtype=FP32):
    """Float rows into two parts, with GELU behind them."""
    k, widths = 512, [900, 300]
    x, weights = floats(rng, (m, k), dtype), [packed(rng, n, k) for n in widths]

    def run(threads, fill):
        out = [fresh((m, n), np.float32, fill) for n in widths]
        parts = [(at(w), at(s), 0, 0, 0, at(y)) for (w, s), y in zip(weights, out, strict=True)]
        plan(core, k, 2, dtype, mode)(widths).run(m, k, at(x), 0, 0.0, threads, parts)
        return out

    return run


@case
def linear_of_a_row(core, rng):
    return linear(core, rng, 1, PER_TOKEN)


@case
def linear_of_rows(core, rng):
    return linear(core, rng, 60, PER_TOKEN)


@case
def linear_of_few_rows_of_16_bits(core, rng):
    return linear(core, rng, 7, PER_TOKEN, BF16)


@case
def linear_per_tensor(core, rng):
    return linear(core, rng, 60, PER_TENSOR)


@case
def embedding(core, rng):
    count, rows, k = 96, 50, 768
    table, scale = packed(rng, rows, k)
    ids = walled(rng.integers(0, rows, count))

    def run(threads, fill):
        y = fresh((count, k), np.float32, fill)
        core.cpu_embedding(
            ids=at(ids), ids32=False, count=count, qweight=at(table), weight_scale=at(scale), tensor_scale=False,
            group_mult=0, rows=rows, k=k, bits=4, four_level=False, group_size=0, embed_scale=1.5, position=0,
            position_dtype=FP32, position_stride=0, y=at(y), y_dtype=FP32, threads=threads,
        )  # fmt: skip
        return [y]

    return run


def norm(core, rng, mode, dtype):
    rows, k = 120, 768
    x, residual, weight, bias = (floats(rng, shape, dtype) for shape in ((rows, k), (rows, k), k, k))

    def run(threads, fill):
        y, q = fresh((rows, k), x.dtype, fill), fresh((rows, k), np.int8, fill)
        scale, row_sum = fresh(rows, np.float32, fill), fresh(rows, np.int32, fill)
        codes = (mode, 0.0, 0.0, at(q), at(scale), at(row_sum))
        given = [(at(each), dtype, k) for each in (x, residual, weight, bias)]
        core.norm_quantize(*given, 1e-5, at(y), rows, k, codes, threads)
        return y, q, scale, row_sum

    return run


@case
def norm_and_codes(core, rng):
    return norm(core, rng, PER_TOKEN, FP32)


@case
def norm_and_codes_per_tensor(core, rng):
    return norm(core, rng, PER_TENSOR, FP16)


def gelu(core, rng, mode, dtype):
    rows, k = 120, 768
    x = floats(rng, (rows, k), dtype)

    def run(threads, fill):
        q = fresh((rows, k), np.int8, fill)
        scale, row_sum = fresh(rows, np.float32, fill), fresh(rows, np.int32, fill)
        codes = (mode, 0.0, 0.0, at(q), at(scale), at(row_sum))
        core.gelu_quantize((at(x), dtype, k), rows, k, codes, threads)
        return q, scale, row_sum

    return run


@case
def gelu_and_codes(core, rng):
    return gelu(core, rng, PER_TOKEN, BF16)


@case
def gelu_and_codes_per_tensor(core, rng):
    return gelu(core, rng, PER_TENSOR, FP32)


# ---- attention ---------------------------------------------------------------------------------------------------

HEADS, WIDTH = 4, 16


def prefill(core, rng, mode, dtype):
    batch, queries, keys = 2, 70, 520
    q, k, v = (floats(rng, (batch, HEADS, n, WIDTH), dtype) for n in (queries, keys, keys))
    mask, bias = walled(rng.integers(0, 4, (batch, 1, 1, keys)) > 0), floats(rng, (1, HEADS, queries, keys))

    def run(threads, fill):
        out = fresh(q.shape, q.dtype, fill)
        given = [operand(each, dtype) for each in (q, k, v)]
        by_batch, by_head = (at(mask), 0, [keys, 0, 0, 1]), (at(bias), FP32, [0, queries * keys, keys, 1])
        sizes = [batch, HEADS, queries, keys, WIDTH]
        core.attention(*given, by_batch, by_head, at(out), sizes, True, 0.25, mode, 0.0, threads)
        return [out]

    return run


@case
def attention(core, rng):
    return prefill(core, rng, PER_TOKEN, FP32)


@case
def attention_per_tensor(core, rng):
    return prefill(core, rng, PER_TENSOR, BF16)


def decode(core, rng, source, per_key):
    rows, capacity = 8, 700
    q = floats(rng, (rows, HEADS, 1, WIDTH))
    codes = [walled(rng.integers(-127, 128, (rows, HEADS, capacity, WIDTH)).astype(np.int8)) for _ in "kv"]
    scales = [walled((rng.random((rows, HEADS, capacity)) * 0.02 + 1e-3).astype(np.float32)) for _ in "kv"]
    lengths = walled(rng.integers(500, capacity + 1, rows).astype(np.int32))

    def run(threads, fill):
        out = fresh(q.shape, q.dtype, fill)
        caches = [cache(each, scale) for each, scale in zip(codes, scales, strict=True)]
        core.attention_decode(
            operand(q), *caches, rows, at(lengths), at(source), per_key, None, at(out),
            [rows, HEADS, 1, capacity, WIDTH], False, 0.25, PER_TOKEN, 0.0, threads,
        )  # fmt: skip
        return [out]

    return run


@case
def attention_over_caches(core, rng):
    return decode(core, rng, None, False)


@case
def attention_of_rows_that_share_a_cache(core, rng):
    return decode(core, rng, walled(np.array([0, 0, 0, 0, 5, 5, 2, 5], np.int32)), False)


@case
def attention_with_a_cache_per_key(core, rng):
    return decode(core, rng, walled(rng.integers(0, 8, (8, 700)).astype(np.int32)), True)


@case
def writing_into_caches(core, rng):
    rows, tokens, capacity = 4, 150, 200
    k, v = (floats(rng, (rows, 8, tokens, WIDTH)) for _ in "kv")
    position = walled(np.array([3, 0, 50, 7], np.int32))

    def run(threads, fill):
        codes = [full((rows, 8, capacity, WIDTH), 5, np.int8) for _ in "kv"]
        scales = [full((rows, 8, capacity), 5, np.float32) for _ in "kv"]
        where = [cache(each, scale) for each, scale in zip(codes, scales, strict=True)]
        sizes = [rows, 8, tokens, WIDTH]
        core.cache_write(*map(operand, (k, v)), *where, rows, capacity, at(position), sizes, PER_TOKEN, 0.0, threads)
        return codes + scales

    return run


# ---- a decode step, and what follows it --------------------------------------------------------------------------


@case
def a_step(core, rng):
    """Six tokens of a decoder of one layer, written down once: every kind of call that a step has."""
    rows, k, n, capacity = 8, HEADS * WIDTH, 17000, 8
    table, qkv, out, head = (packed(rng, each, k) for each in (n, 3 * k, k, n))
    places, norms, bias = floats(rng, (capacity + 2, k)), floats(rng, (2, k)), floats(rng, n)
    tokens = rng.integers(0, n, (6, rows))

    def run(threads, fill):
        step = core.CpuStep()
        row_tokens, small = full(rows, 0, np.int64), [full(rows, 0, np.int32) for _ in range(2)]
        ancestors = full((rows, capacity), 0, np.int32)
        step.set_rows(rows, capacity, at(row_tokens), *map(at, small), at(ancestors))
        x, y, back, attended = (fresh((rows, k), np.float32, fill) for _ in range(4))
        q8, scale = fresh((rows, k), np.int8, fill), fresh(rows, np.float32, fill)
        three, logits = fresh((3, rows, k), np.float32, fill), fresh((rows, n), np.float32, fill)
        codes = [full((rows, HEADS, capacity, WIDTH), 0, np.int8) for _ in "kv"]
        scales = [full((rows, HEADS, capacity), 0, np.float32) for _ in "kv"]
        best = fresh(rows, np.int64, fill)
        core.cpu_embedding(
            ids=at(row_tokens), ids32=False, count=rows, qweight=at(table[0]), weight_scale=at(table[1]),
            tensor_scale=False, group_mult=0, rows=n, k=k, bits=4, four_level=False, group_size=0, embed_scale=1.0,
            position=0, position_dtype=FP32, position_stride=0, y=at(x), y_dtype=FP32, threads=1, step=step,
        )  # fmt: skip
        core.add_position(
            x=at(x), dtype=FP32, rows=rows, k=k, factor=8.0, table=at(places), table_rows=capacity + 2,
            position=at(small[0]), offset=2, step=step,
        )  # fmt: skip
        given = [(at(x), FP32, k), None, (at(norms[0]), FP32, 1), (at(norms[1]), FP32, 1)]
        core.norm_quantize(*given, 1e-5, at(y), rows, k, (PER_TOKEN, 0.0, 0.0, at(q8), at(scale), 0), 1, step)
        parts = [(at(qkv[0][i * k]), at(qkv[1][i * k :]), 0, 0, 0, at(three[i])) for i in range(3)]
        plan(core, k, 3, x_dtype=3)([k] * 3).run(rows, k, at(q8), at(scale), 0.0, 1, parts, step)
        heads = [operand(one.reshape(rows, HEADS, 1, WIDTH)) for one in three]
        where = [cache(one, of) for one, of in zip(codes, scales, strict=True)]
        sizes = [rows, HEADS, 1, WIDTH]
        core.cache_write(*heads[1:], *where, rows, capacity, at(small[0]), sizes, PER_TOKEN, 0.0, 1, step)
        core.attention_decode(
            heads[0], *where, rows, at(small[1]), at(ancestors), True, None, at(attended),
            [rows, HEADS, 1, capacity, WIDTH], False, 0.25, PER_TOKEN, 0.0, 1, step,
        )  # fmt: skip
        parts = [(at(out[0]), at(out[1]), 0, 0, at(y), at(back))]
        plan(core, k, 1)([k]).run(rows, k, at(attended), 0, 0.0, 1, parts, step)
        parts = [(at(head[0]), at(head[1]), 0, 0, 0, at(logits))]
        plan(core, k, 1)([n]).run(rows, k, at(back), 0, 0.0, 1, parts, step)
        core.finish_logits(
            x=at(logits), dtype=FP32, rows=rows, n=n, bias=at(bias), bias_dtype=FP32, rounded=True, y=at(logits),
            best=at(best), threads=1, step=step,
        )  # fmt: skip
        found = []
        for position, these in enumerate(tokens):
            given = walled(these)
            step.run(threads, at(given), position, True)
            found += [logits.copy(), best.copy()]
            ancestors[:] = ancestors[::-1].copy()  # beams that change places
        return [*found, *codes, *scales]

    return run


@case
def logits_of_16_bits(core, rng):
    rows, n = 9, 16000
    x, bias = floats(rng, (rows, n), BF16), floats(rng, n, BF16)

    def run(threads, fill):
        y, best = fresh((rows, n), np.float32, fill), fresh(rows, np.int64, fill)
        core.finish_logits(
            x=at(x), dtype=BF16, rows=rows, n=n, bias=at(bias), bias_dtype=BF16, rounded=True, y=at(y), best=at(best),
            threads=threads,
        )  # fmt: skip
        return y, best

    return run


def candidates(core, rng, n, kept):
    sources, beams = 3, 4
    scores, running = walled(np.round(floats(rng, (sources * beams, n)), 1)), floats(rng, (sources, beams))  # ties

    def run(threads, fill):
        value = fresh((sources, kept), np.float32, fill)
        beam, token = (fresh((sources, kept), np.int64, fill) for _ in range(2))
        core.beam_candidates(
            scores=at(scores), running=at(running), sources=sources, beams=beams, n=n, kept=kept, value=at(value),
            beam=at(beam), token=at(token), threads=threads,
        )  # fmt: skip
        return value, beam, token

    return run


@case
def candidates_by_a_heap(core, rng):
    return candidates(core, rng, 17000, 8)


@case
def candidates_sorted_whole(core, rng):
    return candidates(core, rng, 12000, 800)


@case
def hypotheses(core, rng):
    """Ten tokens of a search, and what they repeat: no threads, but callers."""
    sources, beams, kept, most, n = 3, 4, 8, 12, 200
    scores = -np.abs(floats(rng, (10, sources * beams, n)))

    def run(threads, fill):
        running, finished = (full((sources, beams, most), 1, np.int64) for _ in range(2))
        came_from, finished_from = (full((sources, beams, most - 1), -1, np.int32) for _ in range(2))
        sums, best = (full((sources, beams), low, np.float32) for low in (0, -1e9))
        lengths, ended = full((sources, beams), 0, np.int64), full((sources, beams), 0, np.uint8)
        may, value = full(sources, 1, np.uint8), full((sources, kept), 0, np.float32)
        beam, token = (full((sources, kept), 0, np.int64) for _ in range(2))
        parents, tokens = (full(sources * beams, 0, np.int64) for _ in range(2))
        state = core.CpuBeams(
            sources=sources, beams=beams, start=1, most=most, filling=1, end_tokens=list(range(40)),
            running=at(running), came_from=at(came_from), scores=at(sums), finished=at(finished),
            finished_from=at(finished_from), finished_scores=at(best), finished_lengths=at(lengths),
            is_finished=at(ended), improvable=at(may),
        )  # fmt: skip
        for length, given in enumerate(scores, 1):
            of = walled(given.copy())
            core.ban_repeats(
                tokens=at(running), rows=sources * beams, row_stride=most, length=length, size=2, scores=at(of), n=n
            )
            core.beam_candidates(
                scores=at(of), running=at(sums), sources=sources, beams=beams, n=n, kept=kept, value=at(value),
                beam=at(beam), token=at(token), threads=threads,
            )  # fmt: skip
            found = [at(each) for each in (value, beam, token)]
            state.extend(length, kept, *found, 0, False, length, 10.0, False, at(parents), at(tokens))
        top, index = full(40, 0, np.float32), full(40, 0, np.int64)
        everything = walled(scores)
        core.top_k(x=at(everything), n=scores.size, k=40, value=at(top), index=at(index))
        small = np.concatenate([lengths.ravel(), ended.ravel(), may, parents, tokens])
        return running, finished, came_from, finished_from, sums, best, small, top, index

    return run


def encoder(core, rng, post_norm):
    """A layer of an encoder in one call, which takes three sequences in two parts; and its calls made one by one."""
    batch, tokens, k, inner = 3, 190, HEADS * WIDTH, 200
    m = batch * tokens
    x, norms = floats(rng, (m, k)), floats(rng, (4, k))
    mask = walled(rng.integers(0, 4, (batch, 1, 1, tokens)) > 0)
    sizes = [("qkv", 3, k, k, FP32 if post_norm else 3), ("out", 1, k, k, FP32), ("up", 1, k, inner, 3),
             ("down", 1, inner, k, FP32)]  # fmt: skip
    weights = {name: [packed(rng, n, of) for _ in range(parts)] for name, parts, of, n, _ in sizes}
    plans = {name: plan(core, of, parts, x_dtype=dtype)([n] * parts) for name, parts, of, n, dtype in sizes}
    layer = core.CpuEncoderLayer(
        post_norm=post_norm,
        norms=[(at(norms[i]), FP32, at(norms[i + 2]), FP32, 1e-5, PER_TOKEN, 0.0, 0.0) for i in (0, 1)],
        linears=[(plans[name], 0.0, [(at(w), at(s), 0, 0, 0, 0) for w, s in weights[name]]) for name in plans],
        heads=HEADS, head_dim=WIDTH, softmax_scale=0.25, mode=PER_TOKEN, clip=0.0,
    )  # fmt: skip

    def seen():  # the mask has to live as long as its address
        return at(mask), 0, [tokens, 0, 0, 1]

    def one_by_one(threads):
        def norm(which, given):
            y, q8, scale = np.empty_like(x), np.empty((m, k), np.int8), np.empty(m, np.float32)
            vectors = (at(norms[which]), FP32, 1), (at(norms[which + 2]), FP32, 1)
            codes = (PER_TOKEN, 0.0, 0.0, at(q8), at(scale), 0)
            core.norm_quantize((at(given), FP32, k), None, *vectors, 1e-5, at(y), m, k, codes, threads)
            return y, q8, scale

        def linears(name, given, scale=None, residual=None):
            width = inner if name == "up" else k
            found = [np.empty((m, width), np.float32) for _ in weights[name]]
            parts = [(at(w), at(s), 0, 0, at(residual), at(y)) for (w, s), y in zip(weights[name], found, strict=True)]
            plans[name].run(m, given.shape[1], at(given), at(scale), 0.0, threads, parts)
            return found

        def attend(three, residual):
            heads = [each.reshape(batch, tokens, HEADS, WIDTH).transpose(0, 2, 1, 3) for each in three]
            out, shape = np.empty((batch, HEADS, tokens, WIDTH), np.float32), [batch, HEADS, tokens, tokens, WIDTH]
            core.attention(*map(operand, heads), seen(), None, at(out), shape, False, 0.25, PER_TOKEN, 0.0, threads)
            return linears("out", np.ascontiguousarray(out.transpose(0, 2, 1, 3)).reshape(m, k), residual=residual)[0]

        _, *coded = (None, x) if post_norm else norm(0, x)
        between = attend(linears("qkv", *coded), x)
        normed, *coded = norm(0 if post_norm else 1, between)
        between = normed if post_norm else between
        y = linears("down", linears("up", *coded)[0], residual=between)[0]
        return norm(1, y)[0] if post_norm else y

    def run(threads, fill):
        y = fresh((m, k), np.float32, fill)
        layer.run(at(x), at(y), batch, tokens, seen(), None, threads)
        assert y.tobytes() == one_by_one(threads).tobytes(), "not what its calls give"
        return [y]

    return run


CASES["encoder_of_norms_before"] = functools.partial(encoder, post_norm=False)
CASES["encoder_of_norms_behind"] = functools.partial(encoder, post_norm=True)


# ---- what is asked of each ---------------------------------------------------------------------------------------


def raw(results):
    return [np.ascontiguousarray(each).tobytes() for each in results]


def made(core, name):
    return CASES[name](core, np.random.default_rng(sum(name.encode())))


def check_walls(core, name, want):
    """Between pages that cannot be read a byte too many is a fault, which ends the program."""
    global WALL
    for behind in (True, False):
        WALL = behind
        assert raw(made(core, name)(1, 0x3C)) == want, f"{name}: beside a wall"
    WALL = None


def check(core, name):
    """One thread, between walls, then several, then several callers; how many results were compared."""
    run = made(core, name)
    want = raw(run(1, 0xA5))
    assert all(len(set(each)) > 1 for each in want), f"{name}: a result is all one byte"
    check_walls(core, name, want)
    for threads in THREADS:
        assert raw(run(threads, 0x5A)) == want, f"{name}: {threads} threads"
    barrier, wrong = threading.Barrier(CALLERS), []

    def call(number):
        barrier.wait()
        for threads in (3, 1 + number % 2):
            if raw(run(threads, number)) != want:
                wrong.append(number)

    callers = [threading.Thread(target=call, args=(number,)) for number in range(CALLERS)]
    for each in callers:
        each.start()
    for each in callers:
        each.join()
    assert not wrong, f"{name}: callers {wrong}"
    return want


if __name__ == "__main__":
    the_core = load(sys.argv[1])
    assert the_core.cpu_threads() == os.environ.get("EXPECTED_THREADS", "own pool")
    digest, counts = hashlib.sha256(), {}
    for name in sys.argv[2:] or CASES:
        found = check(the_core, name)
        counts[name] = len(found) * (len(THREADS) + 2 * CALLERS)
        for each in itertools.chain([name.encode()], found):
            digest.update(each)
    print(json.dumps({"isa": the_core.cpu_isa(), "digest": digest.hexdigest(), **counts}))
