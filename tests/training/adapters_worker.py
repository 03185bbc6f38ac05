"""Another process loads an adapter: `adapters_worker.py MODEL ADAPTER OUTPUT`."""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from safetensors.torch import save_file
from training import tiny_llava as tiny

from pmod_model import load_pretrained
from pmod_model.training.adapters import load_adapter

if __name__ == "__main__":
    model = load_pretrained(sys.argv[1])
    loaded = load_adapter(model, Path(sys.argv[2])).eval()
    with torch.no_grad():
        save_file({"logits": loaded(**tiny.image_batch([0, 1])).logits}, sys.argv[3])
