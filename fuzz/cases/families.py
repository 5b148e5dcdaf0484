"""Families: the kinds of queries, keys, values, gates, betas and states that a case can name.

A family is a function from a case's noise to float32 arrays; `inputs.py` rounds them to bf16 (fp32 for A_log, dt_bias
and fp32 states). Rows are tokens, all sequences one after another. Only exact or correctly rounded arithmetic is used
(+, *, powers of two, selection), so a family has the same bits everywhere.

Magnitudes are chosen so that the exact result is finite and normal in fp32 for every combination of families. Values
and states up to 1e30 are legal, and results are as large as they are. The tiny families multiply to no less than 1e-27.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from fuzz.cases import relay
from fuzz.cases.noise import Noise

HEAD_DIM = 128
"""K and V, the same for every case."""

INFINITY = np.float32(np.inf)


@dataclass(frozen=True)
class Gate:
    """g float32 `[tokens, H, K]` (before activation), A_log float32 `[H]`, dt_bias float32 `[H, K]`."""

    g: np.ndarray
    A_log: np.ndarray
    dt_bias: np.ndarray


# Rows that queries and keys share. `name` keeps their streams apart.


def _normal(noise: Noise, name: str) -> np.ndarray:
    return noise.normal(name, HEAD_DIM)


def _base(noise: Noise, name: str) -> np.ndarray:
    """One normal row a sequence and head, repeated for its tokens."""
    return noise.per_sequence().normal(name + ".base", HEAD_DIM)[noise.sequence]


def _zero_rows(noise: Noise, name: str) -> np.ndarray:
    """One row in four is zero."""
    return np.where(noise.integers(name + ".zero", 1, 4) == 0, np.float32(0), _normal(noise, name))


def _one_hot(noise: Noise, name: str) -> np.ndarray:
    """A single 1 in a channel of the token's own."""
    channel = noise.integers(name + ".channel", 1, HEAD_DIM)
    return (np.arange(HEAD_DIM) == channel).astype(np.float32)


def _power_of_two(noise: Noise, name: str, exponent: int) -> np.ndarray:
    return np.ldexp(_normal(noise, name), exponent)


def _mixed_norms(noise: Noise, name: str) -> np.ndarray:
    """Norms from 2^-30 to 2^30, one a token."""
    return np.ldexp(_normal(noise, name), noise.integers(name + ".exponent", 1, 61).astype(np.int32) - 30)


def _near_epsilon(noise: Noise, name: str) -> np.ndarray:
    """Sums of squares from about 1e-8 to 1e-3: the 1e-6 under the root decides some, changes the rest a little."""
    return np.ldexp(_normal(noise, name), noise.integers(name + ".exponent", 1, 9).astype(np.int32) - 17)


# Keys.


def _repeated_keys(noise: Noise) -> np.ndarray:
    """A block of tokens over and over; its length is drawn from the seed."""
    period = noise.choice("keys.period", (2, 3, 5, 8, 16, 17, 48, 64))
    return _normal(noise, "keys")[noise.start + noise.position % period]


def _opposite_keys(noise: Noise) -> np.ndarray:
    """One key a sequence and head, or its negative."""
    sign = 1 - 2 * noise.integers("keys.sign", 1, 2).astype(np.float32)
    return sign * _base(noise, "keys")


KEYS: dict[str, Callable[[Noise], np.ndarray]] = {
    "random": lambda noise: _normal(noise, "keys"),
    "equal": lambda noise: _base(noise, "keys"),
    "collinear": lambda noise: 3 * _base(noise, "keys") + _normal(noise, "keys"),
    "collinear_strong": lambda noise: 10 * _base(noise, "keys") + _normal(noise, "keys"),
    "opposite": _opposite_keys,
    "repeated": _repeated_keys,
    "zero_rows": lambda noise: _zero_rows(noise, "keys"),
    "one_hot": lambda noise: _one_hot(noise, "keys"),
    "huge": lambda noise: _power_of_two(noise, "keys", 40),
    "tiny": lambda noise: _power_of_two(noise, "keys", -30),
    "near_epsilon": lambda noise: _near_epsilon(noise, "keys"),
    "mixed_norms": lambda noise: _mixed_norms(noise, "keys"),
    "relay": lambda noise: relay.keys(noise, HEAD_DIM),
}
"""float32 `[tokens, H, K]`."""

