"""Each stage of the model against its definition in float64, within what the rounding of its operands explains.

`Rounded` carries a float64 value through the same products with a running error analysis beside it: the worst case, and
the variance if roundings are independent. The values themselves are checked against the definitions, which are written
here from `docs/operator.md` alone.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import pytest
import torch

from benchmarks.analysis.published import published_inputs
from flash_kda import model
from flash_kda.formats import Formats, bf16, tf32, two_bf16

BF16 = 2.0**-8  # the error of one rounding, relative: half an ulp
TF32 = 2.0**-11
TWO_BF16 = 2.0**-17
UNDERFLOW = 2.0**-120  # what fp32 loses in a sum of products below its range
FP32 = 2.0**-24  # half an ulp of fp32, relative
CHUNK, BLOCK = 32, 16


@dataclass(frozen=True)
class Rounded:
    """What `value` may have become: the error is at most `worst`, and has `variance` if roundings are independent."""

    value: torch.Tensor
    worst: torch.Tensor
    variance: torch.Tensor

    @staticmethod
    def of(value: torch.Tensor, relative: torch.Tensor | float = 0.0) -> Rounded:
        error = value.abs() * relative
        return Rounded(value, error, error**2)

    def rounded(self, relative: float) -> Rounded:
        error = relative * (self.value.abs() + self.worst)
        return Rounded(self.value, self.worst + error, self.variance + error**2 / 3)

    def __matmul__(self, other: Rounded) -> Rounded:
        a, b = self.value.abs(), other.value.abs()
        accumulation = FP32 * a.shape[-1] * (a @ b)
        return Rounded(
            self.value @ other.value,
            a @ other.worst + self.worst @ (b + other.worst) + accumulation,
            a**2 @ other.variance + self.variance @ (b**2 + other.variance) + accumulation**2,
        )

    def __mul__(self, other: Rounded) -> Rounded:
        a, b = self.value.abs(), other.value.abs()
        return Rounded(
            self.value * other.value,
            a * other.worst + self.worst * (b + other.worst),
            a**2 * other.variance + self.variance * (b**2 + other.variance),
        ).in_fp32()

    def __add__(self, other: Rounded) -> Rounded:
        return Rounded(self.value + other.value, self.worst + other.worst, self.variance + other.variance).in_fp32()

    def in_fp32(self) -> Rounded:
        half_ulp = FP32 * (self.value.abs() + self.worst)
        return Rounded(self.value, self.worst + half_ulp, self.variance + half_ulp**2)

    def __neg__(self) -> Rounded:
        return replace(self, value=-self.value)

    @property
    def mT(self) -> Rounded:
        return self.map(lambda x: x.mT)

    def map(self, function) -> Rounded:
        return Rounded(function(self.value), function(self.worst), function(self.variance))

    def explains(self, result: torch.Tensor, independent: bool) -> None:
        """Fail unless `result` is within the worst case and, if roundings are independent, of the size they have."""
        error = ((result.double() - self.value).abs() - UNDERFLOW).clamp_min(0)
        beyond = int((~(error <= self.worst)).sum())  # also where either is NaN
        assert beyond == 0, f"{beyond} elements beyond the worst case"
        if independent:
            possible = self.variance > 0
            sigmas = error[possible] / self.variance[possible].sqrt()
            assert sigmas.square().mean().sqrt() <= 1, f"RMS {sigmas.square().mean().sqrt():.3f} standard deviations"
            assert sigmas.max() <= 6, f"{sigmas.max():.2f} standard deviations"


@dataclass(frozen=True)
class Exact:
    """Two chunks of two heads in float64, `[2, 2, 32, ...]`, from the definitions."""

    q: torch.Tensor  # as the model has it: as given, or times a power of two
    k: torch.Tensor
    qn: torch.Tensor  # [2, 2, 32, 1] the factor that normalises the row
    kn: torch.Tensor
    b: torch.Tensor  # [2, 2, 32, 1]
    G: torch.Tensor  # inclusive cumulative log-decay

    @staticmethod
    def of(q, k, g, beta, A_log, dt_bias, lower_bound) -> Exact:
        (q_rows, q_unit), (k_rows, k_unit) = with_unit(q), with_unit(k)
        q, k, g, beta, A_log, dt_bias = (x.double() for x in (q, k, g, beta, A_log, dt_bias))
        a = lower_bound * torch.sigmoid(A_log.exp()[:, None, None] * (g + dt_bias[:, None]))
        qn, kn = (unit / norm(x) for x, unit in ((q, q_unit), (k, k_unit)))
        return Exact(q_rows, k_rows, qn, kn, torch.sigmoid(beta)[..., None], a.cumsum(2))

    def products(self, row: torch.Tensor) -> torch.Tensor:
        """row_i exp(G_i - G_j) . k_j for i >= j, else 0: `[2, 2, 32, 32]`."""
        decay = (self.G[:, :, :, None] - self.G[:, :, None]).clamp_max(0).exp()
        return torch.einsum("nhic,nhijc,nhjc->nhij", row, decay, self.k).tril()

    def rounded_products(self, row: torch.Tensor) -> Rounded:
        """The same in rectangles, each with decays from the token where its rows begin, and every operand rounded."""
        parts = torch.zeros(len(PARTS), 2, 2, CHUNK, CHUNK, dtype=torch.float64)
        for first, start, size in RECTANGLES:
            rows, columns = slice(first, first + size), slice(start, start + size)
            anchor = self.G[:, :, first - 1 : first] if first else torch.zeros_like(self.G[:, :, :1])
            to_row, to_column = self.G[:, :, rows] - anchor, anchor - self.G[:, :, columns]
            left = Rounded.of(row[:, :, rows] * to_row.exp(), decay_error(size, to_row)).rounded(BF16)
            right = Rounded.of(self.k[:, :, columns] * to_column.exp(), decay_error(size, to_column)).rounded(BF16)
            product = left @ right.mT
            for part, name in zip(parts, PARTS, strict=True):
                part[:, :, rows, columns] = getattr(product, name)
        return Rounded(*parts.tril())


PARTS = ("value", "worst", "variance")
RECTANGLES = [(0, 0, 16), (16, 16, 16), (16, 0, 16)]  # row, column, size


def norm(x: torch.Tensor) -> torch.Tensor:
    return (x.square().sum(-1, keepdim=True) + 1e-6).sqrt()


def with_unit(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(rows, unit) in float64: a row whose norm is not in [2^-8, 2^8] over the power of two at or below its norm."""
    x = x.double()
    squares = x.square().sum(-1, keepdim=True)
    unit = 2.0 ** squares.sqrt().log2().floor().clamp(-116, 116)
    unit = torch.where((squares > 2.0**16) | (squares < 2.0**-16) & (squares > 0), unit, 1.0)
    return x / unit, unit


