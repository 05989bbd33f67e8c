"""Launch configuration of linear + cross-entropy, and the size of its chunks."""

# Lanes of a tile, each of which takes 16 bytes of a row, and the warps that share them. Two accesses a thread are under
# way, and with 32 registers a thread (bfloat16 on sm_90) eight programs fill a multiprocessor: compiled, unmeasured.
LINEAR_CROSS_ENTROPY_LANES, LINEAR_CROSS_ENTROPY_WARPS = 512, 8
# Bytes of the logits that exist at once: 2**27 of them in half precision. A chunk reads and writes the gradient of the
# weight once in float32, so that larger chunks cost less time; unmeasured.
LINEAR_CROSS_ENTROPY_BYTES = 2**28
# Rows of a chunk fill whole tiles of a matrix product.
_CHUNK_ROWS_MULTIPLE = 128


def linear_cross_entropy_chunk_rows(n_rows: int, n_bytes: int) -> int:
    """How many rows of logits, n_bytes each, exist at once: chunks of nearly one size, in whole tiles."""
    most = max(1, LINEAR_CROSS_ENTROPY_BYTES // max(1, n_bytes * _CHUNK_ROWS_MULTIPLE)) * _CHUNK_ROWS_MULTIPLE
    n_chunks = -(-n_rows // most)
    rows = -(-n_rows // max(1, n_chunks))
    return -(-rows // _CHUNK_ROWS_MULTIPLE) * _CHUNK_ROWS_MULTIPLE