QUERIES: dict[str, Callable[[Noise, np.ndarray], np.ndarray]] = {
    "random": lambda noise, keys: _normal(noise, "queries"),
    "equal_to_keys": lambda noise, keys: keys,
    "zero_rows": lambda noise, keys: _zero_rows(noise, "queries"),
    "one_hot": lambda noise, keys: _one_hot(noise, "queries"),
    "huge": lambda noise, keys: _power_of_two(noise, "queries", 40),
    "tiny": lambda noise, keys: _power_of_two(noise, "queries", -30),
    "near_epsilon": lambda noise, keys: _near_epsilon(noise, "queries"),
    "mixed_norms": lambda noise, keys: _mixed_norms(noise, "queries"),
}
"""From the noise and the keys, float32 `[tokens, H, K]`."""


# Values.


def _spiky_values(noise: Noise) -> np.ndarray:
    """One token in sixteen is 1e4 times larger than the others."""
    spike = np.where(noise.integers("values.spike", 1, 16) == 0, np.float32(1e4), np.float32(1))
    return spike * _normal(noise, "values")


def _early_values(noise: Noise) -> np.ndarray:
    """The first 16 tokens of a sequence are ordinary, the others 2^12 times smaller: what follows is mostly history."""
    exponent = np.where(noise.position < 16, 0, -12).astype(np.int32)[:, None, None]
    return np.ldexp(_normal(noise, "values"), exponent)


def _powers_of_two(noise: Noise) -> np.ndarray:
    sign = 1 - 2 * noise.integers("values.sign", HEAD_DIM, 2).astype(np.float32)
    return np.ldexp(sign, noise.integers("values.exponent", HEAD_DIM, 17).astype(np.int32) - 8)


VALUES: dict[str, Callable[[Noise], np.ndarray]] = {
    "random": lambda noise: _normal(noise, "values"),
    "zero": lambda noise: np.zeros((sum(noise.rows), noise.heads, HEAD_DIM), dtype=np.float32),
    "one_hot": lambda noise: _one_hot(noise, "values"),
    "powers_of_two": _powers_of_two,
    "large": lambda noise: np.float32(1e4) * _normal(noise, "values"),
    "huge": lambda noise: np.float32(1e30) * _normal(noise, "values"),
    "tiny": lambda noise: _power_of_two(noise, "values", -40),
    "spiky": _spiky_values,
    "early": _early_values,
}
"""float32 `[tokens, H, V]`."""


# Gates. The logit that decides is exp(A_log) * (g + dt_bias).


def _gate(noise: Noise, g: np.ndarray, A_log: np.ndarray | None = None, dt_bias: np.ndarray | None = None) -> Gate:
    """A_log and dt_bias are uniform in [0, 1) unless given, as in the published comparisons."""
    once = noise.per_head()
    return Gate(
        g=g,
        A_log=once.uniform("A_log", 1)[0, :, 0] if A_log is None else A_log,
        dt_bias=once.uniform("dt_bias", HEAD_DIM)[0] if dt_bias is None else dt_bias,
    )


def _shifted_gates(shift: float) -> Callable[[Noise], Gate]:
    return lambda noise: _gate(noise, _normal(noise, "gates") + np.float32(shift))


def _constant_gates(value: float) -> Callable[[Noise], Gate]:
    return lambda noise: _gate(noise, np.full((sum(noise.rows), noise.heads, HEAD_DIM), value, dtype=np.float32))


def _published_equal_gates(noise: Noise) -> Gate:
    """g = -20, A_log = dt_bias = 0: practically no decay."""
    g = np.full((sum(noise.rows), noise.heads, HEAD_DIM), -20, dtype=np.float32)
    return _gate(noise, g, np.zeros(noise.heads, np.float32), np.zeros((noise.heads, HEAD_DIM), np.float32))


def _exact_bounds_gates(noise: Noise) -> Gate:
    """Each element -inf (no decay) or +inf (full decay), full decay one time in eight."""
    closed = noise.integers("gates.closed", HEAD_DIM, 8) == 0
    return _gate(noise, np.where(closed, INFINITY, -INFINITY))


