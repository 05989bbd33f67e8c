"""Storage, FLOPs and speed limits of GPT-2 at any size, from closed formulas: nothing is built or run.

In the formulas: L layers, C channels, H heads, F hidden width of the MLP, V vocabulary, B batch, T tokens. Counts are
exact integers. Cross-attention has parameters, but its work depends on the encoder: FLOPs, caches and speed limits are
those of a decoder without encoder states.
"""

from ..checkpoint.fit import DEFAULT_GROUP_SIZE
from .shapes import Shape, count_parameters

# Measured on one H200: a large copy (bytes/s) and a large bf16 matrix product (FLOP/s).
H200_BANDWIDTH = 4.3e12
H200_MATRIX_RATE = 7.9e14

# Dense bf16 FLOP/s with float32 sums, from the makers' data sheets, by a part of the name that torch gives the device.
_PEAK_RATES = {
    "A100": 312e12,
    "H100 PCIe": 756e12,
    "H100 80GB HBM3": 989e12,
    "H200 NVL": 835e12,
    "H200": 989e12,
    "L4": 121e12,
    "L40S": 362e12,
}


def peak_rate(device_name: str) -> float | None:
    """Peak bf16 FLOP/s of a GPU; None for one that is not in the table."""
    words = f" {device_name} ".replace("-", " ")
    return next((rate for part, rate in _PEAK_RATES.items() if f" {part} " in words), None)


# --- memory ---------------------------------------------------------------------------------------------------------


def weight_bytes(shape: Shape) -> dict[str, int]:
    """Bytes of the weights in fp32, bf16, int8 and int4, each without and with the head.

    int8: what `fastgpt.quantize` makes of the model in bf16: the matrices of attention, cross-attention and MLP in int8
    with one fp32 scale per output column. int8_head: the head as well, beside the token table, which stays in bf16.
    int4, int4_head: the same with bits=4, where the widths are multiples of its groups.
    """
    blocks = _products_of_blocks(shape, n_attentions=2 if shape.cross_attention else 1)
    total = count_parameters(shape).total
    n_head = shape.vocab_size * shape.n_embd
    found = {"fp32": 4 * total, "bf16": 2 * total}
    for bits in roundings(shape):
        found[f"int{bits}"] = _product_bytes(*blocks, bits) + 2 * (total - blocks[0])
        head = _product_bytes(n_head, shape.vocab_size, bits) - (0 if shape.tied_head else 2 * n_head)
        found[f"int{bits}_head"] = found[f"int{bits}"] + head
    return found


def roundings(shape: Shape) -> tuple[int, ...]:
    """The bits to which the products of a model can be rounded."""
    return (8, 4) if shape.n_embd % DEFAULT_GROUP_SIZE == shape.hidden_width % DEFAULT_GROUP_SIZE == 0 else (8,)


def _product_bytes(n_elements: int, n_columns: int, bits: int) -> int:
    """The bytes of rounded matrices, with an fp32 scale for each output column."""
    return n_elements * bits // 8 + (n_elements // DEFAULT_GROUP_SIZE if bits == 4 else 0) + 4 * n_columns


def _products_of_blocks(shape: Shape, n_attentions: int = 1) -> tuple[int, int]:
    """Elements and output columns of the matrices of attention and MLP, in all blocks."""
    C, F = shape.n_embd, shape.hidden_width
    n_elements, n_columns = n_attentions * 4 * C**2 + 2 * C * F, n_attentions * 4 * C + F + C
    return shape.n_layer * n_elements, shape.n_layer * n_columns


def kv_cache_bytes(shape: Shape, tokens: int = 1, *, batch: int = 1, element_bytes: int = 2) -> int:
    """Bytes of the keys and values of `tokens` tokens in each sequence: 2*L*C elements per token."""
    return batch * tokens * 2 * shape.n_layer * shape.n_embd * element_bytes


