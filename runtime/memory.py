"""Memory that nothing uses any more goes back to the system.

give_back()     # between two large steps
"""

import ctypes
from functools import cache


def give_back():
    """Let glibc return the memory that freed tensors leave in its heaps; with another C library nothing happens.

    glibc gives a block of less than 32 MB back only from the end of a heap. After the measurement of a network at
    224x224 pixels it keeps 1 GB.
    """
    trim = trim_of_glibc()
    if trim is not None:
        trim(0)


@cache
def trim_of_glibc():
    """The function `malloc_trim`, or None without glibc."""
    try:
        return ctypes.CDLL(None).malloc_trim
    except (AttributeError, OSError, TypeError):  # another C library; on Windows there is no library None
        return None