def _mixed_channel_gates(noise: Noise) -> Gate:
    """Each channel of a head has a level of its own, from open to closed."""
    level = np.array([-20, -6, 0, 6, 20], dtype=np.float32)[noise.per_head().integers("gates.level", HEAD_DIM, 5)]
    return _gate(noise, _normal(noise, "gates") + level)


def _single_channel(noise: Noise) -> np.ndarray:
    """bool `[tokens, H, K]`: one channel a sequence and head."""
    channel = noise.per_sequence().integers("gates.channel", 1, HEAD_DIM)[noise.sequence]
    return np.arange(HEAD_DIM) == channel


def _one_channel_gates(noise: Noise) -> Gate:
    """One channel alone decays, by nearly the bound."""
    return _gate(noise, np.where(_single_channel(noise), _normal(noise, "gates") + 4, np.float32(-100)))


def _all_but_one_channel_gates(noise: Noise) -> Gate:
    """One channel alone keeps its state; all the others lose it at the bound."""
    return _gate(noise, np.where(_single_channel(noise), np.float32(-100), np.float32(100)))


def _slow_channel_gates(noise: Noise) -> Gate:
    """One channel decays slowly, all others fast, none at a bound: the history is in one channel of 128."""
    normal = _normal(noise, "gates")
    return _gate(noise, np.where(_single_channel(noise), normal - 9, normal + 2))


def _switching_gates(noise: Noise) -> Gate:
    """Open for some tokens, closed for as many, each head with a phase of its own; the run length is from the seed."""
    run = noise.choice("gates.run", (1, 3, 8, 16, 17, 40))
    phase = noise.per_head().integers("gates.phase", 1, 2 * run)
    closed = (noise.position[:, None, None] + phase) // run % 2 == 1
    return _gate(noise, np.where(closed, np.float32(20), np.float32(-20)) + _normal(noise, "gates"))


def _reset_gates(noise: Noise) -> Gate:
    """Weak decay, and one token in thirty-two at which every channel decays at the bound."""
    closed = noise.integers("gates.closed", 1, 32) == 0
    return _gate(noise, np.where(closed, np.float32(100), _normal(noise, "gates") - 6))


def _steep_gates(noise: Noise) -> Gate:
    """Rates exp(A_log) from 55 to 3000: the gate is a step of g + dt_bias, which is near zero here."""
    return _gate(noise, _normal(noise, "gates"), A_log=4 + 4 * noise.per_head().uniform("A_log", 1)[0, :, 0])


def _flat_gates(noise: Noise) -> Gate:
    """Rates near exp(-20): half the bound in every channel, whatever g is."""
    return _gate(noise, _normal(noise, "gates"), A_log=noise.per_head().uniform("A_log", 1)[0, :, 0] - 20)


def _signed_gates(noise: Noise) -> Gate:
    """A_log and dt_bias of both signs: rates from 2e-4 to 5000, biases from -4 to 4."""
    once = noise.per_head()
    A_log, dt_bias = 2 * once.normal("A_log", 1)[0, :, 0], once.normal("dt_bias", HEAD_DIM)[0]
    return _gate(noise, _normal(noise, "gates"), A_log, dt_bias)


def _cancelling_gates(noise: Noise) -> Gate:
    """g near -64 and dt_bias near 64: rounding their sum to bf16 would lose the gate."""
    return _gate(noise, _normal(noise, "gates") - 64, dt_bias=64 + noise.per_head().uniform("dt_bias", HEAD_DIM)[0])


GATES: dict[str, Callable[[Noise], Gate]] = {
    "centred": _shifted_gates(0),
    "weak": _shifted_gates(-6),
    "weak_8": _shifted_gates(-8),
    "weak_12": _shifted_gates(-12),
    "equal": _published_equal_gates,
    "saturated_open": _shifted_gates(-100),
    "saturated_closed": _shifted_gates(100),
    "minus_infinity": _constant_gates(-np.inf),
    "plus_infinity": _constant_gates(np.inf),
    "exact_bounds": _exact_bounds_gates,
    "mixed_channels": _mixed_channel_gates,
    "one_channel": _one_channel_gates,
    "all_but_one_channel": _all_but_one_channel_gates,
    "switching": _switching_gates,
    "resets": _reset_gates,
    "steep": _steep_gates,
    "flat": _flat_gates,
    "signed": _signed_gates,
    "cancelling": _cancelling_gates,
    "relay": lambda noise: _gate(noise, relay.gates(noise, HEAD_DIM)),
    "slow_channel": _slow_channel_gates,
}


