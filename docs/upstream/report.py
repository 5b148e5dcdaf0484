"""A report for the authors of a KDA kernel: one case, the kernel, and the recurrence in float64. Needs PyTorch alone.

    python report.py cudnn relay          # pip install nvidia-cudnn-frontend
    python report.py flashkda equal-keys  # FlashKDA's Python package
    python report.py flashkda neighbour   # two sequences, of which the second is NaN
    python report.py vllm faint-betas     # pip install vllm
    python report.py fla past-the-end     # pip install flash-linear-attention; an error is expected
    python report.py model relay          # fp32 on a CPU: what a right kernel prints

Per sequence and head, with the state S of shape K x V (stored V x K):

    S' = diag(exp(a_t)) S        S = S' + b_t k_t (v_t - S'^T k_t)^T        o_t = scale S^T q_t
    a_t = lower_bound sigmoid(exp(A_log) (g_t + dt_bias))        b_t = sigmoid(beta_t)        q, k: normalised rows
"""

import argparse

import torch

D = 128
TOKENS = {"relay": 512, "equal-keys": 256, "huge-state": 33, "faint-betas": 64, "neighbour": 513, "past-the-end": 3}


def case(name, device):
    """One sequence of one head, and behind it perhaps another: the ends of sequences as they are given, and q, k, v, g,
    beta, A_log, dt_bias, initial_state."""
    tokens = TOKENS[name]
    numbers = torch.Generator().manual_seed(0)

    def normal(*shape):
        return torch.randn(shape, generator=numbers)

    q, k, v = (normal(1, tokens, 1, D) for _ in range(3))
    g, beta, state = normal(1, tokens, 1, D), normal(1, tokens, 1), 0.1 * normal(1, 1, D, D)
    if name == "relay":  # runs of 40 tokens, each with one channel that does not decay; its state is handed to the next
        k, g, beta = torch.zeros_like(k), torch.full_like(g, 100.0), torch.full_like(beta, 20.0)
        for t in range(tokens):
            here, following = 37 * (t // 40) % D, 37 * (t // 40 + 1) % D
            g[0, t, 0, here] = -100.0
            if t % 40 == 39:
                k[0, t, 0, here], k[0, t, 0, following] = 1.0, -1.0
        v *= 0.0
    elif name == "equal-keys":
        k, g, beta = k[:, :1].expand_as(k), torch.full_like(g, -20.0), torch.full_like(beta, 6.0)
    elif name == "huge-state":
        state *= 1e30
    elif name == "faint-betas":
        beta, state = beta - 16, 0 * state
    ends = [0, tokens]
    if name == "past-the-end":
        ends = [0, tokens + 1]
    elif name == "neighbour":
        ends = [0, tokens, tokens + 16]
        q, k, v, g, beta = (torch.cat([x, torch.full_like(x[:, :16], torch.nan)], 1) for x in (q, k, v, g, beta))
        state = torch.cat([state, torch.full_like(state, torch.nan)])
    tensors = [x.to(device, torch.bfloat16).contiguous() for x in (q, k, v, g, beta)]
    zeros = torch.zeros(1, device=device), torch.zeros(1, D, device=device)
    return torch.tensor(ends, device=device), (*tensors, *zeros, state.to(device))


def exact(tokens, q, k, v, g, beta, A_log, dt_bias, state, scale, lower_bound):
    """Of the first sequence: out [T, V], and the final state [V, K]."""
    q, k, v, g, beta = (x[0, :tokens, 0].double() for x in (q, k, v, g, beta))
    q, k = (x / (x.square().sum(-1, keepdim=True) + 1e-6).sqrt() for x in (q, k))
    decay = (lower_bound * torch.sigmoid(A_log.double().exp() * (g + dt_bias.double()))).exp()
    S, out = state[0, 0].double().mT.clone(), torch.empty_like(v)
    for t in range(len(q)):
        S = decay[t, :, None] * S
        S = S + beta[t].sigmoid() * k[t, :, None] * (v[t] - S.mT @ k[t])
        out[t] = scale * S.mT @ q[t]
    return out, S.mT


def cudnn(ends, q, k, v, g, beta, A_log, dt_bias, state, scale, lower_bound):
    from cudnn.linear_attention import kimi_delta_attention

    options = {"use_qk_l2norm_in_kernel": True, "use_beta_sigmoid_in_kernel": True, "safe_gate": True}
    options |= {"gate_lower_bound": lower_bound, "a_log": A_log, "dt_bias": dt_bias, "output_final_state": True}
    with torch.inference_mode():
        out, final = kimi_delta_attention(
            *(x[0] for x in (q, k, v, g, beta)), ends.int(), scale=scale, initial_state=state, **options
        )
    return out[:, 0], final[0, 0]


def flashkda(ends, q, k, v, g, beta, A_log, dt_bias, state, scale, lower_bound):
    import flash_kda

    out, final = torch.empty_like(v), torch.empty_like(state)
    states = {"initial_state": state, "final_state": final}
    flash_kda.fwd(q, k, v, g, beta, scale, out, A_log, dt_bias, lower_bound, cu_seqlens=ends, **states)
    return out[0, :, 0], final[0, 0]


def vllm(ends, q, k, v, g, beta, A_log, dt_bias, state, scale, lower_bound):
    import vllm._flashkda_C  # noqa: F401 (registers the operators)

    operators, out, final = torch.ops._flashkda_C, torch.empty_like(v), torch.empty_like(state)
    workspace = torch.empty(
        operators.get_workspace_size(q.shape[1], 1, len(ends) - 1), dtype=torch.uint8, device=q.device
    )
    operators.fwd(q, k, v, g, beta, scale, out, workspace, A_log, dt_bias, lower_bound, state, final, ends.int())
    return out[0, :, 0], final[0, 0]


def fla(ends, q, k, v, g, beta, A_log, dt_bias, state, scale, lower_bound):
    from fla.ops.kda import chunk_kda

    options = {"use_qk_l2norm_in_kernel": True, "use_gate_in_kernel": True, "use_beta_sigmoid_in_kernel": True}
    options |= {"safe_gate": True, "lower_bound": lower_bound, "A_log": A_log, "dt_bias": dt_bias.flatten()}
    options |= {"output_final_state": True, "state_v_first": True, "cu_seqlens": ends}
    with torch.no_grad():
        out, final = chunk_kda(q, k, v, g, beta, scale=scale, initial_state=state, **options)
    return out[0, :, 0], final[0, 0]


def model(ends, q, *others):
    if ends[-1] != q.shape[1]:
        raise ValueError(f"cu_seqlens: expected the last offset to be {q.shape[1]}, got {int(ends[-1])}")
    out, final = exact(int(ends[1]), q, *others)
    return out.bfloat16(), final.float()


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("kernel", choices=("cudnn", "flashkda", "vllm", "fla", "model"))
    parser.add_argument("case", choices=TOKENS)
    options = parser.parse_args()
    device = "cpu" if options.kernel == "model" else "cuda"
    ends, tensors = case(options.case, device)
    tokens, arguments = TOKENS[options.case], (*tensors, 1.0, -5.0)
    if options.case == "past-the-end":
        try:
            globals()[options.kernel](ends, *arguments)
            torch.zeros(1, device=device).cpu()  # an error of a GPU shows later
        except ValueError as error:
            raise SystemExit(f"past-the-end: right, an error: {error}") from None
        raise SystemExit(f"past-the-end: nothing was raised for cu_seqlens = {ends.tolist()} of {tokens} tokens")
    found, right = globals()[options.kernel](ends, *arguments), exact(tokens, *arguments)
    found = found[0][:tokens], found[1]
    for name, x, y in zip(("out", "final state"), found, right, strict=True):
        error = (x.double() - y).norm() / y.norm()
        token = ((x.double() - y).norm(dim=-1) / y.norm(dim=-1).clamp_min(1e-300)).max()
        print(f"{options.case}, {name}: relative RMS error {error:.3g}, worst row {token:.3g}")


if __name__ == "__main__":
    main()
