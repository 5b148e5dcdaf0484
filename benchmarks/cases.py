"""The cases whose speed is measured, with the times that `h200_peers.json` publishes for them."""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import cache
from pathlib import Path

DIM = 128  # K and V
HOST = "host"  # among the groups of cases: the host time of a call, which is no case
PEERS_FILE = Path(__file__).with_name("h200_peers.json")
ALONE, BESIDE = "H12 T8192", "H12 8192 beside 32 of 1"
# Milliseconds that the project set itself; the group "short" has them all.
SHORT_GOALS = {
    "H96 256 sequences of 1": 1.2,
    "H96 256 sequences of 1, bf16 states": 0.6,
    "H96 512 sequences of 16": 2.8,
    "H96 256 sequences of 64": 1.9,
    "H12 300 sequences of 17": 0.25,
    ALONE: None,
    BESIDE: None,  # at most BESIDE_WITHIN over the long one alone
}
BESIDE_WITHIN = 0.1
LINEAR = tuple(f"H96 T{tokens}" for tokens in (16384, 32768, 65536, 131072))  # against "H96 fixed", which has 8192


@dataclass(frozen=True)
class SpeedCase:
    """Lengths and heads of one call with initial and final states, K = V = 128, bf16 inputs, lower_bound -5.

    group: "six" (the published ones), "also" (published for FlashKDA), "few-heads" (what one of eight GPUs has of a
        model), "linear" and "scaling" (cost against T, H, N), "short" (a few tokens a sequence; contains all cases of
        `SHORT_GOALS`, also those of other groups).
    state_bytes: of an element of the states, 4 (fp32) or 2 (bf16).
        model), "linear" and "scaling" (cost against T, H, N), "checkpoints" (the published ones, with checkpoints).
    with_fla: whether fla runs on it too. Its tuning takes a minute for a new number of heads, so for "six", "also" and
        "linear" alone.
    checkpoint: one checkpoint a sequence, fp32, at the multiple of 64 tokens before its middle.
    wanted, hoped: times as fast as fla. wanted_ms, hoped_ms: time on the device. None where no goal was set.
    fla_ms, flashkda_ms, cudnn_ms, vllm_ms: published, None where nobody did. Those of "few-heads" are on the device.
    """

    name: str
    group: str
    heads: int
    seq_lens: tuple[int, ...]
    packed: bool
    with_fla: bool = True
    wanted: float | None = None
    hoped: float | None = None
    fla_ms: float | None = None
    flashkda_ms: float | None = None
    cudnn_ms: float | None = None
    vllm_ms: float | None = None
    wanted_ms: float | None = None
    hoped_ms: float | None = None
    state_bytes: int = 4
    checkpoint: bool = False

    @property
    def tokens(self) -> int:
        return sum(self.seq_lens)

    @property
    def sequences(self) -> int:
        return len(self.seq_lens)

    @property
    def bytes(self) -> int:
        """Each input read once and each output written once: q, k, v, g, out; beta; two states; A_log, dt_bias."""
        rows = self.tokens * self.heads
        states = 2 * self.sequences * self.heads * DIM * DIM * self.state_bytes
        offsets = 8 * (self.sequences + 1) if self.packed else 0
        return rows * (5 * DIM + 1) * 2 + states + self.heads * (1 + DIM) * 4 + offsets


# Ratios to fla that the project set itself: (wanted, hoped).
GOALS = {
    (96, "fixed"): (5.0, 6.5),
    (96, "mixed"): (5.0, 8.0),
    (96, "uniform"): (5.0, 8.0),
    (64, "fixed"): (4.0, 7.0),
    (64, "mixed"): (5.0, 8.0),
    (64, "uniform"): (5.0, 8.0),
}

# Milliseconds on the device that the project set itself, by tokens, heads and sequences: (wanted, hoped).
FEW_HEADS_GOALS = {
    (2048, 12, 1): (0.050, 0.035),
    (2048, 16, 1): (0.055, 0.035),
    (4096, 8, 1): (0.066, 0.060),
    (4096, 12, 1): (0.080, 0.060),
    (8192, 12, 1): (0.150, 0.110),
    (8192, 12, 4): (0.100, 0.070),
    (8192, 16, 1): (0.160, 0.110),
    (1024, 4, 1): (0.025, 0.020),
    (3072, 10, 1): (0.062, 0.045),
    (8192, 24, 1): (0.200, 0.120),
    (16384, 16, 8): (0.240, 0.180),
    (65536, 8, 1): (1.200, 0.700),
    (65536, 4, 1): (1.200, 0.380),
}


