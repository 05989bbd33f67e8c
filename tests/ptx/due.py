"""The FLOPs and the bytes of memory that a launch cannot avoid, by the formulas of the operations' READMEs.

The formulas see the launch's own arguments (`n_rows`, `n_cols`, `HAS_RESIDUAL`, ...), the number of its programs, and
`e`, the bytes of an element of the largest tensor passed. Sizes that no argument tells can be given: `n_keys` of a
decode step, which is 1 where the cache is empty.
"""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple


class Sizes(dict):
    """Sizes by name, read as attributes."""

    __getattr__ = dict.__getitem__


class Due(NamedTuple):
    flops: int
    n_bytes: int


def _layer_norm_forward(s: Sizes) -> Due:
    elements = s.n_rows * s.n_cols
    return Due((9 + s.HAS_RESIDUAL) * elements, (4 if s.HAS_RESIDUAL else 2) * elements * s.e)


def _layer_norm_backward(s: Sizes) -> Due:
    elements = s.n_rows * s.n_cols
    n_bytes = (3 + s.HAS_DSUM) * s.e + 2 * s.HAS_DADDED  # which is in half precision
    return Due((18 + s.HAS_DSUM) * elements, n_bytes * elements)


def _layer_norm_reduce(s: Sizes) -> Due:
    return Due(2 * s.n_partials * s.n_cols, 8 * s.n_partials * s.n_cols)


def _attention(flops_of_a_pair: int, n_tensors: int, n_statistics: int) -> Callable[[Sizes], Due]:
    """flops_of_a_pair: for each element of a head and each key that a query sees. n_statistics: float32 of a query."""

    def due(s: Sizes) -> Due:
        tokens, elements = s.n_batch_heads * s.n_queries, s.n_batch_heads * s.n_queries * s.HEAD_DIM
        # The delta of a query reads no keys.
        n_pairs = (s.n_queries + 1) / 2 if "n_keys" in s else 1
        return Due(int(flops_of_a_pair * elements * n_pairs), n_tensors * elements * s.e + 4 * n_statistics * tokens)

    return due


def _mlp_product(n_of_rows_and_cols: Callable[[Sizes], int]) -> Callable[[Sizes], Due]:
    """A product of rows and a weight, and how many tensors of (rows, cols) are read or written beside them."""

    def due(s: Sizes) -> Due:
        elements = s.n_rows * s.n_inner + s.n_inner * s.n_cols + n_of_rows_and_cols(s) * s.n_rows * s.n_cols
        return Due(2 * s.n_rows * s.n_inner * s.n_cols, elements * s.e)

    return due


def _mlp_through_dropout(s: Sizes) -> Due:
    return Due(2 * s.n_rows * s.n_cols, (1 + s.STORE_DPRODUCT) * s.n_rows * s.n_cols * s.e)


def _loss(s: Sizes) -> Due:
    elements = s.n_programs * s.n_cols  # One program has one row.
    return Due(8 * elements, (2 if s.HAS_GRADIENT else 1) * elements * s.e)


def _decode_embed(s: Sizes) -> Due:
    return Due(s.n_programs * s.n_cols, s.n_programs * s.n_cols * (2 * s.e + 4))


def _decode_product(s: Sizes) -> Due:
    return Due(2 * s.n_rows * s.n_cols * s.n_out, s.n_cols * s.n_out * s.e)


def _decode_norm(s: Sizes) -> Due:
    n_sums = (1 + s.N_PARTIALS + (s.N_PARTIALS > 0)) * 4  # float32: the stream, the partial sums, the new stream
    return Due((8 + s.N_PARTIALS) * s.n_rows * s.n_cols, s.n_rows * s.n_cols * (n_sums + s.e))


def _decode_attention(s: Sizes) -> Due:
    row_heads = s.n_programs // s.N_SPLITS
    elements = 2 * row_heads * s.get("n_keys", 1) * s.head_dim
    return Due(2 * elements, elements * s.e)


def _persistent_decode(s: Sizes) -> Due:
    n_weights = 12 * s.n_layers * s.C**2 + s.n_vocab * s.C
    return Due(2 * n_weights, n_weights * 2)


def _sampling_groups(s: Sizes) -> Due:
    n_rows = s.n_programs // -(-s.n_groups // s.BLOCK_GROUPS)
    return Due(n_rows * s.n_cols, n_rows * s.n_cols * s.e)


def _sampling_choice(s: Sizes) -> Due:
    return Due(s.n_programs * s.n_groups, 8 * s.n_programs * s.n_groups)


def _sampling_filtered(s: Sizes) -> Due:
    return Due(s.n_programs * s.n_cols, s.n_programs * s.n_cols * s.e)


FORMULAS: dict[str, Callable[[Sizes], Due]] = {
    "_layer_norm_fwd_kernel": _layer_norm_forward,
    "_layer_norm_bwd_kernel": _layer_norm_backward,
    "_layer_norm_bwd_reduce_kernel": _layer_norm_reduce,
    "_causal_attention_fwd_kernel": _attention(4, 4, 2),
    "_causal_attention_bwd_delta_kernel": _attention(2, 2, 1),
    "_causal_attention_bwd_dkdv_kernel": _attention(8, 6, 3),
    "_causal_attention_bwd_dq_kernel": _attention(6, 5, 3),
    "_gelu_mlp_fwd_hidden_kernel": _mlp_product(lambda s: 1 + s.STORE_PRE),
    "_gelu_mlp_fwd_out_kernel": _mlp_product(lambda s: 1 + s.HAS_RESIDUAL),
    "_gelu_mlp_bwd_product_kernel": _mlp_through_dropout,
    "_gelu_mlp_bwd_pre_kernel": _mlp_product(lambda s: 2 + s.STORE_HIDDEN),
    "_linear_cross_entropy_kernel": _loss,
    "_decode_embed_kernel": _decode_embed,
    "_decode_norm_product_kernel": _decode_product,
    "_decode_attention_kernel": _decode_attention,
    "_decode_project_kernel": _decode_product,
    "_decode_head_kernel": _decode_product,
    "_decode_norm_kernel": _decode_norm,
    "_decode_product_kernel": _decode_product,
    "_persistent_decode_kernel": _persistent_decode,
    "_sampling_groups_kernel": _sampling_groups,
    "_sampling_choice_kernel": _sampling_choice,
    "_sampling_filtered_choice_kernel": _sampling_filtered,
}


def due(kernel: str, arguments: Mapping[str, Any], n_programs: int, element_size: int) -> Due:
    """The FLOPs and bytes that one launch cannot avoid. arguments: its sizes and flags by name."""
    return FORMULAS[kernel](Sizes(arguments, n_programs=n_programs, e=element_size))