def decay_error(tokens: int, total: torch.Tensor) -> torch.Tensor:
    """Relative error of exp(-total) from the fp32 log-decays of `tokens` tokens: a few ulps each, and of their sum."""
    return FP32 * (8 + 4 * tokens + 8 * total.abs())


def rounded_inverse(L: torch.Tensor, kn: torch.Tensor) -> Rounded:
    """(diag(1 / kn) + L)^-1 with the rounding of the merges; diagonal blocks by substitution in fp32."""
    size = L.shape[-1]
    if size == BLOCK:
        inverse = exact_inverse(L, kn)
        error = FP32 * size * (inverse.abs() + inverse.abs() @ L.abs() @ inverse.abs())
        return Rounded(inverse, error, error**2)
    half = size // 2
    upper = rounded_inverse(L[..., :half, :half], kn[..., :half, :])
    lower = rounded_inverse(L[..., half:, half:], kn[..., half:, :])
    product = lower.rounded(TF32) @ Rounded.of(L[..., half:, :half]).rounded(TF32)
    corner = -(product.rounded(TF32) @ upper.rounded(TF32))
    zeros = torch.zeros_like(corner.value)
    join = torch.cat
    return Rounded(
        *(
            join([join([getattr(upper, part), zeros], -1), join([getattr(corner, part), getattr(lower, part)], -1)], -2)
            for part in PARTS
        )
    )


def exact_inverse(L: torch.Tensor, kn: torch.Tensor) -> torch.Tensor:
    """diag(kn) (I + L diag(kn))^-1."""
    eye = torch.eye(L.shape[-1], dtype=L.dtype)
    return kn * torch.linalg.solve_triangular(eye + L * kn.mT, eye.expand_as(L), upper=False, unitriangular=True)


