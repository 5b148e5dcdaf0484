"""The error of each stage of the model: what a stage adds to inputs that are exact, predicted and measured.

A product `A B` whose operands are rounded at random errs, element by element, with the variance

    (rho_A^2 + rho_B^2)  sum_k A_ik^2 B_kj^2

because its roundings are independent: the squares of their errors add. rho is the relative RMS error of
one rounding to the format (`Rounding`). What fp32 adds is 2^-16 of bf16's, and is left out where operands are narrower.
`PREDICTIONS` has this for every stage; docs/bounds.md explains it.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch

from benchmarks.analysis.operand_formats import EXACT, operand_formats
from benchmarks.analysis.published import published_inputs
from flash_kda import model
from flash_kda.formats import bf16, tf32, two_bf16

LN2 = math.log(2)


@dataclass(frozen=True)
class RoundingError:
    """One rounding to `bits` bits of mantissa, the first one included: its RMS error, relative to the number.

    An error is spread evenly over half a unit on either side, 2^-bits of the number at most. So its RMS is
    2^-bits / sqrt(3) over a mantissa m in [1, 2); and where m is spread as in products of many numbers, by the density
    1 / (m ln 2), the root of the mean of 1 / m^2 is sqrt(3 / (8 ln 2)) = 0.736.

    `spread` is what part of that it is where units differ. The second number of a sum of two is at most half a unit of
    the first, evenly: in half of all cases it has the unit of that size, in a quarter half of it, and so on. The mean
    of the squares is (1/2) (1 + 1/8 + 1/64 ...) = 4/7 of those with the largest unit.
    """

    bits: int
    spread: float = 1.0

    @property
    def most(self) -> float:
        """RMS where every mantissa is 1."""
        return self.spread * 2.0**-self.bits / math.sqrt(3)

    @property
    def rms(self) -> float:
        return self.most * math.sqrt(3 / (8 * LN2))


ROUNDINGS: dict[Callable, RoundingError] = {
    bf16: RoundingError(8),
    tf32: RoundingError(11),
    two_bf16: RoundingError(17, math.sqrt(4 / 7)),
    torch.Tensor.float: RoundingError(24),
}


# --------------------------------------------------------------------------------------------------- the exact stages


@dataclass(frozen=True)
class Exact:
    """Every quantity of the chunk algorithm for one sequence of whole chunks, in float64: `n` chunks, `h` heads.

    Named as in `flash_kda.model`. The rows are those of `model.normalise`, so without the factors `kn` and `qn`, but
    for K~.
    """

    inputs: dict
    logit: torch.Tensor  # exp(A_log) (g + dt_bias) [n, h, 32, K]
    a: torch.Tensor  # log-decay in base 2
    decays: model.Decays
    q_rows: torch.Tensor  # [n, h, 2, 16, K]
    k_rows: torch.Tensor
    columns: torch.Tensor
    b: torch.Tensor
    kn: torch.Tensor
    L: torch.Tensor  # with the factors b and kn of its rows, as `stage_X` takes it
    M: torch.Tensor
    X: torch.Tensor
    S: torch.Tensor  # at the start of each chunk [n, h, V, K]
    W: torch.Tensor
    U: torch.Tensor
    V: torch.Tensor

    @property
    def K(self) -> torch.Tensor:
        return self.kn * (self.k_rows * self.decays.before).flatten(2, 3)

    @property
    def Xb(self) -> torch.Tensor:
        return self.X * self.b.mT

    @property
    def Q(self) -> torch.Tensor:
        return (self.q_rows * self.decays.before).flatten(2, 3)

    @property
    def Kr(self) -> torch.Tensor:
        return (self.columns * self.decays.block * self.decays.after).flatten(2, 3)

    @staticmethod
    def of(inputs: dict) -> Exact:
        """Of one sequence, a multiple of 32 tokens long. inputs: those of `published_inputs`."""
        tokens = inputs["q"].shape[1]
        chunks = model.Chunks.of([(0, tokens)], torch.device("cpu"))
        q, k, v, g, beta = (chunks.gather(inputs[name]).double() for name in ("q", "k", "v", "g", "beta"))
        logit = inputs["A_log"].double().exp()[:, None, None] * (g + inputs["dt_bias"].double()[:, None])
        a = inputs["lower_bound"] / LN2 * torch.sigmoid(logit)
        d = decays(a)
        (q, _), (k, kn) = (model.normalise(x.float()) for x in (q, k))
        q, k, kn = (x.double() for x in (q, k, kn))
        b = torch.sigmoid(beta)[..., None]
        q_rows, k_rows = (model.to_blocks(x) * d.from_start for x in (q, k))
        columns = model.to_blocks(k) * d.inverse
        with operand_formats(EXACT):
            L = b * kn * model.stage_L(k_rows, columns, d.block)
            M = model.stage_M(q_rows, columns, d.block)
        X = inverse(L, kn)
        W = (X * b.mT) @ (kn * (k_rows * d.before).flatten(2, 3))
        Kr = (columns * d.block * d.after).flatten(2, 3)
        S, U = [inputs["initial_state"].double()[0]], []
        for c in range(chunks.count):
            U.append((X[c] * b[c].mT) @ v[c] - W[c] @ S[c].mT)
            S.append(S[c] * d.chunk[c][:, None] + U[c].mT @ Kr[c])
        S, U = torch.stack(S[:-1]), torch.stack(U)
        return Exact(inputs, logit, a, d, q_rows, k_rows, columns, b, kn, L, M, X, S, W, U, v)


def decays(a: torch.Tensor) -> model.Decays:
    """`model.Decays.of` in float64."""
    G = model.to_blocks(a).cumsum(3)
    total = G[:, :, :, -1:]
    sums = total.cumsum(2)
    return model.Decays(
        from_start=G.exp2(),
        inverse=(-G).exp2(),
        block=total.exp2(),
        before=(sums - total).exp2(),
        after=(sums[:, :, -1:] - sums).exp2(),
        chunk=sums[:, :, -1, 0].exp2(),
    )


def inverse(L: torch.Tensor, kn: torch.Tensor) -> torch.Tensor:
    """(diag(1 / kn) + L)^-1 as diag(kn) (I + L diag(kn))^-1, in float64."""
    eye = torch.eye(L.shape[-1], dtype=L.dtype)
    return kn * torch.linalg.solve_triangular(eye + L * kn.mT, eye, upper=False, unitriangular=True)


# ------------------------------------------------------------------------------------------- the stages of the model

StageResult = tuple[torch.Tensor, torch.Tensor]
"""What a stage gives and what is exact, of one shape."""

Size = Callable[[Callable], float]
"""From a format to the RMS error of one rounding to it."""


def expected(format: Callable) -> float:
    return ROUNDINGS[format].rms


def at_most(format: Callable) -> float:
    """Where every mantissa is 1: no data can make a rounding larger."""
    return ROUNDINGS[format].most


def square(size: Size, *operands: str) -> float:
    """The variance that one rounding of each of the operands makes."""
    return sum(size(getattr(model.FORMATS, name)) ** 2 for name in operands)


def single(size: Size) -> float:
    return size(torch.Tensor.float) ** 2


def log_decay(e: Exact) -> StageResult:
    g, A_log, dt_bias = (e.inputs[name].float() for name in ("g", "A_log", "dt_bias"))
    g = g.unflatten(1, (-1, model.CHUNK))[0].transpose(1, 2)
    return model.log_decay(g, A_log, dt_bias, e.inputs["lower_bound"]), e.a


def log_decay_variance(e: Exact, size: Size) -> torch.Tensor:
    """Sum, rate and their product move the logit; the sigmoid, the bound and their product the result. The sigmoid in
    two numbers of tf32 loses the last two of its 24 bits with probability 1/2, and the last one with 1/4: 15/8 units
    squared on average, of 2^-23 each for x in [1, 2)."""
    slope = (1 - torch.sigmoid(e.logit)) * e.logit
    cut_off = 15 / 8 * 2.0**-46 / 2  # 1 / x^2 is 1/2 on average
    return (single(size) * (3 * slope.square() + 3) + cut_off) * e.a.square()


def relative(result: torch.Tensor, exact: torch.Tensor) -> StageResult:
    """Relative to each element, where fp32 can hold it."""
    kept = exact.abs() > 2.0**-100
    return (result.double() / exact).where(kept, 0.0), kept.double()


def decay_in_block(e: Exact) -> StageResult:
    a = e.a.float()
    return relative(model.Decays.of(a).from_start, decays(a.double()).from_start)


def decay_in_block_variance(e: Exact, size: Size) -> torch.Tensor:
    """Each partial sum of log-decays is rounded, the first one excepted, and the exponential once."""
    G = model.to_blocks(e.a).cumsum(3).square()
    sums = G.cumsum(3) - G[:, :, :, :1]
    return single(size) * (LN2**2 * sums + 1).where(e.decays.from_start > 2.0**-100, 0.0)


def decay_of_chunk(e: Exact) -> StageResult:
    a = e.a.float()
    return relative(model.Decays.of(a).chunk, decays(a.double()).chunk)


def decay_of_chunk_variance(e: Exact, size: Size) -> torch.Tensor:
    """Those of two blocks, and their product."""
    G = model.to_blocks(e.a).cumsum(3).square()
    sums = G.sum(3) - G[:, :, :, 0]
    return single(size) * (LN2**2 * sums.sum(2) + 2 + 1).where(e.decays.chunk > 2.0**-100, 0.0)


def decayed_rows(e: Exact) -> StageResult:
    rows = torch.stack([e.K, e.Q, e.Kr])
    formats = (model.FORMATS.K, model.FORMATS.Q, model.FORMATS.Kr)
    return relative(torch.stack([f(x.float()) for f, x in zip(formats, rows, strict=True)]), rows)


def decayed_rows_variance(e: Exact, size: Size) -> torch.Tensor:
    rows = {name: getattr(e, name).abs() > 2.0**-100 for name in ("K", "Q", "Kr")}
    return torch.stack([square(size, name) * kept for name, kept in rows.items()])


def products_variance(rows: torch.Tensor, e: Exact, size: Size) -> torch.Tensor:
    """The sum of the squares of all products of elements is what `decayed_products` makes of squares."""
    with operand_formats(EXACT):
        squares = model.decayed_products(rows.square(), e.columns.square(), e.decays.block.square())
    return 2 * square(size, "diagonal") * squares


def L(e: Exact) -> StageResult:
    rows, columns, block, factor = (x.float() for x in (e.k_rows, e.columns, e.decays.block, e.b * e.kn))
    return factor * model.stage_L(rows, columns, block), e.L


def L_variance(e: Exact, size: Size) -> torch.Tensor:
    return (e.b * e.kn).square() * products_variance(e.k_rows, e, size).tril(-1)


def M(e: Exact) -> StageResult:
    return model.stage_M(e.q_rows.float(), e.columns.float(), e.decays.block.float()), e.M


def M_variance(e: Exact, size: Size) -> torch.Tensor:
    return products_variance(e.q_rows, e, size).tril()


def X(e: Exact) -> StageResult:
    L, kn = e.L.float(), e.kn.float()
    return model.stage_X(L, kn), inverse(L.double(), kn.double())


def X_variance(e: Exact, size: Size) -> torch.Tensor:
    """Of X21 = -(X22 L21) X11: four roundings."""
    variance = torch.zeros_like(e.X)
    upper, lower = slice(0, model.BLOCK), slice(model.BLOCK, model.CHUNK)
    X22, L21, X11 = e.X[:, :, lower, lower], e.L[:, :, lower, upper], e.X[:, :, upper, upper]
    left, right = (X22 @ L21).square(), (L21 @ X11).square()
    products = X22.square() @ right + (X22.square() @ L21.square() + 2 * left) @ X11.square()
    variance[:, :, lower, upper] = square(size, "merge") * products
    return variance


def Xb(e: Exact) -> StageResult:
    return model.FORMATS.Xb(model.FORMATS.X(e.X.float()) * e.b.float().mT), e.Xb


def Xb_variance(e: Exact, size: Size) -> torch.Tensor:
    return square(size, "X", "Xb") * e.Xb.square()


def W(e: Exact) -> StageResult:
    return model.stage_W(model.FORMATS.Xb(e.Xb.float()), model.FORMATS.K(e.K.float())), e.W


def W_variance(e: Exact, size: Size) -> torch.Tensor:
    return square(size, "Xb", "K") * (e.Xb.square() @ e.K.square())


def U(e: Exact) -> StageResult:
    Xb, V, W, S = (x.float() for x in (e.Xb, e.V, e.W, e.S))
    return model.stage_U(model.FORMATS.Xb(Xb), V, model.FORMATS.W(W), model.FORMATS.S(S)), e.U


def U_variance(e: Exact, size: Size) -> torch.Tensor:
    """V is exact."""
    of_state = square(size, "W", "S") * (e.W.square() @ e.S.square().mT)
    return square(size, "Xb") * (e.Xb.square() @ e.V.square()) + of_state


def recurrence(e: Exact) -> tuple[torch.Tensor, torch.Tensor]:
    """O before its factors, and the next state, by the model from the exact U, which are values that stay as they are:
    X b is the identity and W is zero.
    """
    n, state = len(e.S), e.S.float()
    prepared = model.Prepared(
        W=torch.zeros_like(e.W, dtype=torch.float32),
        Q=model.FORMATS.Q(e.Q.float()),
        Kr=model.FORMATS.Kr(e.Kr.float()),
        Xb=torch.eye(model.CHUNK).expand(e.X.shape),
        M=model.FORMATS.M(e.M.float()),
        V=e.U.float(),
        qn=torch.ones_like(e.b, dtype=torch.float32),
        decay=e.decays.chunk.float(),
    )
    chunks = model.Chunks.of([(first, first + model.CHUNK) for first in range(0, n * model.CHUNK, model.CHUNK)], "cpu")
    O = model.recur(prepared, state, chunks)
    return O, state


def output(e: Exact) -> StageResult:
    return recurrence(e)[0], e.Q @ e.S.mT + e.M @ e.U


def output_variance(e: Exact, size: Size) -> torch.Tensor:
    return square(size, "Q", "S") * (e.Q.square() @ e.S.square().mT) + square(size, "M", "U") * (
        e.M.square() @ e.U.square()
    )


def next_state(e: Exact) -> StageResult:
    return recurrence(e)[1], e.S * e.decays.chunk[:, :, None] + e.U.mT @ e.Kr


def next_state_variance(e: Exact, size: Size) -> torch.Tensor:
    return square(size, "U", "Kr") * (e.U.square().mT @ e.Kr.square())


@dataclass(frozen=True)
class Stage:
    """`run` gives what the model computes from exact inputs, and what is exact; `variance` what its error should be."""

    formula: str
    run: Callable[[Exact], StageResult]
    variance: Callable[[Exact, Size], torch.Tensor]


STAGES: dict[str, Stage] = {
    "log-decay": Stage("a = bound sigmoid(rate (g + bias))", log_decay, log_decay_variance),
    "decay in a block": Stage("exp2 of sums of up to 16 a", decay_in_block, decay_in_block_variance),
    "decay of a chunk": Stage("the product of those of its 2 blocks", decay_of_chunk, decay_of_chunk_variance),
    "K~, Q~, Kr": Stage("rows times decays, rounded", decayed_rows, decayed_rows_variance),
    "L": Stage("b kn K~ . K~", L, L_variance),
    "M": Stage("Q~ . K~", M, M_variance),
    "X": Stage("(I + L)^-1", X, X_variance),
    "X b": Stage("X diag(b), rounded", Xb, Xb_variance),
    "W": Stage("X b K~", W, W_variance),
    "U": Stage("X b V - W S", U, U_variance),
    "O": Stage("Q~ S + M U", output, output_variance),
    "S": Stage("exp(G_C) S + Kr^T U", next_state, next_state_variance),
}


def relative_rms(x: torch.Tensor, exact: torch.Tensor) -> float | None:
    """None where nothing is in the range of fp32."""
    squares = exact.double().square().sum()
    return float((x.square().sum() / squares).sqrt()) if squares else None


def measured(stage: Stage, e: Exact) -> float | None:
    """Relative RMS error of the stage."""
    result, right = stage.run(e)
    return relative_rms(result.double() - right, right)


def predicted(stage: Stage, e: Exact, size: Size = expected) -> float | None:
    """Relative RMS error that the stage should have; with `at_most`, that none of its data could exceed."""
    return relative_rms(stage.variance(e, size).sqrt(), stage.run(e)[1])


def of_family(family: str, seed: int = 0) -> dict[str, dict[str, float | None]]:
    """By stage: predicted, at most, measured. 256 tokens, 4 heads."""
    e = Exact.of(published_inputs(family, seed, tokens=256, heads=4))
    return {
        name: {
            "predicted": predicted(stage, e),
            "at_most": predicted(stage, e, at_most),
            "measured": measured(stage, e),
        }
        for name, stage in STAGES.items()
    }
