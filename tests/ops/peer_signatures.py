"""Signatures of the GPU packages' functions that our adapters call, recorded from the packages' own sources.

    python -m tests.ops.peer_signatures SITE-PACKAGES      prints what differs from a tree of sources

Recorded are the names of the parameters in order, those with a default after the bar.
"""

from __future__ import annotations

import ast
import inspect
import sys
from pathlib import Path

VERSIONS = {"fla": "0.6.0", "mamba_ssm": "2.3.2.post1", "causal_conv1d": "1.7.0", "flash_attn": "2.8.3"}

RECORDED: dict[str, str] = {
    "fla.ops.gla:chunk_gla": (
        "q k v g | scale initial_state output_final_state state_v_first cu_seqlens cu_seqlens_cpu"
    ),
    "fla.ops.gla:fused_recurrent_gla": (
        "q k v | gk gv scale initial_state output_final_state reverse state_v_first cu_seqlens **"
    ),
    "fla.ops.rwkv6:chunk_rwkv6": (
        "r k v w u | scale initial_state output_final_state cu_seqlens cu_seqlens_cpu **"
    ),
    "fla.ops.rwkv6:fused_recurrent_rwkv6": (
        "r k v w u | scale initial_state output_final_state reverse cu_seqlens"
    ),
    "fla.ops.delta_rule:chunk_delta_rule": (
        "q k v beta | scale initial_state output_final_state use_qk_l2norm_in_kernel cu_seqlens "
        "cu_seqlens_cpu **"
    ),
    "fla.ops.delta_rule:fused_recurrent_delta_rule": (
        "q k v | beta scale initial_state output_final_state use_qk_l2norm_in_kernel cu_seqlens"
    ),
    "fla.ops.gated_delta_rule:chunk_gated_delta_rule": (
        "q k v g beta | scale initial_state output_final_state use_qk_l2norm_in_kernel "
        "use_beta_sigmoid_in_kernel allow_neg_eigval state_v_first cu_seqlens cu_seqlens_cpu "
        "chunk_indices cp_context **"
    ),
    "fla.ops.gated_delta_rule:fused_recurrent_gated_delta_rule": (
        "q k v | g gk gv beta scale initial_state output_final_state use_qk_l2norm_in_kernel "
        "use_gate_in_kernel A_log dt_bias use_beta_sigmoid_in_kernel allow_neg_eigval state_v_first "
        "cu_seqlens **"
    ),
    "fla.ops.kda:chunk_kda": (
        "q k v g beta | scale initial_state output_final_state use_qk_l2norm_in_kernel "
        "use_gate_in_kernel use_beta_sigmoid_in_kernel allow_neg_eigval safe_gate lower_bound "
        "disable_recompute return_intermediate_states state_v_first cu_seqlens cu_seqlens_cpu "
        "cp_context use_graph max_num_seqs **"
    ),
    "fla.ops.kda:fused_recurrent_kda": (
        "q k v g beta | A_log dt_bias scale initial_state output_final_state use_qk_l2norm_in_kernel "
        "use_gate_in_kernel use_beta_sigmoid_in_kernel allow_neg_eigval lower_bound state_v_first "
        "cu_seqlens **"
    ),
    "fla.ops.simple_gla:chunk_simple_gla": (
        "q k v | g g_gamma scale initial_state output_final_state state_v_first cu_seqlens cu_seqlens_cpu **"
    ),
    "mamba_ssm.ops.triton:mamba_chunk_scan_combined": (
        "x dt A B C chunk_size | D z dt_bias initial_states seq_idx cu_seqlens dt_softplus dt_limit "
        "return_final_states return_varlen_states"
    ),
    "causal_conv1d:causal_conv1d_fn": (
        "x weight | bias seq_idx initial_states return_final_states final_states_out activation"
    ),
    "flash_attn:flash_attn_func": (
        "q k v | dropout_p softmax_scale causal window_size softcap alibi_slopes deterministic "
        "return_attn_probs"
    ),
    "flash_attn:flash_attn_varlen_func": (
        "q k v cu_seqlens_q cu_seqlens_k max_seqlen_q max_seqlen_k | dropout_p softmax_scale causal "
        "window_size softcap alibi_slopes deterministic return_attn_probs block_table"
    ),
}


def signature(arguments: ast.arguments) -> str:
    names = [a.arg for a in (*arguments.posonlyargs, *arguments.args)]
    n = len(names) - len(arguments.defaults)
    rest = [a.arg for a in arguments.kwonlyargs]
    tail = [*names[n:], *(["*", *rest] if rest else []), *(["**"] if arguments.kwarg else [])]
    return " ".join([*names[:n], "|", *tail])


def parameters(dotted: str) -> inspect.Signature:
    """The recorded signature as one that can bind a call's arguments."""
    kinds, kind, default = [], inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.empty
    for word in RECORDED[dotted].split():
        if word == "|":
            default = None
        elif word == "*":
            kind = inspect.Parameter.KEYWORD_ONLY
        elif word == "**":
            kinds.append(inspect.Parameter("rest", inspect.Parameter.VAR_KEYWORD))
        else:
            kinds.append(inspect.Parameter(word, kind, default=default))
    return inspect.Signature(kinds)


def found_in(tree: Path) -> dict[str, str]:
    """{package.function: signature} of the recorded names that lie below `tree`."""
    out = {}
    for dotted in RECORDED:
        package, name = dotted.split(":")
        for file in sorted((tree / package.replace(".", "/")).rglob("*.py")):
            for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
                if isinstance(node, ast.FunctionDef) and node.name == name:
                    out[dotted] = signature(node.args)
    return out


if __name__ == "__main__":
    found = found_in(Path(sys.argv[1]))
    for dotted, text in found.items():
        if text != RECORDED[dotted]:
            print(f'    "{dotted}": "{text}",')
    print(f"{len(found)} of {len(RECORDED)} found")
