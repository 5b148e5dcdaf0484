"""The plain case, from which `dataclasses.replace` makes others."""

from fuzz.cases.case import Case

PLAIN = Case(
    seq_lens=(17,),
    heads=1,
    packed=False,
    cu_seqlens_dtype="int64",
    lower_bound=-5.0,
    scale=128**-0.5,
    initial_state="fp32",
    final_state="fp32",
    in_place=False,
    layout="contiguous",
    queries="random",
    keys="random",
    values="random",
    gates="centred",
    betas="random",
    states="random",
    seed=0,
)
