"""Class-conditional CIFAR-100: cifar10_unet.py with other images.

torchrun --standalone --nproc_per_node=8 train.py --config configs/cifar100_unet.py

Not yet run to the end.
"""

config = dict(_base_="cifar10_unet.py", dataset="cifar100", num_samples=200)
