"""GRPO in a loop of one's own: PyTorch, transformers and Accelerate; `accelerate launch` it on several GPUs.

python examples/plain_loop.py path/to/model --steps 20
"""

import argparse

import torch
from accelerate import Accelerator
from transformers import AutoModelForCausalLM, AutoTokenizer

from grpo_fast.advantages import group_advantages
from grpo_fast.integrations.lm_head import Objective, fuse_lm_head
from grpo_fast.loss import LossConfig

parser = argparse.ArgumentParser()
parser.add_argument("model")
parser.add_argument("--steps", type=int, default=20)
given = parser.parse_args()

accelerator, group, length = Accelerator(), 8, 24
words = AutoTokenizer.from_pretrained(given.model, padding_side="left")
words.pad_token = words.pad_token or words.eos_token
model = AutoModelForCausalLM.from_pretrained(given.model, dtype=torch.float32)
head = fuse_lm_head(model)  # before it is wrapped: model(..., fused_lm_head=Objective(...)) then gives the loss
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5)
model, optimizer = accelerator.prepare(model, optimizer)
torch.manual_seed(accelerator.process_index)
prompts = words(["Once upon a time", "The weather today"], return_tensors="pt", padding=True).to(accelerator.device)
prompts = {name: values.repeat_interleave(group, dim=0) for name, values in prompts.items()}

for step in range(given.steps):
    with torch.no_grad():
        options = {"do_sample": True, "max_new_tokens": length, "pad_token_id": words.pad_token_id}
        ids = accelerator.unwrap_model(model).generate(**prompts, **options)
    completions = ids[:, prompts["input_ids"].shape[1] :]
    ended = (completions == words.eos_token_id).cumsum(1)
    mask = (ended == 0) | ((ended == 1) & (completions == words.eos_token_id))  # up to the first end, included
    texts = words.batch_decode(completions, skip_special_tokens=True)
    rewards = torch.tensor([text.count("e") / max(len(text), 1) for text in texts], device=ids.device)
    advantages = group_advantages(rewards, group_size=group)
    attention = torch.cat([prompts["attention_mask"], mask.long()], dim=1)
    objective = Objective(advantages, mask, config=LossConfig(loss_type="dapo"))
    out = model(input_ids=ids, attention_mask=attention, labels=ids, fused_lm_head=objective)
    accelerator.backward(out.loss)
    accelerator.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad()
    metrics = head.last.metrics.as_dict()
    accelerator.print(f"step {step}  reward {rewards.mean():.3f}  loss {metrics['loss']:.4f}")
