"""Class-conditional CIFAR-10 as cifar10_unet.py, with the objective of rectified flow and SD3.

Sized for GPUs.

torchrun --standalone --nproc_per_node=8 train.py --config configs/cifar10_flow.py

Not yet run to the end.
"""

config = dict(
    _base_="cifar10_unet.py",
    process="flow",
    prediction_type="v",
    timestep_sampling="logit_normal",
)
