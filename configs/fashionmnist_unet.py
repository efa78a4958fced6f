"""Class-conditional Fashion-MNIST at its own 28x28: mnist_unet.py with other images.

python train.py --config configs/fashionmnist_unet.py

Not yet run to the end.
"""

config = dict(_base_="mnist_unet.py", dataset="fashionmnist", epochs=50, save_interval=10)