@dataclass(frozen=True)
class Stages:
    exact: Exact
    prepared: model.Prepared
    L: torch.Tensor
    kn: torch.Tensor
    X: torch.Tensor  # before it is rounded
    K: torch.Tensor  # K~
    state: torch.Tensor  # fp32 [2, 2, V, K]
    # Whether roundings are: not where keys are alike. Where decays are weak besides, a key times a decay just below 1
    # is rounded back to the key, and the errors of all channels add up.
    independent: bool


PUBLISHED = ("random", "weak", "collinear", "collinear_strong", "equal", "saturated", "undecayed", "mixed", "sizes")


def stages(family: str) -> Stages:
    """Run `prepare` on two chunks of two heads of a family, and keep what is on the way to its results."""
    special = family in ("saturated", "undecayed", "mixed", "sizes")
    inputs = published_inputs("random" if special else family, tokens=2 * CHUNK, heads=2)
    if family == "saturated":
        inputs["g"] = torch.full_like(inputs["g"], 100)
    if family == "mixed":  # channels that decay at once beside channels that never do
        inputs["g"][..., ::2], inputs["g"][..., 1::2] = float("inf"), -float("inf")
    if family == "sizes":  # rows of q and k with norms from 2^-60 to 2^60, and rows of zeros
        for name in ("q", "k"):
            inputs[name] *= 2.0 ** (7 * torch.arange(2 * CHUNK) % 121 - 60)[:, None, None]
            inputs[name][:, 5::17] = 0
    lower_bound = 0.0 if family == "undecayed" else -5.0
    q, k, v, g, beta = (
        inputs[name][0].float().unflatten(0, (2, CHUNK)).transpose(1, 2).contiguous()
        for name in ("q", "k", "v", "g", "beta")
    )
    kept = {}
    invert, multiply = model.stage_X, model.stage_W

    def keep_X(L, kn):
        kept.update(L=L, kn=kn, X=invert(L, kn))
        return kept["X"].clone()

    def keep_K(Xb, K):
        kept.update(K=K)
        return multiply(Xb, K)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(model, "stage_X", keep_X)
        patch.setattr(model, "stage_W", keep_K)
        valid = torch.ones(2, CHUNK, dtype=torch.bool)
        prepared = model.prepare(q, k, v, g, beta, inputs["A_log"], inputs["dt_bias"], lower_bound, valid)
    exact = Exact.of(q, k, g, beta, inputs["A_log"], inputs["dt_bias"], lower_bound)
    state = torch.cat([inputs["initial_state"], inputs["initial_state"].flip(2)])
    state[:, :, ::3] *= 2.0**70  # value columns of very different magnitudes
    state[:, :, 1::3] *= 2.0**-70
    independent = family not in ("collinear", "collinear_strong", "equal")
    return Stages(exact, prepared, **kept, state=state, independent=independent)


def check_decayed_operands(s: Stages) -> None:
    e, p, last = s.exact, s.prepared, s.exact.G[:, :, -1:]
    for operand, row, total in ((s.K, e.kn * e.k, e.G), (p.Q, e.q, e.G), (p.Kr, e.k, last - e.G)):
        rounded = Rounded.of(row * total.exp(), decay_error(CHUNK, last)).rounded(BF16)
        rounded.explains(operand, s.independent)
    decay, subnormal = last[:, :, 0].exp(), 2.0**-149
    assert ((p.decay - decay).abs() <= decay * decay_error(CHUNK, last[:, :, 0]) + subnormal).all()


def check_L(s: Stages) -> None:
    e = s.exact
    rounded = e.rounded_products(e.k).map(lambda x: x.tril(-1))
    assert torch.allclose(rounded.value, e.products(e.k).tril(-1), rtol=1e-9, atol=1e-12)
    (Rounded.of(e.b * e.kn, 8 * FP32) * rounded).explains(s.L, s.independent)


def check_M(s: Stages) -> None:
    e = s.exact
    rounded = e.rounded_products(e.q)
    assert torch.allclose(rounded.value, e.products(e.q), rtol=1e-9, atol=1e-12)
    rounded.rounded(BF16).explains(s.prepared.M, s.independent)