def training_state_bytes(n_parameters: int, precision: str = "fp32") -> dict[str, int]:
    """Bytes that training with AdamW holds at any batch size, by part.

    precision: "fp32", or "mixed", which has weights and gradients in bf16, and a master copy and moments in fp32. Both
    take 16 bytes per parameter. Raises ValueError on another.
    """
    sizes = {
        "fp32": {"weights": 4, "gradients": 4, "master_weights": 0, "moments": 8},
        "mixed": {"weights": 2, "gradients": 2, "master_weights": 4, "moments": 8},
    }
    if precision not in sizes:
        raise ValueError(f"unknown precision {precision!r}: choose one of {', '.join(sizes)}")
    return {part: size * n_parameters for part, size in sizes[precision].items()}


# --- FLOPs and bytes moved ------------------------------------------------------------------------------------------


def forward_flops(shape: Shape, tokens: int) -> int:
    """FLOPs of the matrix products for one sequence, with all logits: 24*T*L*C^2 + 2*T*(T+1)*L*C + 2*T*V*C.

    The 24 is 8 for attention's own matrices and 4*F/C for the MLP, where F = 4*C. Attention is causal: query i reads i
    keys, (T+1)/2 on average, where a product that ignored the mask would read T.
    """
    C, L = shape.n_embd, shape.n_layer
    blocks = tokens * L * (8 * C**2 + 4 * C * shape.hidden_width)
    return blocks + 2 * tokens * (tokens + 1) * L * C + 2 * tokens * shape.vocab_size * C


def training_flops(shape: Shape, tokens: int) -> int:
    """FLOPs of forward and backward for one sequence: each product has two in backward. Nothing is recomputed."""
    return 3 * forward_flops(shape, tokens)


def adamw_bytes(n_parameters: int) -> int:
    """Bytes that an fp32 AdamW step moves: weight, gradient and two moments are read, all but the gradient written."""
    return 28 * n_parameters


def decode_bytes(
    shape: Shape,
    batch: int,
    context: int,
    *,
    element_bytes: int = 2,
    block_bits: int | None = None,
    head_bits: int | None = None,
) -> int:
    """Bytes read to decode one token of each sequence: every weight once, and the keys and values of the context.

    Weights: L*(4*C^2 + 2*C*F + 9*C + F) + 2*C + V*C elements; where F = 4*C, a layer has 12*C^2 + 13*C.
    block_bits: 8 or 4 after `fastgpt.quantize`: of each of a layer's 4*C^2 + 2*C*F elements, besides an fp32 scale for
    each of its 5*C + F columns and, with 4 bits, a byte for every 64 elements. head_bits: the same for the V*C elements
    and V columns of the head. None where an element has element_bytes.
    """
    C, F, V = shape.n_embd, shape.hidden_width, shape.vocab_size

    def product_bytes(n_matrix: int, n_columns: int, bits: int | None) -> int:
        return n_matrix * element_bytes if bits is None else _product_bytes(n_matrix, n_columns, bits)

    products = product_bytes(*_products_of_blocks(shape), block_bits) + product_bytes(V * C, V, head_bits)
    vectors = (shape.n_layer * (9 * C + F) + 2 * C) * element_bytes
    return products + vectors + kv_cache_bytes(shape, context, batch=batch, element_bytes=element_bytes)


# --- ceilings -------------------------------------------------------------------------------------------------------


def decode_ceiling(
    shape: Shape,
    bandwidth: float,
    batch: int,
    context: int,
    *,
    element_bytes: int = 2,
    block_bits: int | None = None,
    head_bits: int | None = None,
) -> float:
    """Tokens/s of the whole batch when memory bandwidth is the only limit. bandwidth: bytes/s."""
    n_bytes = decode_bytes(
        shape, batch, context, element_bytes=element_bytes, block_bits=block_bits, head_bits=head_bits
    )
    return batch * bandwidth / n_bytes


def prefill_ceiling(shape: Shape, matrix_rate: float, tokens: int) -> float:
    """Tokens/s of a forward pass with all logits, when matrix products are the only limit. matrix_rate: FLOP/s."""
    return tokens * matrix_rate / forward_flops(shape, tokens)


def training_ceiling(shape: Shape, matrix_rate: float, tokens: int) -> float:
    """Tokens/s of forward and backward, when matrix products are the only limit. matrix_rate: FLOP/s."""
    return tokens * matrix_rate / training_flops(shape, tokens)
