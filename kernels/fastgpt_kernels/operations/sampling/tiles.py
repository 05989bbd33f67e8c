"""Launch configurations of the sampling kernels."""

# Groups of 16 tokens that a program reduces, and its warps: 50 programs share a row of 50257 logits, with 8 loads in
# flight per thread. Compiled without spills for every audited GPU, not timed.
SAMPLING_GROUPS, SAMPLING_GROUPS_WARPS = 64, 4
# Scores that the choosing program loads at a time without filters: compiled, not timed.
SAMPLING_CHOICE_BLOCK, SAMPLING_CHOICE_WARPS = 1024, 16
# Replacements where triton (3.6 to 3.9) spills a register of the block above: compiled, not timed.
_SAMPLING_CHOICE_BLOCK_ON = {"sm_90": 2048, "sm_100": 2048}


def sampling_choice_block(architecture: str) -> int:
    """Scores that the program which chooses a row's token loads at a time."""
    return _SAMPLING_CHOICE_BLOCK_ON.get(architecture, SAMPLING_CHOICE_BLOCK)


# Lanes of the filtering program, each with its own list of scores: one per thread, so that a thread reads only what it
# wrote. With 16 warps it executes 1.3 (top-p) to 1.6 (top-k) times as many instructions, mostly in reductions across
# warps; trying 8 thresholds per round takes 1.07 (top-p) and 0.99 (top-k) times as many. Counted on sm_90, not timed.
SAMPLING_FILTER_LANES, SAMPLING_FILTER_WARPS, SAMPLING_WAYS = 256, 8, 4


def sampling_filter_registers(architecture: str) -> dict[str, int]:
    """The limit of registers per thread, as a launch option where the chip's compiler takes one.

    Without it ptxas spills a few bytes rather than use more than 64 registers, to raise occupancy. Occupancy does not
    matter here, because there is one program per row.
    """
    return {"maxnreg": 128} if architecture.startswith("sm_") else {}
