"""Activations of a gate, and slopes: one element at a time. A softmax is in route.py.

Every exponential is that of a number <= 0, taken here with explicit fused multiply-adds: the fast
exponential of a GPU loses a bit for every doubling of its argument, and this one has the same bits
on every device.
"""

from __future__ import annotations

import triton
import triton.language as tl

NONE = tl.constexpr(0)  # activations, the places in pmod_ops.route.ACTIVATIONS
TANH = tl.constexpr(1)
SIGMOID = tl.constexpr(2)
SOFTMAX = tl.constexpr(3)

_LEAST = tl.constexpr(-87.0)  # exp of less is taken for 0: below the normal numbers
_LOG2_E = tl.constexpr(1.4426950408889634)
_LN2_HIGH = tl.constexpr(0.693359375)  # few bits: its product with an exponent is exact
_LN2_LOW = tl.constexpr(-0.00021219444005469057)


@triton.jit
def _exp_parts(x):
    """(p, s) with exp(x) = s * (1 + p), s a power of two and |p| < 0.42; of x in [-87, 0] or NaN.

    p is the minimax polynomial of exp(r) - 1 on half a ln 2 either side of 0: r + r^2 q(r), to
    3e-8 r^2.
    """
    power = tl.floor(tl.fma(x, _LOG2_E, 0.5))
    power = tl.where(x == x, power, 0.0)
    r = tl.fma(power, -_LN2_HIGH, x)
    r = tl.fma(power, -_LN2_LOW, r)
    q = tl.fma(r, 0.00019891030387952924, 0.0013933685841038823)
    q = tl.fma(q, r, 0.00833331048488617)
    q = tl.fma(q, r, 0.041666463017463684)
    q = tl.fma(q, r, 0.1666666716337204)
    q = tl.fma(q, r, 0.5)
    scale = ((power.to(tl.int32) + 127) << 23).to(tl.float32, bitcast=True)
    return tl.fma(r * r, q, r), scale


@triton.jit
def exp_of_negative(x):
    """exp(x) of x <= 0; 0 instead of a denormal number."""
    p, scale = _exp_parts(tl.where(x < _LEAST, _LEAST, x))
    return tl.where(x < _LEAST, 0.0, tl.fma(scale, p, scale))


@triton.jit
def tanh(z):
    """From m = exp(-2|z|) - 1, which does not cancel where z is near 0: |tanh z| = -m / (2 + m)."""
    x = -2.0 * tl.abs(z)
    p, scale = _exp_parts(tl.where(x < _LEAST, _LEAST, x))
    m = tl.fma(scale, p, scale - 1.0)
    divisor = 2.0 + m
    lost = m - (divisor - 2.0)  # to rounding the divisor
    size = tl.div_rn(-m, divisor)
    remainder = tl.fma(-size, lost, tl.fma(-size, divisor, -m))
    size += tl.div_rn(remainder, divisor)
    return tl.where(z < 0, -size, size)


@triton.jit
def sigmoid(z):
    """1 / (1 + exp(-z))."""
    e = exp_of_negative(-tl.abs(z))
    return tl.div_rn(tl.where(z < 0, e, 1.0), 1.0 + e)


@triton.jit
def activate(logit, ACTIVATION: tl.constexpr):
    """Every activation but softmax."""
    if ACTIVATION == TANH:
        return tanh(logit)
    elif ACTIVATION == SIGMOID:
        return sigmoid(logit)
    else:
        return logit


@triton.jit
def gate_slope(logit, scale, ACTIVATION: tl.constexpr):
    """D gate / d logit; not of softmax.

    From e = exp(-|z|), as 1 - tanh^2 would cancel: that of the logistic function is
    e / (1 + e)^2, and tanh(z) = 2 logistic(2z) - 1.
    """
    if ACTIVATION == TANH:
        e = exp_of_negative(-2.0 * tl.abs(logit))
        return scale * tl.div_rn(4.0 * e, (1.0 + e) * (1.0 + e))
    elif ACTIVATION == SIGMOID:
        e = exp_of_negative(-tl.abs(logit))
        return scale * tl.div_rn(e, (1.0 + e) * (1.0 + e))
    else:
        return scale + tl.zeros_like(logit)
