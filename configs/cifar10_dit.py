"""Class-conditional CIFAR-10 with DiT-S/2, 256 tokens of 2x2 pixels: otherwise cifar10_unet.py.

Sized for GPUs.

torchrun --standalone --nproc_per_node=8 train.py --config configs/cifar10_dit.py

Not yet run to the end.
"""

config = dict(
    _base_="cifar10_unet.py",
    model_type="dit",
    model_params=dict(
        patch_size=2,
        hidden_size=384,
        depth=12,
        num_heads=6,
        mlp_ratio=4.0,
        dropout=0.0,
    ),
)
