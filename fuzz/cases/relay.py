"""The relay: keys and gates that hand a state from channel to channel, so that it outlives every single channel.

A sequence falls into runs of tokens. Each run of a head has one channel that keeps its state. All others decay at
the bound. The last token of a run has the key (e_a - e_b) / sqrt(2), where a is the channel of this run and b that of
the next one. With a beta of 1 and no value it leaves the mean of both rows of the state in both: half of what was in a.
So one token more and a is wiped, and b has the state. After two runs every channel has decayed to nothing, and a
quarter of the state is still there. An implementation is wrong here if it drops history by the summed
log-decay of each channel. The sum over tokens of the largest log-decay of any channel is right.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from fuzz.cases.noise import Noise

RUN_LENGTHS = (1, 3, 8, 16, 20, 40, 64)
"""Tokens of a run. One token hands on half of the state, so short runs relay over few tokens, long ones over many."""

RINGS = (2, 3, 7, 128)
"""Channels that take turns."""

CHANNEL_STEP = 37  # from a channel to the next one modulo 128; odd, so that no ring meets a channel twice


@dataclass(frozen=True)
class Relay:
    """Which channel of each token and head keeps its state, int64 `[tokens, H, 1]`, which one does next, and whether
    the token hands over, bool `[tokens, 1, 1]`. They follow from the seed alone, so that keys and gates agree.
    """

    channel: np.ndarray
    following: np.ndarray
    hands_over: np.ndarray

    @staticmethod
    def of(noise: Noise, channels: int) -> Relay:
        run, ring = noise.choice("relay.run", RUN_LENGTHS), noise.choice("relay.ring", RINGS)
        first = noise.per_sequence().integers("relay.first", 1, channels)[noise.sequence]
        number = (noise.position // run)[:, None, None]
        return Relay(
            (first + CHANNEL_STEP * (number % ring)) % channels,
            (first + CHANNEL_STEP * ((number + 1) % ring)) % channels,
            (noise.position % run == run - 1)[:, None, None],
        )


def keys(noise: Noise, channels: int) -> np.ndarray:
    """float32 `[tokens, H, K]`: between two tokens that hand over, ordinary keys or none, as the seed says."""
    relay, channel = Relay.of(noise, channels), np.arange(channels)
    handing = (channel == relay.channel).astype(np.float32) - (channel == relay.following).astype(np.float32)
    others = noise.normal("keys", channels) if noise.choice("relay.others", (True, False)) else np.float32(0)
    return np.where(relay.hands_over, handing, others)


def gates(noise: Noise, channels: int) -> np.ndarray:
    """float32 `[tokens, H, K]`: open in the channel that keeps the state, closed at the bound in all others."""
    relay = Relay.of(noise, channels)
    return np.where(np.arange(channels) == relay.channel, np.float32(-100), np.float32(100))
