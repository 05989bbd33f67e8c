"""The decode step of one row as one launch: packed weights, scratch memory, launcher."""

from itertools import chain
from typing import Any

import torch
from torch import Tensor
from triton import knobs

from ...common import chip
from ...common.activations import ACTIVATIONS
from ...common.decode_weights import DecodeLayer, DecodeWeights
from ...common.launch import launch
from . import tiles
from .kernels import HEAD_DIM, _persistent_decode_kernel, constants, n_weight_rows

_MAX_CHANNELS = 2048


class PersistentDecoder:
    """One GPT-2 packed for the persistent kernel: batch 1, head size 64, F = 4C, C <= 2048, one dtype.

    The matrices of the blocks, their biases and the norms are copied now, and again by `pack`; the embeddings and the
    head are read in place. A decoder has one set of scratch memory, so its steps must run one after another on one
    stream.
    """

    n_bytes: int  # Size of the packed copy of the blocks' weights.

    @staticmethod
    def obstacle(
        n_rows: int,
        n_channels: int,
        n_heads: int,
        n_hidden: int,
        activation: str,
        dtype: torch.dtype,
        device: torch.device,
    ) -> str | None:
        """Why the kernel does not take a model, a batch of n_rows or a device; None when it does."""
        if n_rows != 1:
            return f"it decodes one row, not {n_rows}"
        if n_channels != n_heads * HEAD_DIM.value:
            return f"it needs heads of size {HEAD_DIM.value}, not {n_channels} channels in {n_heads} heads"
        if n_channels > _MAX_CHANNELS:
            return f"it takes up to {_MAX_CHANNELS} channels, not {n_channels}"
        if n_hidden != 4 * n_channels:
            return f"it needs a hidden width of {4 * n_channels}, not {n_hidden}"
        if activation not in ACTIVATIONS:
            return f"it does not know the activation {activation!r}"
        architecture = chip.architecture(device)
        if architecture == "cpu" and not knobs.runtime.interpret:
            return "on a CPU it runs only in triton's interpreter"
        if tiles.persistent_ring(n_channels, dtype, architecture) is None:
            return f"it has no configuration for {dtype} on {architecture}"
        return None

    @torch.no_grad()
    def __init__(self, weights: DecodeWeights) -> None:
        """Raises ValueError where there is an `obstacle`."""
        wte, n_layers = weights.wte, len(weights.layers)
        n_channels, device = wte.shape[1], wte.device
        n_hidden = weights.layers[0].fc_weight.shape[1]
        reason = self.obstacle(1, n_channels, weights.n_heads, n_hidden, weights.activation, wte.dtype, device)
        if reason is not None:
            raise ValueError(f"persistent decode: {reason}")

        architecture, self._n_programs = chip.architecture(device), tiles.persistent_programs(device)
        self._constants = constants(n_channels, wte.dtype, architecture, self._n_programs, weights.activation)
        ring = tiles.persistent_ring(n_channels, wte.dtype, architecture)
        assert ring is not None
        self._options = {"num_warps": ring.num_warps}
        if architecture != "cpu":
            self._options["launch_cooperative_grid"] = True

        self._tables = tuple(map(_aligned, _tables(weights)))
        self._groups = ring.groups
        weight_rows = n_layers, self._n_programs, n_weight_rows(n_channels, self._n_programs, ring.groups)
        stream, biases = wte.new_zeros(*weight_rows, n_channels), wte.new_zeros(weight_rows, dtype=torch.float32)
        norms = wte.new_empty(4 * n_layers + 2, n_channels)
        scales = torch.tensor([x.scale for x in weights.layers], dtype=torch.float32, device=device)
        self._packed = stream, biases, norms, scales
        self.n_bytes = sum(x.nbytes for x in self._packed)
        self.pack(weights)

        max_splits, n_heads = self._constants["MAX_SPLITS"], weights.n_heads
        # The residual stream; queries; values, peaks and sums of the splits; hidden values.
        shapes = (n_channels,), (n_channels,), (max_splits, n_channels), (max_splits, n_heads), (max_splits, n_heads)
        shapes = *shapes, (n_hidden,)
        self._scratch = tuple(torch.empty(shape, dtype=torch.float32, device=device) for shape in shapes)
        self._arrivals = torch.zeros(1, dtype=torch.int64, device=device)
        self._no_padding = torch.zeros(1, dtype=torch.int64, device=device)
        self._sizes: dict[str, Any] = {
            "n_layers": n_layers,
            "n_vocab": self._tables[2].shape[0],
            "n_positions": weights.wpe.shape[0],
            "eps": weights.eps,
        }

    @torch.no_grad()
    def pack(self, weights: DecodeWeights) -> None:
        """Copy the current weights into the same memory, so that captured CUDA graphs use them.

        weights: of the model that was packed, with embeddings and head at their old addresses.
        """
        for table, source in zip(self._tables, _tables(weights), strict=True):
            if table.data_ptr() != source.data_ptr():
                table.copy_(source)
        stream, biases, norms, _ = self._packed
        _pack(weights.layers, stream, biases, self._groups)
        of_layers = [(x.ln_1_weight, x.ln_1_bias, x.ln_2_weight, x.ln_2_bias) for x in weights.layers]
        torch.stack([*chain(*of_layers), weights.ln_f_weight, weights.ln_f_bias], out=norms)

    def decode(
        self, cache: Tensor, tokens: Tensor, positions: Tensor, slots: Tensor, starts: Tensor | None, logits: Tensor
    ) -> None:
        """The forward of one token over the cache, to which its keys and values are appended.

        cache: (L, 2, 1, H, T, D), keys before values, dense. tokens, positions, slots, starts: (1,) int64. The token
        goes to slot slots[0] and attends to starts[0] .. slots[0]; starts None means 0. Tokens and positions outside
        their tables are clamped; a slot outside the cache is not written, and its logits are meaningless.
        logits: (1, V) float32, filled.
        Launches one kernel, allocates nothing and never waits for the device: a CUDA graph can capture it.
        Raises ValueError when the cache or the logits do not fit.
        """
        self._check(cache, logits)
        wte, wpe, head = self._tables
        launch(
            _persistent_decode_kernel, self._n_programs,
            tokens, positions, slots, self._no_padding if starts is None else starts,
            wte, wpe, *self._packed, head, cache, logits, *self._scratch, self._arrivals,
            n_slots=cache.shape[4], **self._sizes, **self._constants, **self._options,
        )  # fmt: skip

    def _check(self, cache: Tensor, logits: Tensor) -> None:
        wte = self._tables[0]
        n_heads = wte.shape[1] // HEAD_DIM.value
        expected = self._sizes["n_layers"], 2, 1, n_heads, cache.shape[4], HEAD_DIM.value
        if cache.shape != expected or cache.dtype != wte.dtype or not cache.is_contiguous():
            raise ValueError(
                f"persistent decode: cache must be {expected} in {wte.dtype}, dense, not {tuple(cache.shape)} in "
                f"{cache.dtype} with strides {cache.stride()}"
            )
        n_vocab = self._sizes["n_vocab"]
        if logits.shape != (1, n_vocab) or logits.dtype != torch.float32 or logits.stride(1) != 1:
            raise ValueError(
                f"persistent decode: logits must be (1, {n_vocab}) in torch.float32, not {tuple(logits.shape)} in "
                f"{logits.dtype}"
            )


