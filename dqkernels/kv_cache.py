"""The one op that writes into its arguments: new keys and values, quantized, into the int8 caches of decoding.

`ops.qattention_decode` reads what this wrote, with the bits that `ops.qattention` gives the same tokens. Calls and
refusals, no arithmetic.
"""

from __future__ import annotations

import torch

from dqkernels import autocast, backends, checks

_LIB = torch.library.Library("dqkernels", "FRAGMENT")

# Not `mode`: torch hands the arguments of an op that writes to its functionalization by name, where that one is taken.
SCHEMAS = {
    "quantize_into_cache": "(Tensor k, Tensor v, Tensor(a!) k_cache, Tensor(b!) k_scale, Tensor(c!) v_cache, "
    'Tensor(d!) v_scale, Tensor? position, str act_mode="per_token", float? clip=None, str backend="auto", '
    "bool strict=False) -> ()"
}
_LIB.define("quantize_into_cache" + SCHEMAS["quantize_into_cache"])


def _quantize_into_cache(
    k, v, k_cache, k_scale, v_cache, v_scale, position, act_mode="per_token", clip=None, backend="auto", strict=False
):
    checks.check_cache_write(k, v, k_cache, k_scale, v_cache, v_scale, position, act_mode, clip)
    if torch.is_grad_enabled() and (k.requires_grad or v.requires_grad):
        raise RuntimeError(
            "dqkernels::quantize_into_cache has no gradient: what a cache holds is codes. Run it under torch.no_grad()"
        )
    facts = {"mode": act_mode, "head_dim": k.shape[-1]}
    choice = backends.choose("quantize_into_cache", k.device.type, backend, strict, **facts)
    facts = {"mode": act_mode, "clip": clip}
    if choice.backend == "eager":  # plain torch around a quantizer, which the CPU has a kernel for
        quantizer = backends.choose("quantize_activation", k.device.type, backend, mode=act_mode)
        facts["quantize"] = quantizer.module.quantize_activation
    choice.module.quantize_into_cache(k, v, k_cache, k_scale, v_cache, v_scale, position, **facts)


_LIB.impl("quantize_into_cache", _quantize_into_cache, "CompositeExplicitAutograd")


@torch.library.register_fake("dqkernels::quantize_into_cache", lib=_LIB)
def _(
    k, v, k_cache, k_scale, v_cache, v_scale, position, act_mode="per_token", clip=None, backend="auto", strict=False
):
    return None


autocast.shield(_LIB, SCHEMAS)

#: k, v float [rows, heads, tokens, head_dim] -> codes and scales in caches int8 [caches >= rows, heads, capacity,
#: head_dim] and fp32 [caches, heads, capacity], of row r into cache r from position[r] (int32 [rows]) on, or from 0
#: where position is None. See `reference.quantize_into_cache`.
quantize_into_cache = torch.ops.dqkernels.quantize_into_cache.default
