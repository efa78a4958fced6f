"""Class-conditional CIFAR-10 as cifar10_unet.py, with the objective and the sampler of EDM.

Sized for GPUs.

torchrun --standalone --nproc_per_node=8 train.py --config configs/cifar10_edm.py

Not yet run to the end.
"""

config = dict(
    _base_="cifar10_unet.py",
    process="edm",
    prediction_type="v",
    timestep_sampling="lognormal",
    timestep_mean=-1.2,
    timestep_std=1.2,
    sampling_method="heun",
    num_inference_steps=18,
)
