"""Train LoRA adapters on a transformers GPT-2 that runs on fastgpt: patch the model, leave all else as it is.

python examples/patch_peft.py
"""

import torch
from peft import LoraConfig, get_peft_model
from transformers import GPT2LMHeadModel, Trainer, TrainingArguments

import fastgpt

demo, tokenizer = fastgpt.load_demo()

# A model of transformers' own class, as other code would hand it over.
model = GPT2LMHeadModel(demo.config)
model.load_state_dict(demo.state_dict())

model = get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", target_modules=["c_attn"], r=8, fan_in_fan_out=True))
fastgpt.patch(model)  # in place, also inside PEFT; fastgpt.unpatch(model) undoes it
model.print_trainable_parameters()

ids = tokenizer("To be, or not to be, that is the question. " * 8, return_tensors="pt")["input_ids"][0, :64]
arguments = TrainingArguments(
    output_dir="lora", max_steps=10, learning_rate=1e-2, report_to="none", save_strategy="no", logging_steps=1
)
trainer = Trainer(model=model, args=arguments, train_dataset=[{"input_ids": ids, "labels": ids}] * 8)
trainer.train()
losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
print(f"loss {losses[0]:.3f} -> {losses[-1]:.3f}")

# Adapters merged into the weights give a plain model again, and generate() takes its fastest path.
merged = model.merge_and_unload().eval()
prompt = tokenizer("To be,", return_tensors="pt").to(merged.device)
with torch.no_grad():
    print(tokenizer.decode(merged.generate(**prompt, max_new_tokens=12, do_sample=False)[0]))