# Betas: logits, float32 [tokens, H].


def _shifted_betas(shift: float) -> Callable[[Noise], np.ndarray]:
    return lambda noise: noise.normal("betas", 1)[..., 0] + np.float32(shift)


def _constant_betas(value: float) -> Callable[[Noise], np.ndarray]:
    return lambda noise: np.full((sum(noise.rows), noise.heads), value, dtype=np.float32)


def _infinite_betas(noise: Noise) -> np.ndarray:
    """A third -inf (the token leaves the state to decay only), a third +inf (beta is 1), the rest random."""
    kind = noise.integers("betas.kind", 1, 3)[..., 0]
    return np.select([kind == 0, kind == 1], [-INFINITY, INFINITY], noise.normal("betas", 1)[..., 0])


BETAS: dict[str, Callable[[Noise], np.ndarray]] = {
    "random": _shifted_betas(0),
    "zero_logits": _constant_betas(0),
    "near_zero": _shifted_betas(-8),
    "faint": _shifted_betas(-16),
    "near_one": _shifted_betas(8),
    "plus_3": _shifted_betas(3),
    "plus_5": _shifted_betas(5),
    "constant_6": _constant_betas(6),
    "infinite": _infinite_betas,
    "minus_infinity": _constant_betas(-np.inf),
    "plus_infinity": _constant_betas(np.inf),
}
"""float32 `[tokens, H]`, before the sigmoid."""


# Initial states: float32 [N, H, V, K], drawn with one row a sequence.


def _random_states(noise: Noise, factor: float) -> np.ndarray:
    states = noise.per_sequence().normal("states", HEAD_DIM * HEAD_DIM)
    states *= np.float32(factor)
    return states.reshape(-1, noise.heads, HEAD_DIM, HEAD_DIM)


def _structured_states(noise: Noise) -> np.ndarray:
    """Entry (n, h, v, k) encodes its own index, exactly in bf16: the exponent holds k % 16, the mantissa the rest.

    Two entries that differ in n, h, v or k alone are different (up to 128 sequences and heads), and a transpose changes
    nearly all of them.
    """
    n, h, v, k = np.ogrid[: len(noise.rows), : noise.heads, :HEAD_DIM, :HEAD_DIM]
    # In bytes, as there are many: what wraps at 256 keeps its value modulo 128.
    rest = (v + 5 * (k // 16)).astype(np.uint8) + (11 * h + 37 * n).astype(np.uint8)
    mantissa = rest | np.uint8(128)
    return mantissa.astype(np.float32) * np.ldexp(np.float32(1), (k % 16 - 15).astype(np.int32))


STATES: dict[str, Callable[[Noise], np.ndarray]] = {
    "random": lambda noise: _random_states(noise, 0.1),
    "zero": lambda noise: np.zeros((len(noise.rows), noise.heads, HEAD_DIM, HEAD_DIM), dtype=np.float32),
    "structured": _structured_states,
    "large": lambda noise: _random_states(noise, 1e3),
    "huge": lambda noise: _random_states(noise, 1e30),
}
"""float32 `[N, H, V, K]`."""


PUBLISHED: dict[str, dict[str, str]] = {
    "random": {"keys": "random", "gates": "centred", "betas": "random"},
    "weak": {"keys": "random", "gates": "weak", "betas": "random"},
    "collinear": {"keys": "collinear", "gates": "weak_8", "betas": "plus_3"},
    "collinear_strong": {"keys": "collinear_strong", "gates": "weak_12", "betas": "plus_5"},
    "equal": {"keys": "equal", "gates": "equal", "betas": "constant_6"},
}
"""The five inputs on which published kernels were compared, as families; the other families are random in all."""

FAMILIES: dict[str, tuple[str, ...]] = {
    "queries": tuple(QUERIES),
    "keys": tuple(KEYS),
    "values": tuple(VALUES),
    "gates": tuple(GATES),
    "betas": tuple(BETAS),
    "states": tuple(STATES),
}
"""The family names each field of a case accepts, the plainest first."""
