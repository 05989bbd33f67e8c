"""TransformerLens' bridge reads and changes what flows through fastgpt's modules as through transformers'."""

import pytest
import torch
from models import token_ids

transformer_lens = pytest.importorskip("transformer_lens", reason="pip install transformer-lens")


def test_bridge_reads_and_changes_every_activation(demo_pair) -> None:
    *models, tokenizer = demo_pair()
    ids, found = token_ids(1, 9, 500), []
    for model in models:
        bridge = transformer_lens.TransformerBridge.boot_transformers(
            "gpt2", hf_model=model, tokenizer=tokenizer, device="cpu"
        )
        with torch.no_grad():
            logits, cache = bridge.run_with_cache(ids)
            without = bridge.run_with_hooks(ids, fwd_hooks=[("blocks.0.attn.hook_z", lambda value, hook: 0 * value)])
        found.append((logits, without, dict(cache.items())))
    (theirs, their_change, their_cache), (ours, our_change, our_cache) = found
    torch.testing.assert_close(ours, theirs)
    torch.testing.assert_close(our_change, their_change)
    assert (their_change - theirs).abs().max() > 0.1
    assert len(their_cache) > 100
    assert our_cache.keys() == their_cache.keys()
    for name, value in their_cache.items():
        torch.testing.assert_close(our_cache[name], value, msg=name)
