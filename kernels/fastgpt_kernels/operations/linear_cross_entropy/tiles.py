"""Launch configuration of linear_cross_entropy, and the size of its chunks."""

# Lanes of a tile, which take 16 bytes of a row each, and the warps that share them: two loads in flight per thread.
# With 32 registers per thread (bfloat16 on sm_90) eight programs fill a multiprocessor; smoothing and z-loss take up to
# 38, which leaves six. Compiled, not timed.
LINEAR_CROSS_ENTROPY_LANES, LINEAR_CROSS_ENTROPY_WARPS = 512, 8
# The most bytes of logits that exist at once: 2**27 logits in half precision. Every chunk reads and writes the float32
# gradient of the weight once, so larger chunks cost less time; not timed.
LINEAR_CROSS_ENTROPY_BYTES = 2**28
# Where the gradients are large, a chunk takes less, so that logits and gradients stay within this. It takes at least
# half of the above, because with that a chunk still multiplies for longer than it reads and writes the gradient.
LINEAR_CROSS_ENTROPY_BYTES_WITH_GRADIENTS = 500 * 2**20
# The rows of a chunk fill whole tiles of a matrix product.
_CHUNK_ROWS_MULTIPLE = 128


def linear_cross_entropy_chunk_rows(n_rows: int, n_bytes: int, n_gradient_bytes: int) -> int:
    """How many rows of logits, n_bytes each, exist at once: chunks of nearly equal size, in whole tiles."""
    left = LINEAR_CROSS_ENTROPY_BYTES_WITH_GRADIENTS - n_gradient_bytes
    limit = min(LINEAR_CROSS_ENTROPY_BYTES, max(LINEAR_CROSS_ENTROPY_BYTES // 2, left))
    most = max(1, limit // max(1, n_bytes * _CHUNK_ROWS_MULTIPLE)) * _CHUNK_ROWS_MULTIPLE
    n_chunks = -(-n_rows // most)
    rows = -(-n_rows // max(1, n_chunks))
    return -(-rows // _CHUNK_ROWS_MULTIPLE) * _CHUNK_ROWS_MULTIPLE
