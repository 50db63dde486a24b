"""Memory between two pages that cannot be read or written: one byte too many is a fault (SIGSEGV), not a wrong number.

A fault ends the process, so whoever uses this runs in a child process. Imports no torch at the top level.
"""

import ctypes
import mmap

import numpy as np

_libc = ctypes.CDLL(None, use_errno=True)
_libc.mprotect.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)


def guarded(array, at_end):
    """A copy of `array` whose end touches an unreadable page after it, or whose start touches one before."""
    page = mmap.PAGESIZE
    inner = -(-max(array.nbytes, 1) // page) * page
    memory = mmap.mmap(-1, inner + 2 * page)
    base = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    for wall in (base, base + page + inner):
        if _libc.mprotect(wall, page, 0):
            raise OSError(ctypes.get_errno(), "mprotect")
    offset = page + (inner - array.nbytes if at_end else 0)
    copy = np.frombuffer(memory, array.dtype, array.size, offset).reshape(array.shape)
    copy[...] = array
    return copy


def guarded_tensor(tensor, at_end):
    """The same for a CPU tensor of any dtype; the copy is contiguous. An empty one is returned as it is."""
    import torch

    if not tensor.numel():
        return tensor
    raw = tensor.contiguous().reshape(-1).view(torch.uint8).numpy()
    return torch.from_numpy(guarded(raw, at_end)).view(tensor.dtype).view(tensor.shape)
