"""A vision-language model with its processor, trained by TRL's trainer and by ours on prompts with images."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.trl_loss import trl_missing

pytestmark = pytest.mark.skipif(trl_missing() is not None, reason=str(trl_missing()))
pytest.importorskip("datasets")
image = pytest.importorskip("PIL.Image")
clip = pytest.importorskip("transformers.models.clip.image_processing_pil_clip")

from tests import tiny, trl_runs  # noqa: E402

CHAT = (
    "{% for m in messages %}[{{ m['role'] }}]{% if m['content'] is string %}{{ m['content'] }}{% else %}"
    "{% for c in m['content'] %}{% if c['type'] == 'image' %}<image>{% else %}{{ c['text'] }}{% endif %}{% endfor %}"
    "{% endif %}{% endfor %}[assistant]"
)
SIZE, PATCH = 16, 8


def processor() -> Any:
    from transformers import LlavaProcessor

    words = tiny.tokenizer()
    words.add_special_tokens({"additional_special_tokens": ["<image>"]})
    words.padding_side, words.image_token, words.chat_template = "left", "<image>", CHAT
    words.image_token_id = words.convert_tokens_to_ids("<image>")
    square = {"height": SIZE, "width": SIZE}
    return LlavaProcessor(
        image_processor=clip.CLIPImageProcessorPil(size=square, crop_size=square, do_center_crop=False),
        tokenizer=words,
        patch_size=PATCH,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=CHAT,
    )


def model(words: Any, path: Path) -> Any:
    import transformers as hf

    shape = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    vision = {"model_type": "clip_vision_model", "image_size": SIZE, "patch_size": PATCH, "projection_dim": 16, **shape}
    torch.manual_seed(0)
    made = hf.LlavaForConditionalGeneration(
        hf.LlavaConfig(
            vision_config=vision,
            text_config={"model_type": "llama", **tiny._SHAPE, "vocab_size": len(words)},
            image_token_id=words.image_token_id,
            vision_feature_select_strategy="default",
            vision_feature_layer=-1,
        )
    )
    for parameter in made.parameters():
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=0.1)
    made.generation_config.eos_token_id = words.eos_token_id
    made.save_pretrained(path)
    made.config._name_or_path = str(path)
    return made


def letters(completions: list[Any], **columns: Any) -> list[float]:
    return trl_runs.letters([messages[0]["content"] for messages in completions])


def test_images_as_trl(tmp_path: Path) -> None:
    """KL, a second iteration and accumulation: policy, old policy and reference all see the images."""
    from datasets import Dataset
    from trl import GRPOTrainer

    from grpo_fast.integrations.trl import GRPOTrainer as Ours

    gen = torch.Generator().manual_seed(0)
    pixels = torch.randint(0, 255, (len(trl_runs.PROMPTS), 20, 20, 3), generator=gen, dtype=torch.uint8)
    pictures = [image.fromarray(row.numpy()) for row in pixels]
    prompts = [[{"role": "user", "content": prompt}] for prompt in trl_runs.PROMPTS]
    data = Dataset.from_list([{"prompt": p, "image": x} for p, x in zip(prompts, pictures, strict=True)])
    options = {"beta": 0.1, "num_iterations": 2, "max_steps": 3}
    options |= {"per_device_train_batch_size": 3, "gradient_accumulation_steps": 2}
    logs = []
    for cls in (GRPOTrainer, Ours):
        reader = processor()
        trainer = cls(
            model=model(reader.tokenizer, tmp_path / "model"),
            reward_funcs=letters,
            args=trl_runs.options(tmp_path / "run", **options),
            train_dataset=data,
            processing_class=reader,
        )
        tower = trainer.model.get_parameter("model.vision_tower.embeddings.patch_embedding.weight").clone()
        logs.append(trl_runs.train(trainer))
        after = trainer.model.get_parameter("model.vision_tower.embeddings.patch_embedding.weight")
        assert not torch.equal(after, tower), "the images were not looked at"
    assert trainer.grpo_fast.depth == "loss"
    assert not trl_runs.differences(logs[1], logs[0], 1e-3)
