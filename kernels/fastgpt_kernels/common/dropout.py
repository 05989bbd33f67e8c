"""Which elements dropout zeroes: a function of only the seed and the position, by Philox."""

import torch
from torch import Tensor

PHILOX_ROUNDS = 7
_UINT32 = 0xFFFFFFFF


def philox(counter: list[Tensor], seed: Tensor) -> list[Tensor]:
    """Philox 4x32: four 32-bit words from a counter of four and a 64-bit key, all held in int64 tensors.

    Source: Parallel Random Numbers: As Easy as 1, 2, 3 (Salmon et al., 2011).
    """
    c0, c1, c2, c3 = counter
    key_low, key_high = seed & _UINT32, (seed >> 32) & _UINT32
    for _ in range(PHILOX_ROUNDS):
        # A 64-bit product may overflow into the sign; masking after the shift restores its upper word.
        product_0, product_2 = c0 * 0xD2511F53, c2 * 0xCD9E8D57
        c0, c2 = ((product_2 >> 32) & _UINT32) ^ c1 ^ key_low, ((product_0 >> 32) & _UINT32) ^ c3 ^ key_high
        c1, c3 = product_2 & _UINT32, product_0 & _UINT32
        key_low, key_high = (key_low + 0x9E3779B9) & _UINT32, (key_high + 0xBB67AE85) & _UINT32
    return [c0, c1, c2, c3]


def dropout_keep_mask(
    shape: tuple[int, int, int, int], dropout_p: float, seed: int | Tensor | None, device: torch.device | str = "cpu"
) -> tuple[Tensor, float]:
    """Which attention weights survive dropout, a function of only the seed and the position.

    shape: (B, H, Tq, Tk). One Philox call draws 16 bits for each of eight elements: their positions differ in bits 0
    and 3 of the key and bit 3 of the query, and one thread of a tensor-core accumulator holds them.
    Returns the (B, H, Tq, Tk) bool mask and the factor that keeps the expectation.
    """
    n_batch, n_heads, n_queries, n_keys = shape
    seed = seed_tensor(seed, device)
    # key = 16 * k_tile + 8 * k_word + 2 * k_pair + half,  query = 16 * q_tile + 8 * q_word + q_row
    n_q_tiles, n_k_tiles = -(-n_queries // 16), -(-n_keys // 16)
    batch_head = torch.arange(n_batch * n_heads, device=device).view(-1, 1, 1)
    q_group = torch.arange(n_q_tiles * 8, device=device).view(1, -1, 1)
    k_group = torch.arange(n_k_tiles * 4, device=device).view(1, 1, -1)
    words = philox([k_group, q_group, batch_head, torch.zeros_like(k_group)], seed)
    draws = torch.stack([half for word in words for half in (word & 0xFFFF, word >> 16)])
    draws = draws.view(2, 2, 2, n_batch, n_heads, n_q_tiles, 8, n_k_tiles, 4)  # q_word, k_word, half, ...
    draws = draws.permute(3, 4, 5, 0, 6, 7, 1, 8, 2).reshape(n_batch, n_heads, n_q_tiles * 16, n_k_tiles * 16)
    threshold = dropout_threshold(dropout_p)
    return draws[:, :, :n_queries, :n_keys] >= threshold, 65536 / (65536 - threshold)


def seed_tensor(seed: int | Tensor | None, device: torch.device | str) -> Tensor:
    """The 64 bits of a seed as a 0-d int64 tensor; drawn from torch's generator when seed is None.

    seed: an integer in [-2**63, 2**64), or a tensor that holds one. Raises ValueError on anything else.
    """
    if seed is None:
        return torch.randint(2**63 - 1, (), device=device)
    if isinstance(seed, Tensor):
        if seed.numel() != 1 or seed.is_floating_point():
            raise ValueError(f"dropout seed must hold one integer, not {tuple(seed.shape)} of {seed.dtype}")
        return seed.to(device, torch.int64).reshape(())
    if not -(2**63) <= seed < 2**64 or int(seed) != seed:
        raise ValueError(f"dropout seed must be an integer of 64 bits, not {seed}")
    return torch.full((), seed - 2**64 if seed >= 2**63 else seed, dtype=torch.int64, device=device)


def own_seed(seed: int | Tensor | None, device: torch.device) -> Tensor:
    """`seed_tensor` in memory of its own: the caller may advance a tensor before the backward pass reads it."""
    own = seed_tensor(seed, device)
    return own.clone() if isinstance(seed, Tensor) else own


def dropout_threshold(dropout_p: float) -> int:
    """dropout_p in units of 1/65536; below 65536, so that the factor of surviving weights is finite."""
    return min(round(dropout_p * 65536), 65535)
