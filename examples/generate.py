"""Continue prompts in four ways. The bundled demo needs no network; any GPT-2 checkpoint goes in its place.

python examples/generate.py
"""

import fastgpt

# For another model: model = fastgpt.GPT2LMHeadModel.from_pretrained("openai-community/gpt2").eval()
model, tokenizer = fastgpt.load_demo()

# One prompt, the most likely tokens.
inputs = tokenizer("ROMEO:", return_tensors="pt")
tokens = model.generate(**inputs, max_new_tokens=24, do_sample=False)
print("greedy:", tokenizer.decode(tokens[0]), sep="\n", end="\n\n")

# Sampled. The seed decides the tokens, on every run and whatever else is in the batch.
tokens = model.generate(**inputs, max_new_tokens=24, do_sample=True, top_k=50, seed=7)
print("sampled:", tokenizer.decode(tokens[0]), sep="\n", end="\n\n")

# Prompts of different lengths in one batch: lists of token ids, padded on the left for you.
prompts = [tokenizer(text)["input_ids"] for text in ("JULIET:\nO", "First Citizen:\nBefore we proceed")]
tokens = model.generate(prompts, max_new_tokens=16, do_sample=False)
for number, row in enumerate(tokens):
    print(f"row {number}:", tokenizer.decode(row, skip_special_tokens=True), sep="\n", end="\n\n")

# Token by token, as they come.
print("streamed:")
for newest in model.stream(**inputs, max_new_tokens=24, do_sample=False):
    print(tokenizer.decode(newest), end="", flush=True)
print()