def check_X(s: Stages) -> None:
    L, kn = s.L.double(), s.kn.double()
    rounded = rounded_inverse(L, kn)
    assert torch.allclose(rounded.value, exact_inverse(L, kn), rtol=1e-9, atol=1e-12)
    rounded.explains(s.X, s.independent)


def exactly(x: torch.Tensor) -> Rounded:
    return Rounded.of(x.double())


def check_Xb(s: Stages) -> None:
    b = Rounded.of(s.exact.b.mT, FP32)
    for X in (exactly(s.X).rounded(TF32), exactly(tf32(s.X))):  # the second sees errors much smaller than those of X
        (X * b).rounded(TWO_BF16).explains(s.prepared.Xb, s.independent)


def check_W(s: Stages) -> None:
    (exactly(s.prepared.Xb) @ exactly(s.K)).rounded(BF16).explains(s.prepared.W, s.independent)


def check_U_O_S(s: Stages) -> None:
    """The serial stages of one chunk of each of two sequences, each from what the stage before it gave."""
    p = s.prepared
    U = model.stage_U(p.Xb, p.V, p.W, model.FORMATS.S(s.state))
    state = s.state.clone()
    O = model.recur(p, state, model.Chunks.of([(0, CHUNK), (CHUNK, 2 * CHUNK)], torch.device("cpu")))

    Q, Kr, Xb, M, V, W, S = map(exactly, (p.Q, p.Kr, p.Xb, p.M, p.V, p.W, s.state))
    S_operand, U_operand = S.rounded(BF16), exactly(U).rounded(BF16)
    (Xb @ V + -(W @ S_operand.mT)).explains(U, s.independent)
    (Q @ S_operand.mT + M @ U_operand).explains(O, s.independent)
    (S * exactly(p.decay[:, :, None]) + U_operand.mT @ Kr).explains(state, s.independent)


CHECKS = (check_decayed_operands, check_L, check_M, check_X, check_Xb, check_W, check_U_O_S)


@pytest.mark.parametrize("family", PUBLISHED)
@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__.removeprefix("check_"))
def test_stage(check, family):
    check(stages(family))


@pytest.mark.parametrize(
    ("check", "operand"),
    [
        *((check_decayed_operands, operand) for operand in ("K", "Q", "Kr")),
        *((check, operand) for check in (check_L, check_M) for operand in ("diagonal", "between")),
        *((check_M, "M"), (check_X, "merge"), (check_Xb, "X"), (check_Xb, "Xb"), (check_W, "W")),
        *((check_U_O_S, operand) for operand in ("S", "U")),
    ],
    ids=lambda x: x if isinstance(x, str) else x.__name__.removeprefix("check_"),
)
def test_the_bounds_notice_fewer_bits(check, operand, monkeypatch):
    """The next narrower format than the one shipped."""
    shipped = getattr(Formats, operand)
    monkeypatch.setattr(model, "FORMATS", Formats(**{operand: NARROWER[shipped]}))
    with pytest.raises(AssertionError):
        check(stages("weak"))


def four_bits(x: torch.Tensor) -> torch.Tensor:
    return ((x.contiguous().view(torch.int32) + 0x40000) & ~0x7FFFF).view(torch.float32)


NARROWER = {two_bf16: tf32, tf32: bf16, bf16: four_bits}


@pytest.mark.parametrize("exponent", [-133, -120, -60, -9, -8, 0, 7, 8, 9, 60, 127])
def test_rows_of_any_size_are_normalised(exponent):
    x = torch.randn(50, 128, generator=torch.Generator().manual_seed(0))
    x = (x.clamp(-1, 1) * 2.0**exponent).to(torch.bfloat16).float()
    x[::7] = 0
    rows, factor = model.normalise(x)
    expected, unit = with_unit(x)
    assert torch.equal(rows.double(), expected)
    exact = torch.where(x.any(-1, keepdim=True), unit / norm(x.double()), 0.0)
    assert ((factor - exact).abs() <= FP32 * exact).all()
    length = rows.double().norm(dim=-1)[x.any(-1)]
    assert ((length >= 2.0**-17) & (length < 2.0**16)).all()
