"""Count the parameters of any model exactly, without its weights: by formula for GPT-2, from its modules otherwise.

python examples/count_parameters.py gpt2 gpt2-xl gpt3-175b DIRECTORY_WITH_CONFIG_JSON
"""

import sys

from transformers import LlamaConfig

import fastgpt

names = sys.argv[1:] or ["gpt2", "gpt2-medium", "gpt2-large", "gpt2-xl"]
for name in names:
    count = fastgpt.count_parameters(name)
    print(f"{name}: {count.total:,} parameters")
    for part in count.components:
        formula = f" = {part.formula}" if part.formula else ""
        print(f"  {part.name:20} {part.count:3} x {part.each:>12,}{formula}")

# Any configuration of transformers works too; the model is built without memory for its weights.
small_llama = LlamaConfig(hidden_size=256, intermediate_size=688, num_hidden_layers=4, num_attention_heads=4)
print(f"a small Llama: {fastgpt.count_parameters(small_llama).total:,} parameters")
