"""A script in a finding's folder: a call of the target on the saved inputs, without this harness."""

from __future__ import annotations

from fuzz.cases.case import Case
from fuzz.targets.promises import bare

BUILT_IN = {
    "flash_kda": "from flash_kda import fwd",
    "model": "from fuzz.targets.registry import load_target\nfwd = load_target('model').fwd",
    "fla.chunk": "from fuzz.targets.fla import chunk as fwd",
    "fla.recurrent": "from fuzz.targets.fla import recurrent as fwd",
    "fla.naive": "from fuzz.targets.fla import naive as fwd",
}

FUNCTION = "fwd = getattr(kernel, 'fwd', kernel)  # of a Target or a function"

DTYPE_TEXTS = {"bf16": "torch.bfloat16", "fp32": "torch.float32"}

# What lies between the slices of a larger tensor is NaN, as it was in the call that failed.
LAYOUT = """\
bases = {}
for name, at in json.loads(safe_open(PATH, "pt").metadata()["layout"]).items():
    fill = torch.nan if x[name].is_floating_point() else -1
    base = bases.setdefault(at["base"], torch.full((at["size"],), fill, dtype=x[name].dtype, device=device))
    x[name] = base.as_strided(x[name].shape, at["stride"], at["offset"]).copy_(x[name])
"""


def repro(failure, folder: str = "") -> str:
    """The script of a failure (`fuzz.campaign.findings.Failure`).

    folder: the working directory of its campaign, where the kernel is looked for after the present one.
    """
    case: Case = failure.case
    strided = case.layout != "contiguous"
    state = "None"
    if case.in_place:
        state = 'x["initial_state"]'
    elif case.final_state is not None:
        shape = (case.n_seqs, case.heads, 128, 128)
        state = f"torch.full({shape}, torch.nan, dtype={DTYPE_TEXTS[case.final_state]}, device=device)"
    device = "cpu" if failure.target == "model" else '"cuda" if torch.cuda.is_available() else "cpu"'
    lines = [
        f'"""{failure.target} on the inputs of this finding ({failure.check["name"]}), without the harness."""',
        f"import {'json, ' * strided}pathlib, sys, torch",
        "from safetensors import safe_open" * strided,
        "from safetensors.torch import load_file",
        f"sys.path[:0] = {['', folder] if folder else ['']}  # where the kernel is",
        kernel(failure.target),
        f"device = {device if device != 'cpu' else repr(device)}",
        'x = load_file(PATH := pathlib.Path(__file__).with_name("inputs.safetensors"), device=device)',
        LAYOUT.rstrip() if strided else "",
        'out = torch.full_like(x["v"], torch.nan, memory_format=torch.contiguous_format)',
        f"final_state = {state}",
        f'fwd(x["q"], x["k"], x["v"], x["g"], x["beta"], {case.scale!r}, out, x["A_log"], x["dt_bias"],',
        f'    {case.lower_bound!r}, x.get("initial_state"), final_state, x.get("cu_seqlens"))',
        'print(out, final_state, sep="\\n")',
    ]
    return "\n".join(line for line in lines if line) + "\n"


def kernel(target: str) -> str:
    """The lines that import the function of a target as `fwd`."""
    target = bare(target)
    built_in = BUILT_IN.get(target)
    if built_in is not None:
        return built_in
    module, _, name = target.rpartition(":")
    if module.endswith(".py"):
        return f"import runpy\nkernel = runpy.run_path({module!r})[{name!r}]\n{FUNCTION}"
    return f"from {module} import {name} as kernel\n{FUNCTION}"
