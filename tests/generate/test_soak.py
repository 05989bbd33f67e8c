"""Long runs, asked for by `--soak`."""

import ctypes
import gc
import sys
from itertools import count
from pathlib import Path

import pytest
from prompts import left_padded, ragged

import fastgpt

pytestmark = [pytest.mark.soak, pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")]

N_STEPS = 20_000


def resident_bytes() -> int:
    """The resident set of this process, once freed memory is given back."""
    ctypes.CDLL(None).malloc_trim(0)
    status = Path("/proc/self/status").read_text()
    return int(status.partition("VmRSS:")[2].split()[0]) * 1024


def test_twenty_thousand_steps_without_nan_or_growth() -> None:
    """Over mixed lengths, batches and ways to choose, of the bundled model; `generate` itself refuses NaN."""
    model = fastgpt.load_demo()[0]
    vocab_size = model.config.vocab_size
    kinds = [{}, {"do_sample": True}, {"prompt_lookup_num_tokens": 6}, {"repetition_penalty": 1.2}]

    def run(n_steps: int) -> None:
        n_done = 0
        for call in count():
            if n_done >= n_steps:
                return
            options = kinds[call % len(kinds)]
            n_rows = 1 if "prompt_lookup_num_tokens" in options else 1 + call % 5
            inputs = left_padded(ragged(n_rows, vocab_size, longest=1 + 7 * call % 60))
            n_new = 20 + 31 * call % 150
            tokens = model.generate(
                **inputs, max_new_tokens=n_new, eos_token_id=None, pad_token_id=0, **{"do_sample": False} | options
            )
            assert tokens.shape[1] == inputs["input_ids"].shape[1] + n_new
            n_done += n_new

    run(2_000)
    gc.collect()
    before = resident_bytes()
    run(N_STEPS)
    gc.collect()
    growth = resident_bytes() - before
    assert growth < 2**20, f"{growth} bytes"
