"""Class-conditional CIFAR-10 with a JiT, 64 tokens of 4x4 pixels: otherwise cifar10_unet.py.

The objective and the sampler are JiT's (Li and He 2025), with t drawn around the middle of the
path: the paper's mean of 0.8 is for 256 pixels, and smaller images want less noise.

Sized for GPUs.

torchrun --standalone --nproc_per_node=8 train.py --config configs/cifar10_jit.py

Not yet run to the end.
"""

config = dict(
    _base_="cifar10_unet.py",
    model_type="jit",
    model_params=dict(
        patch_size=4,
        hidden_size=384,
        depth=12,
        num_heads=6,
        bottleneck=32,
        num_class_tokens=16,
        dropout=0.1,
    ),
    process="flow",
    prediction_type="x_0",
    loss_space="v",
    timestep_sampling="logit_normal",
    sampling_method="heun",
)
