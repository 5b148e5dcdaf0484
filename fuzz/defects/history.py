"""Defects of memory: history is dropped where it is taken for decayed, and results of earlier calls are given again."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass, fields

import torch

from flash_kda import model
from fuzz.defects.defect import Defects, Given, remembering, staged


@dataclass(frozen=True)
class WithLogs(model.Prepared):
    """log_decay: of each token since the start of its chunk, base 2, `[n, h, 32, K]`."""

    log_decay: torch.Tensor


def with_logs(original, q, k, v, g, beta, A_log, dt_bias, lower_bound, valid):
    prepared = original(q, k, v, g, beta, A_log, dt_bias, lower_bound, valid)
    a = model.log_decay(g, A_log, dt_bias, lower_bound).where(valid[:, None, :, None], 0.0)
    values = {field.name: getattr(prepared, field.name) for field in fields(model.Prepared)}
    return WithLogs(**values, log_decay=a.cumsum(2))


def forgets(decayed: Callable[[torch.Tensor, int], torch.Tensor], every: int = 1):
    """A `recur` in which a chunk sees the chunks since the last one before which all history counts as nothing.

    decayed: from the log-decay of channels since then `[h, K]` and the number of chunks to bool `[h]`. every: chunks
    between two places where a sequence may be cut.
    """

    def recur(original, prepared, state, chunks):
        p = prepared
        O = torch.empty_like(p.V)
        total = p.log_decay[:, :, -1]
        initial = state.clone()
        for step, (sequences, now) in enumerate(chunks.steps):
            for sequence, chunk in zip(sequences.tolist(), now.tolist(), strict=True):
                first = chunk - step
                begin = torch.full(total.shape[1:2], -1)  # of each head, the chunk before which nothing counts
                since = torch.zeros_like(total[0])
                for earlier in range(chunk - 1, first - 1, -1):
                    since = since + total[earlier]
                    cut = (
                        decayed(since, chunk - earlier) & begin.eq(-1) & torch.tensor(earlier % every == first % every)
                    )
                    begin = begin.where(~cut, earlier)
                S = initial[sequence].clone()
                for each in range(first, chunk + 1):
                    S = S.where(begin.ne(each)[:, None, None], 0.0)
                    S16 = model.FORMATS.S(S)
                    U = model.FORMATS.U(model.stage_U(p.Xb[each], p.V[each], p.W[each], S16))
                    if each == chunk:
                        O[chunk] = p.Q[chunk] @ S16.mT + p.M[chunk] @ U
                    S = S * p.decay[each][:, None] + U.mT @ p.Kr[each]
                state[sequence] = S
        return O

    return recur


def each_channel_below(exponent: int):
    return lambda since, chunks: since.amax(-1) < -exponent


def forgets_inside(exponent: int):
    """Rows of a chunk before which every channel has decayed do not see the state that the chunk begins with."""

    def prepare(original, *args):
        prepared = with_logs(original, *args)
        gone = (prepared.log_decay.amax(-1, keepdim=True) < -exponent).expand_as(prepared.W)
        prepared.W[gone] = 0.0
        prepared.Q[gone] = 0.0
        return prepared

    return prepare


def tensors_of(given: Given) -> dict[str, torch.Tensor]:
    return {name: x for name, x in vars(given).items() if isinstance(x, torch.Tensor) and name != "out"}


def kept_results(key: Callable[[Given], object]):
    """Results of an earlier call whose arguments have the same key are given again."""

    def new():
        kept: dict[object, tuple] = {}

        def fill(given):
            results = [x for x in (given.out, given.final_state) if x is not None]
            name = key(given)
            if name in kept:
                for x, earlier in zip(results, kept[name], strict=True):
                    x.copy_(earlier)
            else:
                kept[name] = tuple(x.clone() for x in results)

        return None, fill

    return new


def addresses(given: Given) -> object:
    """Of each tensor its address, shape and version, which is higher after each change that PyTorch knows of."""
    return tuple(
        (name, x.data_ptr(), x.shape, x._version) for name, x in tensors_of(given).items() if name != "final_state"
    )


def identities(given: Given) -> object:
    return tuple((name, id(x)) for name, x in tensors_of(given).items())


def all_but(*names: str):
    """The addresses of these, and the contents of all others."""

    def key(given):
        found = []
        for name, x in tensors_of(given).items():
            if name == "final_state":
                continue
            contents = x.contiguous().view(torch.uint8).numpy().tobytes() if x.numel() else b""
            found.append((name, x.data_ptr(), x.shape, None if name in names else hashlib.sha256(contents).digest()))
        return tuple(found)

    return key


HISTORY = Defects("semantics")


def dropped(name: str, sentence: str, decayed: Callable[[torch.Tensor, int], torch.Tensor], every: int = 1) -> None:
    make = staged({"prepare": with_logs, "recur": forgets(decayed, every)})
    HISTORY.add(name, "accuracy continuation", make, sentence)


for exponent in (20, 60, 100, 130):
    dropped(
        f"history_dropped_below_2_to_minus_{exponent}",
        f"History is dropped where every channel has decayed below 2^-{exponent} since, in whole chunks.",
        each_channel_below(exponent),
    )
dropped(
    "history_cut_at_pieces",
    "Sequences are cut every 4 chunks, where every channel has decayed below 2^-60 since the cut before.",
    each_channel_below(60),
    every=4,
)
dropped(
    "history_of_16_chunks",
    "A chunk sees at most 512 tokens of history.",
    lambda since, chunks: torch.full(since.shape[:1], chunks == 16),
)
dropped(
    "history_dropped_by_the_mean_decay",
    "History is dropped where channels have decayed below 2^-30 in the mean.",
    lambda since, chunks: since.mean(-1) < -30,
)
for exponent in (20, 100):
    HISTORY.add(
        f"state_dropped_in_a_chunk_below_2_to_minus_{exponent}",
        "accuracy continuation",
        staged({"prepare": forgets_inside(exponent)}),
        f"A row of a chunk does not see the state before it if every channel has decayed below 2^-{exponent}.",
    )

STORAGE = Defects("time")
for name, key, sentence in (
    (
        "by_address_and_version",
        addresses,
        "Results are kept by the addresses, shapes and versions of all arguments, whatever these hold by now.",
    ),
    ("by_identity", identities, "Results are kept by the identities of all tensors."),
    *(
        (
            f"whatever_{argument.lower()}_holds",
            all_but(argument),
            f"Results are kept by the contents of all arguments but {argument}, of which only the address counts.",
        )
        for argument in ("g", "initial_state", "A_log")
    ),
):
    STORAGE.add(f"results_kept_{name}", "determinism accuracy written", remembering(kept_results(key)), sentence)
