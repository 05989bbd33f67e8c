"""The model card: the inputs of a run of the recipe, its measurements and a sample of its text."""

import hashlib
import platform

import safetensors
import tokenizers
import torch
import transformers

import fastgpt

from .measure import Outcome

CARD = """\
---
library_name: transformers
pipeline_tag: text-generation
tags: [gpt2, fastgpt]
---

# A small GPT-2 trained on {source}

{about}GPT-2 with {n_layer} layers of {n_embd} channels and {n_head} heads, a context of {n_positions} tokens, and a
byte-level BPE of {vocab_size} tokens of its own: {n_parameters:,} parameters, {size_mb:.1f} MB in float32.

```python
import fastgpt
from transformers import AutoTokenizer

model = fastgpt.GPT2LMHeadModel.from_pretrained(folder).eval()
tokenizer = AutoTokenizer.from_pretrained(folder)
```

## How well it predicts

On the held-out last tenth of the text, which nothing was trained on or chosen by:

| held-out loss | nats per token | bits per byte |
|---|---|---|
| this model | {model_loss:.4f} | {model_bits_per_byte:.4f} |
| bigram model, same tokenizer | {bigram_loss:.4f} | {bigram_bits_per_byte:.4f} |

Every token is predicted once, by the model from at least {half_context} tokens before it where the text has them. The
bigram model is counted on the training part and smoothed by its unigram, with the strength of smoothing ({strength:.3g}
counts) that is best on the validation part.

## Data

`{source}`: {n_characters:,} characters, {n_bytes:,} bytes in UTF-8, SHA-256 `{sha256}`. Cut in order:

| part | characters | tokens | used for |
|---|---|---|---|
| training | {characters[0]:,} | {tokens[0]:,} | weights, tokenizer, bigram counts |
| validation | {characters[1]:,} | {tokens[1]:,} | choice of checkpoint and of the bigram's smoothing |
| held out | {characters[2]:,} | {tokens[2]:,} | the table above |

## Training

```
{command}
```

{steps} steps of {batch_size} windows of {n_positions} tokens with AdamW (peak learning rate {learning_rate:g}, weight
decay {weight_decay:g}, dropout {dropout:g}), seed {seed}; the checkpoint of step {best_step} had the lowest loss on the
validation part and is kept. It took {minutes:.1f} minutes on {device}. The same command on the same machine and
versions gives the same weights: fastgpt {fastgpt}, torch {torch}, transformers {transformers},
tokenizers {tokenizers}, safetensors {safetensors}, Python {python}.

## Sample

Drawn at temperature {temperature:g} with seed {seed}{prompted}:

```
{sample}
```

A model of this size repeats the form of its text and little of its sense. It is for demonstrations and tests.
"""


def model_card(
    outcome: Outcome,
    model: fastgpt.GPT2LMHeadModel,
    args: transformers.TrainingArguments,
    *,
    source: str,
    about: str,
    command: str,
    prompt: str,
    sample: str,
    temperature: float,
) -> str:
    """The README.md of a trained model; every figure comes from its run.

    source: the text file's name. about: a sentence on the text, or "". sample: text generated from prompt.
    """
    config, parts = model.config, outcome.parts
    text = "".join(parts)
    n_parameters = model.num_parameters()
    device = model.device.type if model.device.type != "cpu" else f"a CPU with {torch.get_num_threads()} thread(s)"
    return CARD.format(
        source=source,
        about=f"{about.strip()}\n\n" if about.strip() else "",
        command=command,
        sample=sample,
        temperature=temperature,
        prompted=f", from the prompt `{prompt}`" if prompt else "",
        **{name: getattr(config, name) for name in ("n_layer", "n_embd", "n_head", "n_positions", "vocab_size")},
        n_parameters=n_parameters,
        size_mb=n_parameters * 4 / 1e6,
        half_context=config.n_positions // 2,
        model_loss=outcome.model_loss,
        model_bits_per_byte=outcome.model_bits_per_byte,
        bigram_loss=outcome.bigram_loss,
        bigram_bits_per_byte=outcome.bigram_bits_per_byte,
        strength=outcome.bigram_strength,
        n_characters=len(text),
        n_bytes=len(text.encode()),
        sha256=hashlib.sha256(text.encode()).hexdigest(),
        characters=[len(part) for part in parts],
        tokens=outcome.n_tokens,
        steps=args.max_steps,
        batch_size=args.per_device_train_batch_size,
        learning_rate=args.learning_rate,
        weight_decay=args.weight_decay,
        dropout=config.resid_pdrop,
        seed=args.seed,
        best_step=outcome.best_step,
        minutes=outcome.training_s / 60,
        device=device,
        fastgpt=fastgpt.__version__,
        torch=torch.__version__,
        transformers=transformers.__version__,
        tokenizers=tokenizers.__version__,
        safetensors=safetensors.__version__,
        python=platform.python_version(),
    )