def _tables(weights: DecodeWeights) -> tuple[Tensor, Tensor, Tensor]:
    assert isinstance(weights.head, Tensor)  # no rounded weights here
    return weights.wte, weights.wpe, weights.head


def _aligned(table: Tensor) -> Tensor:
    """The tensor itself if it is dense and 16-byte aligned, otherwise a copy."""
    table = table.detach().contiguous()
    return table if table.data_ptr() % 16 == 0 else table.clone()


def _pack(layers: tuple[DecodeLayer, ...], stream: Tensor, biases: Tensor, groups: int) -> None:
    """Fill stream (L, programs, weight rows, C) and biases (L, programs, weight rows) for every program.

    Padding is left as it is.
    """
    _, n_programs, _, n_channels = stream.shape
    tile_rows = 4 * groups
    for layer, layer_stream, layer_biases in zip(layers, stream, biases, strict=True):
        start = 0
        for weight, bias in (
            (layer.qkv_weight, layer.qkv_bias),
            (layer.proj_weight, layer.proj_bias),
            (layer.fc_weight, layer.fc_bias),
            (layer.mlp_proj_weight, layer.mlp_proj_bias),
        ):
            assert isinstance(weight, Tensor)  # `generate()` gives rounded weights to the kernels of `decode_step`
            n_in, n_out = weight.shape
            n_slice, n_parts = -(-n_out // n_programs), n_in // n_channels
            stop = start + n_slice * n_parts
            _deal(weight.t(), layer_stream[:, start:stop].unflatten(1, (n_slice, n_parts)).flatten(2))
            _deal(bias, layer_biases[:, start:stop:n_parts])  # The first of a row's parts adds the bias.
            start += -(-(stop - start) // tile_rows) * tile_rows


def _deal(rows: Tensor, slices: Tensor) -> None:
    """Copy rows (n, ...) to slices (programs, rows per program, ...), in order, until no rows are left."""
    n_slice = slices.shape[1]
    n_whole, n_left = divmod(len(rows), n_slice)
    slices[:n_whole] = rows[: n_whole * n_slice].unflatten(0, (-1, n_slice))
    if n_left:
        slices[n_whole, :n_left] = rows[n_whole * n_slice :]


__all__ = ["PersistentDecoder"]
