"""Writes the checkpoints that torch_checkpoints.rs reads: python make_torch_checkpoints.py (torch 2.x)."""

import torch

ramp = torch.arange(12, dtype=torch.float32).reshape(3, 4) / 4
state = {
    "plain": ramp,
    "half": ramp.half(),
    "brain": ramp.bfloat16(),
    "transposed": ramp.t(),
    "view": ramp[1:, 1:3],
    "parameter": torch.nn.Parameter(ramp * 2),
    "scalar": torch.tensor(2.5),
    "empty": torch.zeros(0, 4),
    "buffer": torch.arange(3),
}
torch.save(state, "state_dict.pt")
module = torch.nn.Linear(4, 3)
with torch.no_grad():
    module.weight.copy_(ramp)
    module.bias.copy_(torch.tensor([1.0, -1.0, 0.5]))
optimizer = torch.optim.AdamW(module.parameters())
torch.save(
    {
        "epoch": 7,
        "name": "run",
        "optimizer": optimizer.state_dict(),
        "state_dict": module.state_dict(),
        "args": {"lr": 1e-3, "list": [1, 2, (3, None)], "big": 2**70},
    },
    "training.pt",
)
torch.save(state, "legacy.pt", _use_new_zipfile_serialization=False)
