"""Rules for Fourier transforms and complex numbers."""

from __future__ import annotations

from torch.fx import Node

from intrafuse.graph.rules.pointwise import binary, unary
from intrafuse.graph.rules.registry import Axes, Scope, operator_name, register

ONE = ["fft_fft", "fft_ifft", "fft_rfft", "fft_irfft", "fft_hfft", "fft_ihfft"]
KINDS = ("fft", "ifft", "rfft", "irfft")
SEVERAL = [f"fft_{kind}{n}" for kind in KINDS for n in ("2", "n")]

register("real", "imag", "conj", "_conj", "conj_physical", "resolve_conj", "angle", "sgn")(unary)
register("complex", "polar")(binary)


@register(*ONE, *SEVERAL, "fft_fftshift", "fft_ifftshift")
def transform(scope: Scope, node: Node) -> Axes:
    """Transform along dimensions and lock them; the other dimensions pass."""
    args = scope.arguments(node)
    x, shape = scope.axes(args.get("self") or args["input"]), scope.shape(node)
    dims = args.get("dim")
    if dims is None:
        dims = range(-len(args["s"]), 0) if args.get("s") else range(len(x))
    chosen = {dim % len(x) for dim in ([dims] if isinstance(dims, int) else dims)}
    for dim in chosen:
        scope.table.lock(x[dim], f"{operator_name(node)} is taken over it")
    return [scope.fixed(shape[i], "frequencies") if i in chosen else t for i, t in enumerate(x)]


@register("view_as_complex")
def view_as_complex(scope: Scope, node: Node) -> Axes:
    """Read pairs along the last dimension as complex numbers."""
    *x, pair = scope.axes(node.all_input_nodes[0])
    scope.table.lock(pair, "the two parts of a complex number")
    return [*x]


@register("view_as_real")
def view_as_real(scope: Scope, node: Node) -> Axes:
    """Put the two parts of complex numbers along a new last dimension."""
    x = scope.axes(node.all_input_nodes[0])
    return [*x, scope.fixed(2, "the two parts of a complex number")]
