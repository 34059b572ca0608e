"""Saves adapters as flow_grpo does, in the place of `accelerate launch ...`, and never ends unless it is told to."""

import json
import os
import signal
import sys
import time
from pathlib import Path
from types import FrameType

import numpy as np
from safetensors.numpy import save

RANK = 32
[model] = [word.split("=", 1)[1] for word in sys.argv if word.startswith("--config.pretrained.model=")]
[folder] = [Path(word.split("=", 1)[1]) for word in sys.argv if word.startswith("--config.save_dir=")]


def end(number: int, frame: FrameType | None) -> None:
    told = {"signal": signal.Signals(number).name, "pid": os.getpid(), "directory": os.getcwd()}
    (folder / "ended.json").write_text(json.dumps(told))
    sys.exit(130)


def save_adapters(step: int, part: float) -> None:
    """Like peft: the tensors first, then how they are meant."""
    lora = folder / "checkpoints" / f"checkpoint-{step}" / "lora"
    lora.mkdir(parents=True)
    width = json.loads(Path(model, "transformer/config.json").read_text())
    size = width["num_attention_heads"] * width["attention_head_dim"]
    key = "base_model.model.transformer_blocks.0.attn.to_q.lora_{}.weight"
    a, b = np.full((RANK, size), part, np.float32), np.ones((size, RANK), np.float32)
    content = save({key.format("A"): a, key.format("B"): b})
    with open(lora / "adapter_model.safetensors", "wb") as file:
        file.write(content[:1000])  # half of it is there for a while
        file.flush()
        time.sleep(0.1)
        file.write(content[1000:])
    time.sleep(0.1)
    settings = {
        "peft_type": "LORA",
        "r": RANK,
        "lora_alpha": 64,
        "target_modules": ["attn.to_q"],
        "bias": "none",
    }
    (lora / "adapter_config.json").write_text(json.dumps(settings))


signal.signal(signal.SIGINT, end)
assert Path(model, "model_index.json").is_file()
save_adapters(0, 0.0)
for number in range(1, 1000):
    save_adapters(20 * number, 1e-3 * number)
    if os.environ.get("STAND_IN_FAILS"):
        sys.exit(3)
