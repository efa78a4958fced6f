"""Handwritten digits with a small JiT that predicts x_0, otherwise the run of digits_unet.py.

python train.py --config configs/digits_jit.py

1 CPU core, 3.5 minutes: requested-class accuracy 1.00 (docs/results.md).
"""

config = dict(
    _base_="digits_unet.py",
    model_type="jit",
    model_params=dict(
        patch_size=4,
        hidden_size=128,
        depth=6,
        num_heads=4,
        bottleneck=16,
        num_class_tokens=8,
    ),
    prediction_type="x_0",
    epochs=40,
)
