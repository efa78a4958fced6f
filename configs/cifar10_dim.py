"""Class-conditional CIFAR-10 with a Diffusion Mamba of 28 M parameters: otherwise cifar10_unet.py.

Sized for GPUs, where Mamba's scan is a Triton kernel unless mamba-ssm is installed: docs/dim.md.

torchrun --standalone --nproc_per_node=8 train.py --config configs/cifar10_dim.py

Not yet run to the end.
"""

config = dict(
    _base_="cifar10_unet.py",
    model_type="dim",
    model_params=dict(
        size="384x25/2",
        state_size=16,
        mlp_ratio=0.0,
        dropout=0.0,
    ),
    weight_decay=0.03,
)
