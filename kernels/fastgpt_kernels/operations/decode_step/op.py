"""One decode step of GPT-2: the logits of the newest token of every row, with keys and values added to a static cache.

A few rows go through five fused kernels per layer. More rows go through seven, in which the norms are kernels of their
own, or, where these do not run, through torch's products around the same attention kernel. Nothing waits for the
device, so that a CUDA graph can capture the step.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
import triton
from torch import Tensor

from ...common import activations, chip
from ...common.decode_weights import DecodeLayer, DecodeWeights, Matrix
from ...common.int4 import Int4Matrix
from ...common.launch import cdiv, launch
from ..layer_norm import op as layer_norm
from . import tiles
from .kernels import (
    _decode_attention_kernel,
    _decode_embed_kernel,
    _decode_head_kernel,
    _decode_norm_product_kernel,
    _decode_project_kernel,
)
from .many_rows_kernels import _decode_norm_kernel, _decode_product_kernel

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
MAX_HEAD_DIM = 128


class DecodeStep:
    """The step for one batch size, with its scratch memory. It keeps no weights, only their sizes.

    weights: a model's own tensors, dense, on one device, of one dtype but for rounded matrices. n_rows: B. n_slots: T
    of the caches. one_sequence: the rows are consecutive newest tokens of one sequence, which share the cache of one
    row.
    """

    @staticmethod
    def obstacle(weights: DecodeWeights) -> str | None:
        """Why the kernels cannot decode with these weights; None when they can."""
        n_channels = weights.wte.shape[1]
        if weights.wte.dtype not in DTYPES:
            return f"there is no decode kernel for {weights.wte.dtype}"
        if n_channels // weights.n_heads > MAX_HEAD_DIM:
            return f"heads of {n_channels // weights.n_heads} are larger than {MAX_HEAD_DIM}"
        if not layer_norm.supports(weights.wte):
            return f"rows of {n_channels} channels are too wide for the layer norm kernel"
        return None

    def __init__(self, weights: DecodeWeights, n_rows: int, n_slots: int, *, one_sequence: bool = False):
        self.n_rows, self.n_heads, self.eps = n_rows, weights.n_heads, weights.eps
        self.block_new = triton.next_power_of_2(n_rows) if one_sequence else 0
        self.n_channels, self.n_hidden = weights.wte.shape[1], weights.layers[0].fc_weight.shape[1]
        self.device = weights.wte.device
        self.architecture = chip.architecture(self.device)
        self.overlap = chip.overlaps_launches(self.device)
        operand = _operand(weights.layers[0].fc_weight)
        element_size, group = operand.values.element_size(), operand.group
        self.is_fused = n_rows <= tiles.decode_max_rows(self.n_channels, element_size, self.architecture, group)
        self.is_on_kernels = self.is_fused or tiles.decode_multiplies(n_rows, element_size, self.architecture)
        n_splits = tiles.decode_splits(n_rows * weights.n_heads, n_slots, self.architecture)
        self.n_splits = n_splits if self.is_fused else 1

        new = weights.wte.new_empty
        self.normalised = new(n_rows, self.n_channels)
        self.qkv, self.hidden = new(n_rows, 3 * self.n_channels), new(n_rows, self.n_hidden)
        # The output of attention, or the sums of its splits.
        if self.n_splits == 1:
            self.mixed = new(n_rows, self.n_channels)
        else:
            self.mixed = new(self.n_splits, n_rows, self.n_channels, dtype=torch.float32)
        self.peak, self.total = new(2, self.n_splits, n_rows * weights.n_heads, dtype=torch.float32)
        # Two copies of the stream: one is read while the other is written.
        self.streams = new(2, n_rows, self.n_channels, dtype=torch.float32)
        # Of a product into the stream, by the length of its inner axis: its parts, and the columns of a part.
        self.parts = {
            n: tiles.decode_parts(n, self.n_channels, group)
            if self.is_fused
            else tiles.decode_product_parts(n_rows, n, self.n_channels)
            for n in (self.n_channels, self.n_hidden)
        }
        n_parts = max(n for n, _ in self.parts.values())
        self.partial = new(n_parts, n_rows, self.n_channels, dtype=torch.float32)

    def decode(
        self, weights: DecodeWeights, cache: Tensor,
        tokens: Tensor, positions: Tensor, slots: Tensor, starts: Tensor, logits: Tensor,
    ) -> None:  # fmt: skip
        """Fill logits (B, V), float32, and append to the cache (L, 2, B, H, T, D), keys before values.

        tokens, positions, slots, starts: (B,) int64. The keys and values of a token go to its slot, unless that lies
        outside the cache, and it attends to the slots from its row's start up to its own. With one sequence, slots are
        consecutive.
        Ids and positions outside their tables are clamped, because an engine starts steps before it reads the tokens.
        """
        steps = self._decode_on_kernels if self.is_on_kernels else self._decode_with_products
        steps(weights, cache, tokens, positions, slots, starts, logits)

    # --- on kernels ---

    def _decode_on_kernels(
        self, weights: DecodeWeights, cache: Tensor,
        tokens: Tensor, positions: Tensor, slots: Tensor, starts: Tensor, logits: Tensor,
    ) -> None:  # fmt: skip
        launch(
            _decode_embed_kernel, self.n_rows,
            tokens, positions, weights.wte, weights.wpe, self.streams[0],
            n_tokens=weights.wte.shape[0], n_positions=weights.wpe.shape[0], n_cols=self.n_channels,
            BLOCK_COLS=triton.next_power_of_2(self.n_channels), **self._launch_options(4),
        )  # fmt: skip
        stream, spare = self.streams
        n_parts, part_bias = 0, None
        for layer, memory in zip(weights.layers, cache, strict=True):
            norm = layer.ln_1_weight, layer.ln_1_bias
            self._norm_product(
                stream, n_parts, part_bias, spare, *norm, layer.qkv_weight, layer.qkv_bias, "none", self.qkv
            )
            stream, spare = (spare, stream) if n_parts else (stream, spare)
            self._attend(layer, memory, slots, starts)
            n_parts = self._project(self.mixed, self.n_splits, layer.proj_weight)

            norm = layer.ln_2_weight, layer.ln_2_bias
            self._norm_product(
                stream, n_parts, layer.proj_bias, spare, *norm,
                layer.fc_weight, layer.fc_bias, weights.activation, self.hidden,
            )  # fmt: skip
            stream, spare = spare, stream
            n_parts, part_bias = self._project(self.hidden, 1, layer.mlp_proj_weight), layer.mlp_proj_bias
        self._head(weights, stream, spare, n_parts, part_bias, logits)

    def _launch_options(self, num_warps: int) -> dict[str, int | bool]:
        options = {"num_warps": num_warps, "OVERLAP": self.overlap}
        return options | ({"launch_pdl": True} if self.overlap else {})

    def _tile(self, kernel: str, n_cols: int, operand: "_Operand") -> tuple[tiles.DecodeTile, dict[str, int | bool]]:
        size = operand.values.element_size()
        tile = tiles.decode_tile(kernel, self.n_rows, n_cols, size, self.architecture, operand.group)
        blocks = {"BLOCK_ROWS": tile.block_rows, "BLOCK_COLS": tile.block_cols, "BLOCK_OUT": tile.block_out}
        return tile, blocks | {"SLICES": tile.slices, "GROUP": operand.group} | self._launch_options(tile.num_warps)

    def _norm_product(
        self, stream: Tensor, n_parts: int, part_bias: Tensor | None, new_stream: Tensor,
        norm_weight: Tensor, norm_bias: Tensor, matrix: Matrix, bias: Tensor, activation: str, y: Tensor,
    ) -> None:  # fmt: skip
        """Fill y with act(layer_norm(stream) @ weight + bias), and new_stream if partial sums were added."""
        if not self.is_fused:
            self._norm(stream, n_parts, part_bias, new_stream, norm_weight, norm_bias)
            self._product(self.normalised, matrix, bias, activation, y)
            return
        operand = _operand(matrix)
        tile, options = self._tile("norm_product", self.n_channels, operand)
        launch(
            _decode_norm_product_kernel, cdiv(y.shape[1], tile.block_out),
            stream, self.partial, part_bias, norm_weight, norm_bias, *operand[:3], bias, new_stream, y,
            n_rows=self.n_rows, n_cols=self.n_channels, n_out=y.shape[1], eps=self.eps,
            N_PARTIALS=n_parts, ACTIVATION=activation, **options,
        )  # fmt: skip

    def _attend(self, layer: DecodeLayer, memory: Tensor, slots: Tensor, starts: Tensor) -> None:
        n_heads, (n_slots, head_dim) = self.n_heads, memory.shape[-2:]
        launch(
            _decode_attention_kernel, self.n_rows * n_heads * self.n_splits,
            self.qkv, slots, starts, memory[0], memory[1], self.mixed, self.peak, self.total,
            n_heads=n_heads, n_slots=n_slots, head_dim=head_dim, scale=layer.scale,
            BLOCK_DIM=triton.next_power_of_2(head_dim), BLOCK_KEYS=tiles.DECODE_BLOCK_KEYS,
            BLOCK_NEW=self.block_new, N_SPLITS=self.n_splits,
            STAGES=tiles.DECODE_ATTENTION_STAGES, **self._launch_options(tiles.DECODE_ATTENTION_WARPS),
        )  # fmt: skip

    def _project(self, x: Tensor, n_splits: int, matrix: Matrix) -> int:
        """Write x @ matrix to `partial` as sums of several parts. Returns the number of parts."""
        (n_cols, n_out), operand = matrix.shape, _operand(matrix)
        n_parts, cols_per_part = self.parts[n_cols]
        if not self.is_fused:
            self._product(x, matrix, None, "none", self.partial, cols_per_part)
            return n_parts
        tile, options = self._tile("project", cols_per_part, operand)
        launch(
            _decode_project_kernel, cdiv(n_out, tile.block_out) * n_parts,
            x, self.peak, self.total, *operand[:3], self.partial,
            n_rows=self.n_rows, n_cols=n_cols, n_out=n_out, n_heads=self.n_heads,
            head_dim=self.n_channels // self.n_heads, cols_per_part=cols_per_part, N_SPLITS=n_splits, **options,
        )  # fmt: skip
        return n_parts

    def _head(
        self, weights: DecodeWeights, stream: Tensor, spare: Tensor, n_parts: int, part_bias: Tensor | None,
        logits: Tensor,
    ) -> None:  # fmt: skip
        if not self.is_fused:
            self._norm(stream, n_parts, part_bias, spare, weights.ln_f_weight, weights.ln_f_bias)
            if isinstance(weights.head, Tensor):
                _head_product(self.normalised, weights.head, logits)
            else:
                self._product(self.normalised, weights.head, None, "none", logits)
            return
        operand = _operand(weights.head)
        tile, options = self._tile("head", self.n_channels, operand)
        n_tiles = cdiv(logits.shape[1], tile.block_out)
        launch(
            _decode_head_kernel, min(n_tiles, tiles.decode_head_programs(stream.device)),
            stream, self.partial, part_bias, weights.ln_f_weight, weights.ln_f_bias, *operand[:3], logits,
            n_rows=self.n_rows, n_cols=self.n_channels, n_out=logits.shape[1], eps=weights.eps,
            N_PARTIALS=n_parts, STAGES=tile.num_stages, **options,
        )  # fmt: skip

    # --- the kernels of more rows ---

    def _norm(
        self, stream: Tensor, n_parts: int, part_bias: Tensor | None, new_stream: Tensor,
        norm_weight: Tensor, norm_bias: Tensor,
    ) -> None:  # fmt: skip
        """Fill `normalised` with layer_norm(stream), and new_stream if partial sums were added."""
        block_cols = triton.next_power_of_2(self.n_channels)
        launch(
            _decode_norm_kernel, self.n_rows,
            stream, self.partial, part_bias, norm_weight, norm_bias, new_stream, self.normalised,
            n_rows=self.n_rows, n_cols=self.n_channels, eps=self.eps,
            BLOCK_COLS=block_cols, N_PARTIALS=n_parts, **self._launch_options(4 if block_cols <= 2048 else 8),
        )  # fmt: skip

    def _product(
        self, x: Tensor, matrix: Matrix, bias: Tensor | None, activation: str, y: Tensor, cols_per_part: int = 0
    ) -> None:
        """Fill y with act(x @ matrix + bias), or y (parts, B, out) with the sums of parts of the inner axis."""
        (n_cols, n_out), operand = matrix.shape, _operand(matrix)
        n_rows, n_parts = len(x), cdiv(n_cols, cols_per_part or n_cols)
        sizes = x.element_size(), operand.values.element_size()
        tile = tiles.decode_product_tile(n_rows, n_out, n_parts, *sizes, self.architecture, operand.group)
        launch(
            _decode_product_kernel, cdiv(n_rows, tile.block_rows) * n_parts * cdiv(n_out, tile.block_out),
            x, *operand[:3], bias, y,
            n_rows=n_rows, n_cols=n_cols, n_out=n_out, cols_per_part=cols_per_part or n_cols,
            BLOCK_ROWS=tile.block_rows, BLOCK_COLS=tile.block_cols, BLOCK_OUT=tile.block_out, N_PARTS=n_parts,
            GROUP=operand.group, HAS_BIAS=bias is not None, ACTIVATION=activation, STAGES=tile.num_stages,
            **self._launch_options(tile.num_warps),
        )  # fmt: skip

    # --- with torch's products ---

    # The order of the layers is that of reference.py, but what they call is not: here ids are clamped, a sum and its
    # norm are one kernel, every row has a slot and a start of its own, and logits are float32. Sharing the walk would
    # take three functions as arguments, to save six calls.

    def _decode_with_products(
        self, weights: DecodeWeights, cache: Tensor,
        tokens: Tensor, positions: Tensor, slots: Tensor, starts: Tensor, logits: Tensor,
    ) -> None:  # fmt: skip
        activation = activations.ACTIVATIONS[weights.activation]
        stream = F.embedding(tokens.clamp(0, weights.wte.shape[0] - 1), weights.wte)
        stream += F.embedding(positions.clamp(0, weights.wpe.shape[0] - 1), weights.wpe)
        branch = torch.zeros_like(stream)
        for layer, memory in zip(weights.layers, cache, strict=True):
            x, stream = self._add_norm(branch, stream, layer.ln_1_weight, layer.ln_1_bias)
            torch.addmm(layer.qkv_bias, x, _dense(layer.qkv_weight), out=self.qkv)
            self._attend(layer, memory, slots, starts)
            branch = torch.addmm(layer.proj_bias, self.mixed, _dense(layer.proj_weight))
            x, stream = self._add_norm(branch, stream, layer.ln_2_weight, layer.ln_2_bias)
            x = activation(torch.addmm(layer.fc_bias, x, _dense(layer.fc_weight)))
            branch = torch.addmm(layer.mlp_proj_bias, x, _dense(layer.mlp_proj_weight))
        x, _ = self._add_norm(branch, stream, weights.ln_f_weight, weights.ln_f_bias)
        _head_product(x, _dense(weights.head), logits)

    def _add_norm(self, branch: Tensor, stream: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
        return layer_norm.add_layer_norm_fwd(branch, stream, weight, bias, self.eps, stream.dtype)


class _Operand(NamedTuple):
    """A matrix as the kernels take it: three pointers, and how many values share a step, 0 where there are no steps."""

    values: Tensor
    steps: Tensor | None
    scale: Tensor | None
    group: int


def _operand(matrix: Matrix) -> _Operand:
    if isinstance(matrix, Tensor):
        return _Operand(matrix, None, None, 0)
    if isinstance(matrix, Int4Matrix):
        return _Operand(*matrix, matrix.group_size)
    return _Operand(matrix.values, None, matrix.scale, 0)


def _dense(matrix: Matrix) -> Tensor:
    assert isinstance(matrix, Tensor), "rounded matrices have kernels for any number of rows"
    return matrix


def _head_product(x: Tensor, weight: Tensor, logits: Tensor) -> None:
    """Fill logits (B, V), float32, with x @ weight^T. As with a few rows, they are never rounded to x's dtype."""
    if x.is_cuda and torch.version.hip is None and x.dtype != torch.float32:
        torch.mm(x, weight.t(), out_dtype=torch.float32, out=logits)
    else:
        torch.mm(x.float(), weight.t().float(), out=logits)


__all__ = ["DecodeLayer", "DecodeStep", "DecodeWeights"]
