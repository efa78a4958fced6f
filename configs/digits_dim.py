"""Handwritten digits with a small Diffusion Mamba: the run of digits_unet.py, another backbone.

python train.py --config configs/digits_dim.py

2 CPU cores, 8 minutes: requested-class accuracy 0.998 (docs/results.md).
"""

config = dict(
    _base_="digits_unet.py",
    timestep_sampling="uniform",
    model_type="dim",
    model_params=dict(
        patch_size=2,
        hidden_size=128,
        depth=5,
        state_size=16,
        pad_tokens=1,
    ),
)
