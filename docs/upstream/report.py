"""A report for the authors of a KDA kernel: one case, the kernel, and the recurrence in float64. Needs PyTorch alone.

    python report.py cudnn relay          # pip install nvidia-cudnn-frontend
    python report.py flashkda equal-keys  # FlashKDA's Python package
    python report.py vllm faint-betas     # pip install vllm
    python report.py model relay          # fp32 on a CPU: what a right kernel prints

Per sequence and head, with the state S of shape K x V (stored V x K):

    S' = diag(exp(a_t)) S        S = S' + b_t k_t (v_t - S'^T k_t)^T        o_t = scale S^T q_t
    a_t = lower_bound sigmoid(exp(A_log) (g_t + dt_bias))        b_t = sigmoid(beta_t)        q, k: normalised rows
"""

import argparse

import torch

D = 128


def case(name, device):
    """One sequence of one head: q, k, v, g, beta, A_log, dt_bias, initial_state."""
    tokens = {"relay": 512, "equal-keys": 256, "huge-state": 33, "faint-betas": 64}[name]
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
    tensors = [x.to(device, torch.bfloat16).contiguous() for x in (q, k, v, g, beta)]
    zeros = torch.zeros(1, device=device), torch.zeros(1, D, device=device)
    return (*tensors, *zeros, state.to(device))


def exact(q, k, v, g, beta, A_log, dt_bias, state, scale, lower_bound):
    q, k, v, g, beta = (x[0, :, 0].double() for x in (q, k, v, g, beta))
    q, k = (x / (x.square().sum(-1, keepdim=True) + 1e-6).sqrt() for x in (q, k))
    decay = (lower_bound * torch.sigmoid(A_log.double().exp() * (g + dt_bias.double()))).exp()
    S, out = state[0, 0].double().mT.clone(), torch.empty_like(v)
    for t in range(len(q)):
        S = decay[t, :, None] * S
        S = S + beta[t].sigmoid() * k[t, :, None] * (v[t] - S.mT @ k[t])
        out[t] = scale * S.mT @ q[t]
    return out, S.mT


def cudnn(q, k, v, g, beta, A_log, dt_bias, state, scale, lower_bound):
    from cudnn.linear_attention import kimi_delta_attention

    ends = torch.tensor([0, q.shape[1]], dtype=torch.int32, device=q.device)
    options = {"use_qk_l2norm_in_kernel": True, "use_beta_sigmoid_in_kernel": True, "safe_gate": True}
    options |= {"gate_lower_bound": lower_bound, "a_log": A_log, "dt_bias": dt_bias, "output_final_state": True}
    with torch.inference_mode():
        out, final = kimi_delta_attention(
            *(x[0] for x in (q, k, v, g, beta)), ends, scale=scale, initial_state=state, **options
        )
    return out[:, 0], final[0, 0]


def flashkda(q, k, v, g, beta, A_log, dt_bias, state, scale, lower_bound):
    import flash_kda

    out, final = torch.empty_like(v), torch.empty_like(state)
    flash_kda.fwd(q, k, v, g, beta, scale, out, A_log, dt_bias, lower_bound, initial_state=state, final_state=final)
    return out[0, :, 0], final[0, 0]


def vllm(q, k, v, g, beta, A_log, dt_bias, state, scale, lower_bound):
    import vllm._flashkda_C  # noqa: F401 (registers the operators)

    operators, out, final = torch.ops._flashkda_C, torch.empty_like(v), torch.empty_like(state)
    workspace = torch.empty(operators.get_workspace_size(q.shape[1], 1, 1), dtype=torch.uint8, device=q.device)
    operators.fwd(q, k, v, g, beta, scale, out, workspace, A_log, dt_bias, lower_bound, state, final)
    return out[0, :, 0], final[0, 0]


def model(*arguments):
    out, final = exact(*arguments)
    return out.bfloat16(), final.float()


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("kernel", choices=("cudnn", "flashkda", "vllm", "model"))
    parser.add_argument("case", choices=("relay", "equal-keys", "huge-state", "faint-betas"))
    options = parser.parse_args()
    device = "cpu" if options.kernel == "model" else "cuda"
    arguments = (*case(options.case, device), 1.0, -5.0)
    found, right = globals()[options.kernel](*arguments), exact(*arguments)
    for name, x, y in zip(("out", "final state"), found, right, strict=True):
        error = (x.double() - y).norm() / y.norm()
        token = ((x.double() - y).norm(dim=-1) / y.norm(dim=-1).clamp_min(1e-300)).max()
        print(f"{options.case}, {name}: relative RMS error {error:.3g}, worst row {token:.3g}")


if __name__ == "__main__":
    main()
