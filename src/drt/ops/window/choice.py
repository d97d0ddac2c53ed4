"""Which backend serves a call: those there are, and the order in which they are tried."""

from drt.ops.window.banded import DECODE_QUERIES, banded_window_attention
from drt.ops.window.call import Backend, Call
from drt.ops.window.flex import flex_unavailable, flex_window_attention
from drt.ops.window.reference import reference_window_attention
from drt.ops.window.varlen import varlen_unavailable, varlen_window_attention

BACKENDS: dict[str, Backend] = {
    "banded": Backend(banded_window_attention, lambda call: None),
    "flex": Backend(flex_window_attention, flex_unavailable),
    "reference": Backend(reference_window_attention, lambda call: None),
    "varlen": Backend(varlen_window_attention, varlen_unavailable),
}


def preferred(call: Call) -> tuple[str, ...]:
    """The backends for a call that names none, best first; the last one serves every call.

    The order on CUDA is reasoned and not yet measured on a GPU; what settles it is
    `python benchmarks/window.py --device cuda`.
    """
    if call.query.device.type != "cuda":
        return ("banded",)
    if call.wants_grad:
        # Training repeats its shapes, so compiling a kernel for them is paid once.
        return ("varlen", "flex", "banded")
    if call.query.shape[1] <= DECODE_QUERIES:
        # A step of decoding is one small product over all keys: few launches, nothing to pack.
        return ("banded",)
    # Lengths of prompts do not repeat: nothing that compiles.
    return ("varlen", "banded")


def choose(name: str | None, call: Call) -> Backend:
    """The backend of this name, or the first of `preferred` that is available.

    Raises:
        ValueError: if there is none of this name.
        RuntimeError: if it cannot serve the call.
    """
    if name is None:
        found = (BACKENDS[other] for other in preferred(call))
        return next(backend for backend in found if backend.unavailable(call) is None)
    if name not in BACKENDS:
        raise ValueError(f"backend {name!r} does not exist; there are {sorted(BACKENDS)}")
    reason = BACKENDS[name].unavailable(call)
    if reason is not None:
        raise RuntimeError(f"backend {name!r} is unavailable: {reason}")
    return BACKENDS[name]
