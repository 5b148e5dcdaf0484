"""Each stage of the model against its definition in float64, within what the rounding of its operands explains.

`Rounded` carries a float64 value through the same products with a running error analysis beside it: the worst case, and
the variance if roundings are independent. The values themselves are checked against the definitions, which are written
here from `docs/operator.md` alone.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import pytest
import torch

from benchmarks.families import draw
from flash_kda import model
from flash_kda.formats import Formats

HALF_ULP = 2.0**-11  # of fp16 and of tf32, relative
FP16_FLOOR = 2.0**-25  # half of fp16's smallest subnormal
UNDERFLOW = 2.0**-120  # what fp32 loses in a sum of products below its range
FP32 = 2.0**-24  # half an ulp of fp32, relative
CHUNK, BLOCK, BLOCKS = 64, 16, 4


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

    def to_tf32(self) -> Rounded:
        return self._rounded(0.0)

    def to_fp16(self, unit: torch.Tensor | float = 1.0) -> Rounded:
        """As a multiple of `unit`."""
        return self._rounded(FP16_FLOOR * unit)

    def _rounded(self, floor) -> Rounded:
        half_ulp = HALF_ULP * (self.value.abs() + self.worst) + floor
        return Rounded(self.value, self.worst + half_ulp, self.variance + half_ulp**2 / 3)

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
        beyond = int((error > self.worst).sum())
        assert beyond == 0, f"{beyond} elements beyond the worst case"
        if independent:
            possible = self.variance > 0
            sigmas = error[possible] / self.variance[possible].sqrt()
            assert sigmas.square().mean().sqrt() <= 1, f"RMS {sigmas.square().mean().sqrt():.3f} standard deviations"
            assert sigmas.max() <= 6, f"{sigmas.max():.2f} standard deviations"


@dataclass(frozen=True)
class Exact:
    """Two chunks of two heads in float64, `[2, 2, 64, ...]`, from the definitions."""

    q: torch.Tensor  # q^
    k: torch.Tensor  # k^
    q_unit: torch.Tensor  # [2, 2, 64, 1] the power of two that a row of tiny norm leaves out
    k_unit: torch.Tensor  # [2, 2, 64, 1]
    b: torch.Tensor  # [2, 2, 64, 1]
    G: torch.Tensor  # inclusive cumulative log-decay
    before: torch.Tensor  # [2, 2, 4, K] G just before each block
    end: torch.Tensor  # [2, 2, 4, K] G at the end of each block

    @staticmethod
    def of(q, k, g, beta, A_log, dt_bias, lower_bound) -> Exact:
        q_unit, k_unit = (model.normalise(x)[1].double() for x in (q, k))
        q, k, g, beta, A_log, dt_bias = (x.double() for x in (q, k, g, beta, A_log, dt_bias))
        a = lower_bound * torch.sigmoid(A_log.exp()[:, None, None] * (g + dt_bias[:, None]))
        G = a.cumsum(2)
        end = G[:, :, BLOCK - 1 :: BLOCK]
        before = torch.cat([torch.zeros_like(end[:, :, :1]), end[:, :, :-1]], 2)

        def unit(x):
            return x / (x.square().sum(-1, keepdim=True) + 1e-6).sqrt()

        return Exact(unit(q), unit(k), q_unit, k_unit, torch.sigmoid(beta)[..., None], G, before, end)

    def products(self, row: torch.Tensor) -> torch.Tensor:
        """row_i exp(G_i - G_j) . k^_j for i >= j, else 0: `[2, 2, 64, 64]`."""
        decay = (self.G[:, :, :, None] - self.G[:, :, None]).clamp_max(0).exp()
        return torch.einsum("nhic,nhijc,nhjc->nhij", row, decay, self.k).tril()

    def rounded_products(self, row: torch.Tensor, row_unit: torch.Tensor) -> Rounded:
        """The same by blocks, with the rounding of every operand. An fp16 operand leaves out the unit of its row."""
        row, k, G, row_unit, k_unit = map(to_blocks, (row, self.k, self.G, row_unit, self.k_unit))
        before, end = self.before[:, :, :, None], self.end[:, :, :, None]
        fp32 = decay_error(BLOCK, before - end)
        rows = Rounded.of(row * (G - before).exp(), fp32)
        to_start = Rounded.of(k * (before - G).exp(), fp32)
        to_end = Rounded.of(k * (end - G).exp(), fp32).to_fp16(k_unit * shared(end - G))
        row_unit = row_unit * shared(G - before)
        lines = []
        for i in range(BLOCKS):
            row_i = rows.map(lambda x, i=i: x[:, :, i])
            line = []
            for j in range(i):
                anchored = row_i.to_fp16(row_unit[:, :, i])
                if j < i - 1:
                    gap = before[:, :, i] - end[:, :, j]
                    between = Rounded.of(gap.exp(), decay_error(BLOCK * (i - 1 - j), -gap)).to_fp16(shared(gap))
                    anchored = (anchored * between).to_fp16(row_unit[:, :, i] * shared(gap))
                line.append(anchored @ to_end.map(lambda x, j=j: x[:, :, j]).mT)
            diagonal = row_i.to_tf32() @ to_start.map(lambda x, i=i: x[:, :, i]).to_tf32().mT
            line.append(diagonal.map(torch.tril))
            zeros = torch.zeros(2, 2, BLOCK, BLOCK * (BLOCKS - 1 - i), dtype=torch.float64)
            lines.append([join([getattr(x, part) for x in line] + [zeros], -1) for part in PARTS])
        return Rounded(*(join(part, -2) for part in zip(*lines, strict=True)))


def to_blocks(x: torch.Tensor) -> torch.Tensor:
    return x.unflatten(2, (BLOCKS, BLOCK))


def shared(total: torch.Tensor) -> torch.Tensor:
    """The most that an operand may leave out for decays exp(total): the largest of all channels, while fp32 has it."""
    return total.amax(-1, keepdim=True).exp().clamp_min(2.0**-116)


PARTS = ("value", "worst", "variance")
join = torch.cat


def decay_error(tokens: int, total: torch.Tensor) -> torch.Tensor:
    """Relative error of exp(-total) from the fp32 decays of `tokens` tokens: a few ulps each, and of the exponent."""
    return FP32 * (8 + 4 * tokens + 4 * total.abs())


def rounded_inverse(L: torch.Tensor) -> Rounded:
    """(I + L)^-1 with the rounding of the merges; diagonal blocks by substitution in fp32."""
    size = L.shape[-1]
    if size == BLOCK:
        inverse = torch.linalg.inv(torch.eye(size, dtype=L.dtype) + L)
        error = FP32 * size * (inverse.abs() @ L.abs() @ inverse.abs())
        return Rounded(inverse, error, error**2)
    half = size // 2
    upper, lower = rounded_inverse(L[..., :half, :half]), rounded_inverse(L[..., half:, half:])
    product = lower.to_tf32() @ Rounded.of(L[..., half:, :half]).to_tf32()
    corner = -(product.to_tf32() @ upper.to_tf32())
    zeros = torch.zeros_like(corner.value)
    return Rounded(
        *(
            join([join([getattr(upper, part), zeros], -1), join([getattr(corner, part), getattr(lower, part)], -1)], -2)
            for part in PARTS
        )
    )


@dataclass(frozen=True)
class Stages:
    exact: Exact
    prepared: model.Prepared
    L: torch.Tensor
    state: torch.Tensor  # fp32 [2, 2, V, K]
    independent: bool  # whether roundings are: not where all keys are equal


FAMILIES = ("random", "weak", "collinear", "collinear_strong", "equal", "saturated", "undecayed", "mixed", "tiny")


def stages(family: str) -> Stages:
    """Run `prepare` on two chunks of two heads of a family, and keep L on its way to X."""
    special = family in ("saturated", "undecayed", "mixed", "tiny")
    inputs = draw("random" if special else family, tokens=2 * CHUNK, heads=2)
    if family == "saturated":
        inputs["g"] = torch.full_like(inputs["g"], 100)
    if family == "mixed":  # channels that decay at once beside channels that never do
        inputs["g"][..., ::2], inputs["g"][..., 1::2] = float("inf"), -float("inf")
    if family == "tiny":  # rows of q and k with norms down to 2^-60, and rows of zeros
        for name in ("q", "k"):
            inputs[name] *= 2.0 ** -torch.arange(2 * CHUNK).remainder(61)[:, None, None]
            inputs[name][:, 5::17] = 0
    lower_bound = 0.0 if family == "undecayed" else -5.0
    q, k, v, g, beta = (
        inputs[name][0].float().unflatten(0, (2, CHUNK)).transpose(1, 2).contiguous()
        for name in ("q", "k", "v", "g", "beta")
    )
    kept = []

    def keep(L):
        kept.append(L)
        return invert(L)

    invert = model.stage_X
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(model, "stage_X", keep)
        valid = torch.ones(2, CHUNK, dtype=torch.bool)
        prepared = model.prepare(q, k, v, g, beta, inputs["A_log"], inputs["dt_bias"], lower_bound, valid)
    exact = Exact.of(q, k, g, beta, inputs["A_log"], inputs["dt_bias"], lower_bound)
    state = torch.cat([inputs["initial_state"], inputs["initial_state"].flip(2)])
    state[:, :, ::3] *= 2.0**70  # value columns of very different magnitudes
    state[:, :, 1::3] *= 2.0**-70
    return Stages(exact, prepared, kept[0], state, independent=family != "equal")


def check_decayed_operands(s: Stages) -> None:
    e, p, last = s.exact, s.prepared, s.exact.G[:, :, -1:]
    G, before, end = to_blocks(e.G), e.before[:, :, :, None], e.end[:, :, :, None]
    from_chunk = (shared(G - before) * shared(before)).flatten(2, 3)
    to_chunk = (shared(end - G) * shared(last[:, :, :, None] - end)).flatten(2, 3)
    for operand, operand_unit, value, total, unit in (
        (p.K, p.K_unit, e.k * e.G.exp(), e.G, e.k_unit * from_chunk),
        (p.Q, p.Q_unit * p.q_unit, e.q * e.G.exp(), e.G, e.q_unit * from_chunk),
        (p.Kr, p.Kr_unit, e.k * (last - e.G).exp(), last, e.k_unit * to_chunk),
    ):
        rounded = Rounded.of(value, decay_error(CHUNK, total)).to_fp16(unit)
        rounded.explains(operand.double() * operand_unit.double(), s.independent)
    decay, subnormal = last[:, :, 0].exp(), 2.0**-149
    assert ((p.decay - decay).abs() <= decay * decay_error(CHUNK, last[:, :, 0]) + subnormal).all()


def check_L(s: Stages) -> None:
    rounded = s.exact.rounded_products(s.exact.k, s.exact.k_unit).map(lambda x: x.tril(-1))
    assert torch.allclose(rounded.value, s.exact.products(s.exact.k).tril(-1), rtol=1e-11, atol=1e-300)
    (Rounded.of(s.exact.b, 4 * FP32) * rounded).explains(s.L, s.independent)


def check_M(s: Stages) -> None:
    rounded = s.exact.rounded_products(s.exact.q, s.exact.q_unit)
    assert torch.allclose(rounded.value, s.exact.products(s.exact.q), rtol=1e-9, atol=1e-14)
    rounded.to_tf32().explains(s.prepared.M.double() * s.prepared.q_unit.double(), s.independent)


def check_X(s: Stages) -> None:
    rounded = rounded_inverse(s.L.double())
    definition = torch.linalg.inv(torch.eye(CHUNK, dtype=torch.float64) + s.L.double())
    assert torch.allclose(rounded.value, definition, rtol=1e-9, atol=1e-12)
    rounded.to_tf32().explains(s.prepared.X, s.independent)


def check_W_U_O_S(s: Stages) -> None:
    """The serial stages of one chunk of each of two sequences, each from what the stage before it gave."""
    p = s.prepared
    S16, S_unit = model.scaled(s.state, s.state.abs().sum(-1, keepdim=True), model.FORMATS.S)
    W = model.stage_W(p.V, p.b, p.K, S16, p.K_unit * S_unit.mT)
    U = model.stage_U(p.X, W)
    update = p.Kr_unit * U
    update_unit = 2.0 ** (torch.frexp(update.abs().amax(-2, keepdim=True)).exponent.double() - 15)
    state = s.state.clone()
    O = model.recur(p, state, model.Chunks.of([(0, CHUNK), (CHUNK, 2 * CHUNK)], torch.device("cpu")))

    def exactly(x: torch.Tensor) -> Rounded:
        return Rounded.of(x.double())

    K, Q, Kr, X, M, V = map(exactly, (p.K, p.Q, p.Kr, p.X, p.M, p.V))
    q_unit, Q_unit, K_unit, b, S = map(exactly, (p.q_unit, p.Q_unit, p.K_unit, p.b[..., None], s.state))
    S_operand = S.to_fp16(S_unit.double())
    (b * (V + -(K_unit * (K @ S_operand.mT)))).explains(W, s.independent)
    (X @ exactly(W).to_tf32()).explains(U, s.independent)
    (q_unit * (Q_unit * (Q @ S_operand.mT) + M @ exactly(U).to_tf32())).explains(O, s.independent)
    decayed = S * exactly(p.decay[:, :, None])
    (decayed + exactly(update).to_fp16(update_unit).mT @ Kr).explains(state, s.independent)


CHECKS = (check_decayed_operands, check_L, check_M, check_X, check_W_U_O_S)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__.removeprefix("check_"))
def test_stage(check, family):
    check(stages(family))


@pytest.mark.parametrize(
    ("check", "operand"),
    [
        *((check_decayed_operands, operand) for operand in ("K", "Q", "Kr")),
        *((check, operand) for check in (check_L, check_M) for operand in ("diagonal", "between")),
        *((check_M, "M"), (check_X, "X"), (check_X, "merge")),
        *((check_W_U_O_S, operand) for operand in ("S", "W", "U", "U_update")),
    ],
    ids=lambda x: x if isinstance(x, str) else x.__name__.removeprefix("check_"),
)
def test_the_bounds_notice_bf16(check, operand, monkeypatch):
    monkeypatch.setattr(model, "FORMATS", Formats(**{operand: lambda x: x.bfloat16().float()}))
    with pytest.raises(AssertionError):
        check(stages("weak"))
