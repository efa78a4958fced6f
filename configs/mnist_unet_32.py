"""Unconditional MNIST enlarged to 32x32, with a picture after each epoch.

The first run of FMsunyh/denoising-diffusion-pytorch, `--dataset mnist --epochs 6 --channels 1`. As
there: 32 pixels, one channel, 6 epochs, no labels, 16 images after each epoch, DDIM. Eps with L2,
T = 1000 and linear betas are those of the DDIM paper, which it reproduces.

Other than there: network, batch size and learning rate are those of mnist_unet.py. The pictures are
samples/epoch_0001.png and so on in the run's folder, not files below ./outputs.

python train.py --config configs/mnist_unet_32.py

Its other run, `--dataset CelebA --epochs 100 --channels 3`, is

python train.py --config configs/celeba_unet.py sample_interval=1

Not yet run to the end. One CPU core, 10.5 minutes with batch_size=64 epochs=1: most of the 16
pictures are legible (docs/results.md).
"""

config = dict(
    _base_="mnist_unet.py",
    image_size=32,
    conditional=False,
    cfg_scale=1.0,
    model_params=dict(attention_resolutions=(8,)),
    beta_schedule="linear",
    prediction_type="eps",
    timestep_sampling="uniform",
    sampling_method="ddim",
    num_inference_steps=50,
    epochs=6,
    sample_interval=1,
    num_samples=16,
)