@cache
def speed_cases() -> dict[str, SpeedCase]:
    """All cases by name, the six first."""
    published = json.loads(PEERS_FILE.read_text())
    cases = []
    for seed in published["seed_cases"]:
        heads, kind = seed["H"], seed["case"]
        wanted, hoped = GOALS[heads, kind]
        cases.append(
            SpeedCase(
                f"H{heads} {kind}",
                "six",
                heads,
                tuple(seed["seq_lens"]),
                packed=kind != "fixed",
                wanted=wanted,
                hoped=hoped,
                fla_ms=seed["fla_ms"],
                flashkda_ms=seed["flashkda_ms"],
            )
        )
    times = published["other_cases_flashkda_ms"]

    def add(name: str, group: str, heads: int, seq_lens: tuple[int, ...], *, packed: bool = False, fla: bool = True):
        cases.append(SpeedCase(name, group, heads, seq_lens, packed, fla, flashkda_ms=times.get(name)))

    for heads, lengths in ((12, (1024, 4096, 8192, 32768, 65536)), (8, (1024, 4096, 8192, 32768, 65536)), (4, (65536,)),
                           (64, (512, 1024))):  # fmt: skip
        for tokens in lengths:
            add(f"H{heads} T{tokens}", "also", heads, (tokens,))
    add("H96 B8 T2048", "also", 96, (2048,) * 8)
    add("H96 64 sequences of 128", "also", 96, (128,) * 64, packed=True)
    add("H96 256 sequences of 64", "also", 96, (64,) * 256, packed=True)
    add("H96 256 sequences of 1", "also", 96, (1,) * 256, packed=True)
    add("H12 300 sequences of 17", "also", 12, (17,) * 300, packed=True)
    for peer in published["few_heads"]["cases"]:
        tokens, heads, sequences = peer["T"], peer["H"], peer["N"]
        wanted_ms, hoped_ms = FEW_HEADS_GOALS[tokens, heads, sequences]
        cases.append(
            SpeedCase(
                f"few H{heads} T{tokens}" + (f" N{sequences}" if sequences > 1 else ""),
                "few-heads",
                heads,
                (tokens // sequences,) * sequences,
                packed=sequences > 1,
                with_fla=False,
                flashkda_ms=peer["flashkda_ms"],
                cudnn_ms=peer["cudnn_ms"],
                vllm_ms=peer["vllm_ms"],
                wanted_ms=wanted_ms,
                hoped_ms=hoped_ms,
            )
        )
    for name in LINEAR:
        add(name, "linear", 96, (int(name.removeprefix("H96 T")),))
    for heads in (1, 2, 4, 16, 32, 48, 128):
        add(f"H{heads} T8192", "scaling", heads, (8192,), fla=False)
    for sequences in (2, 4, 16, 32, 128, 512):
        add(f"H96 {sequences} x {8192 // sequences}", "scaling", 96, (8192 // sequences,) * sequences, packed=True,
            fla=False)  # fmt: skip
    bf16 = {"with_fla": False, "state_bytes": 2}
    cases.append(SpeedCase("H96 256 sequences of 1, bf16 states", "short", 96, (1,) * 256, packed=True, **bf16))
    add("H96 512 sequences of 16", "short", 96, (16,) * 512, packed=True)
    add(BESIDE, "short", 12, (*[1] * 16, 8192, *[1] * 16), packed=True)
    for case in [case for case in cases if case.group == "six"]:
        cases.append(
            SpeedCase(f"{case.name}, checkpoint", "checkpoints", case.heads, case.seq_lens, case.packed, with_fla=False,
                      checkpoint=True)
        )  # fmt: skip
    return {case.name: case for case in cases}


def chosen(words: list[str]) -> list[SpeedCase]:
    """The cases that words stand for: `all`, a group, or the names of cases, each case once and in the order of `all`.

    HOST stands for none.

    ValueError: a word is none of these.
    """
    cases = speed_cases()
    groups = {case.group for case in cases.values()}
    for word in words:
        if word not in {"all", HOST, *groups, *cases}:
            accepted = ", ".join(["all", *sorted({HOST, *groups}), *(repr(name) for name in cases)])
            raise ValueError(f"--cases: expected one of {accepted}, got {word!r}")
    names = {*words, *(SHORT_GOALS if "short" in words else ())}
    return [case for case in cases.values() if {"all", case.group, case.name} & names]
