"""What a training step keeps from forward to backward, on the kernels and in torch, from closed formulas.

C channels, H heads, F hidden width of the MLP, V vocabulary. A tensor that several operations save counts once. The
parameters, the seeds of dropout (8 bytes each) and the scalars of the loss are not counted. Layers are those of a
decoder without cross-attention.
"""

from .shapes import Shape

# By precision: bytes of an element of the residual stream, and of an element that a product reads or makes.
PRECISIONS = {"bf16": (2, 2), "autocast": (4, 2), "fp32": (4, 4)}


def layer_saved_bytes(
    shape: Shape,
    precision: str = "bf16",
    *,
    dropout: bool = False,
    recompute_norms: bool = False,
    device_type: str = "cuda",
) -> dict[str, int]:
    """Bytes that one layer on the kernels saves for backward for each token, by tensor.

    In bf16 they add up to 16*C + 2*F + 8*H: where F = 4*C, 24*C + 8*H, or 20*C + 8*H with recompute_norms. Both norms
    save only their input, because backward computes the statistics again; the products that read the norms' results
    save those. The MLP saves no hidden values, because backward computes them again. Attention and the MLP draw their
    dropout again from a seed, but the dropout after attention's projection is torch's, which keeps a mask.
    precision: "bf16" (or fp16) for weights and activations alike, "autocast" for fp32 weights under autocast to bf16,
    or "fp32". dropout: whether the model drops anywhere. recompute_norms: whether backward computes the results of the
    norms again (`config.recompute_norms`). device_type: torch's masks are bool on a GPU, and on a CPU have the dtype of
    what they mask. Raises ValueError on another precision.
    """
    C, (stream, element) = shape.n_embd, _element_bytes(precision)
    saved = {
        "input": C * stream,
        "normalised input": C * element,
        "q, k, v": 3 * C * element,
        "attended values": C * element,
        "softmax statistics": 2 * 4 * shape.n_head,
        "sum with the residual": C * stream,
        "normalised sum": C * element,
        "MLP before its activation": shape.hidden_width * element,
    }
    if recompute_norms:
        del saved["normalised input"], saved["normalised sum"]
    if dropout:
        saved["dropout mask"] = C * _mask_bytes(element, device_type)
    return saved


def saved_bytes(
    shape: Shape,
    batch: int,
    tokens: int,
    precision: str = "bf16",
    *,
    dropout: bool = False,
    checkpointing: bool = False,
    recompute_norms: bool = False,
    device_type: str = "cuda",
) -> dict[str, int]:
    """Bytes that a training step on the kernels saves for backward, by part. There are no logits.

    Every layer saves `layer_saved_bytes`; under autocast also a copy of its matrices and of the MLP's first bias. The
    loss saves its input and the labels (for second derivatives), the gradient of its input and, in fp32, the gradient
    of the (V, C) table.
    checkpointing: layers save only their input, and backward computes one layer at a time again, with its norms.
    The other arguments and errors as in `layer_saved_bytes`.
    """
    C, F, L = shape.n_embd, shape.hidden_width, shape.n_layer
    rows, (stream, element) = batch * tokens, _element_bytes(precision)
    layer_input = rows * C * stream
    again = recompute_norms and not checkpointing
    saved = layer_saved_bytes(shape, precision, dropout=dropout, recompute_norms=again, device_type=device_type)
    layer = rows * sum(saved.values())
    weight_copies = (4 * C**2 + 2 * C * F + F) * element if precision == "autocast" else 0
    return {
        "token_and_position_ids": 8 * (rows + tokens),
        "embedding_dropout": rows * C * _mask_bytes(stream, device_type) if dropout else 0,
        "layers": L * (layer_input if checkpointing else layer),
        "weight_copies": 0 if checkpointing else L * weight_copies,
        "layer_computed_again": layer - layer_input + weight_copies if checkpointing else 0,
        "final_norm": layer_input,
        "loss": layer_input + 8 * rows + rows * C * element + 4 * shape.vocab_size * C,
    }


def _element_bytes(precision: str) -> tuple[int, int]:
    if precision not in PRECISIONS:
        raise ValueError(f"unknown precision {precision!r}: choose one of {', '.join(PRECISIONS)}")
    return PRECISIONS[precision]


def _mask_bytes(element_bytes: int, device_type: str) -> int:
    return element_bytes if device_type == "cpu" else 1


def activation_bytes(
    shape: Shape,
    batch: int,
    tokens: int,
    *,
    element_bytes: int = 2,
    checkpointing: bool = False,
    recompute_norms: bool = False,
    full_logits: bool = False,
) -> dict[str, int]:
    """Bytes that a training step in torch, without dropout, keeps from forward to backward, by part.

    A row is one token of one sequence. A block keeps 8*C + 2*F elements per row: its input, the normalised input, q, k,
    v, the attended values, the sum with the residual and its normalised form, and the MLP before and after its
    activation; and 4 + H statistics per row in fp32: mean and reciprocal deviation of two norms, the log-sum-exp of
    each head. No (T, T) scores are kept.
    checkpointing: blocks keep only their input, and backward recomputes one block at a time.
    recompute_norms: without checkpointing, blocks keep 2*C elements less: neither normalised tensor.
    full_logits: the loss keeps its normalised input, the logits, their log-softmax in fp32, and the labels. Otherwise
    `linear_cross_entropy` keeps its input and the labels (for second derivatives), the gradient of its input and, in
    fp32, the gradient of the (V, C) table.
    Temporaries that live within one operation, forward or backward, are not counted; nor is the fp32 copy that a CPU
    makes to normalise bf16.
    """
    C, F, V, L = shape.n_embd, shape.hidden_width, shape.vocab_size, shape.n_layer
    rows = batch * tokens
    stream = rows * C * element_bytes
    n_elements = (6 if recompute_norms and not checkpointing else 8) * C + 2 * F
    block = rows * (n_elements * element_bytes + (4 + shape.n_head) * 4)
    return {
        "token_and_position_ids": 8 * (rows + tokens),
        "blocks": L * (stream if checkpointing else block),
        "block_computed_again": block - stream if checkpointing else 0,
        "final_norm": stream + 8 * rows,
        "loss": stream + 8 * rows + (rows * V * (element_bytes + 4) if full_logits else stream + 4 * V * C),
    }
