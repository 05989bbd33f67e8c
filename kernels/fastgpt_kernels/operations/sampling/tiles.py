"""Launch configurations of the sampling kernels."""

# Groups of 16 tokens that a program reduces, and its warps: 50 programs share a row of 50257 logits, with 8 logits a
# thread under way. Compiled without spills for every audited GPU, unmeasured.
SAMPLING_GROUPS, SAMPLING_GROUPS_WARPS = 64, 4
# Scores that the one program which chooses looks at together where nothing filters: compiled, unmeasured.
SAMPLING_CHOICE_BLOCK, SAMPLING_CHOICE_WARPS = 1024, 16
# Where a compiler (triton 3.6 to 3.9) spills a word of the block above: compiled, unmeasured.
_SAMPLING_CHOICE_BLOCK_ON = {"sm_90": 2048, "sm_100": 2048}


def sampling_choice_block(architecture: str) -> int:
    """Scores that the program which chooses a row's token looks at together."""
    return _SAMPLING_CHOICE_BLOCK_ON.get(architecture, SAMPLING_CHOICE_BLOCK)


# Lanes of the program that filters, each with a list of scores of its own: one a thread, which then reads what it wrote
# itself. With 16 warps it executes 1.3 (top-p) to 1.7 (top-k) times as many instructions, mostly in reductions across
# warps, and with 8 values of the threshold a round a few more too. Counted on sm_90, unmeasured.
SAMPLING_FILTER_LANES, SAMPLING_FILTER_WARPS, SAMPLING_WAYS = 256, 8, 4


def sampling_filter_registers(architecture: str) -> dict[str, int]:
    """The limit of registers a thread, as an option of the launch where the chip's compiler takes one.

    Unless told that it may use them, ptxas spills a few bytes of this kernel rather than use more than 64 registers,
    for the sake of programs that would share a multiprocessor: here there is one a row.
    """
    return {"maxnreg": 128} if architecture.startswith("sm_") else {}
