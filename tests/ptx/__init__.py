"""An interpreter of PTX: runs on the CPU what the compiler emits for a kernel, with checks and counters.

    counters = run(compile_ptx(source), "kernel", grid=(4, 1, 1), block=(128, 1, 1), args=[array, np.int32(5)])

`run` raises `PtxError` for whatever a device would not report: accesses out of bounds or misaligned, memory and
registers that nobody wrote, cp.async data before it has arrived, races between warps, barriers in divergent code,
deadlocks. An instruction that it does not know is an error, never a guess.
"""

from tests.ptx.counters import Counters, LineCount
from tests.ptx.errors import PtxError
from tests.ptx.flow import main_loop
from tests.ptx.launch import Struct, run

__all__ = ["Counters", "LineCount", "PtxError", "Struct", "main_loop", "run"]
