"""libsparc3 from any Python, without torch: python with_ctypes.py LIBRARY (libsparc3.so in get_library_dir())."""

import ctypes
import sys

library = ctypes.CDLL(sys.argv[1])
library.sparc3_strerror.restype = ctypes.c_char_p

# Prune the two lowest of four scores in each row: one bit a score, 1 = kept.
scores = (ctypes.c_float * 8)(3, 1, 2, 4, 8, 5, 7, 6)
bits = (ctypes.c_uint8 * 1)()
status = library.sparc3_select_nm(0, scores, ctypes.c_size_t(8), 2, 4, bits, 1)
if status:
    sys.exit(library.sparc3_strerror(status).decode())
print(f"{bits[0]:08b}")
