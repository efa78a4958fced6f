"""Class-conditional ImageNet at 256x256 with JiT-B/16 and the recipe of its paper (Li and He 2025).

ImageNet is read from a folder per class: data/imagenet/train/n01440764/*.JPEG and so on, and the
same below data/imagenet/val, see docs/own_data.md. Sized for 8 GPUs of 80 GB; for less memory,
gradient_accumulation_steps=2 and more.

torchrun --standalone --nproc_per_node=8 train.py --config configs/imagenet256_jit.py

The paper counts time from noise to image: its mean of -0.8 is 0.8 here, and its guidance in the
interval from 0.1 to 1 is one from 0 to 0.9. What differs from the paper: after the warm-up the
learning rate, 5e-5 per 256 images, follows a cosine to zero and is not constant; Adam's second beta
is 0.999 and not 0.95, for which there is no key; gradients are clipped to a norm of 1; of its two
averages of the weights, 0.9999 and 0.9996, the first is kept.

Not yet run.
"""

config = dict(
    dataset="custom",
    data_root="data/imagenet",
    image_size=256,
    conditional=True,
    num_workers=16,
    model_type="jit",
    model_params=dict(size="JiT-B/16"),
    process="flow",
    noise_scale=1.0,
    prediction_type="x_0",
    loss_space="v",
    timestep_sampling="logit_normal",
    timestep_mean=0.8,
    timestep_std=0.8,
    cfg_dropout_prob=0.1,
    cfg_scale=2.9,
    cfg_interval=(0.0, 0.9),
    sampling_method="heun",
    num_inference_steps=50,
    threshold="none",
    epochs=600,
    batch_size=1024,
    optimizer="adam",
    learning_rate=2e-4,
    ema_decay=0.9999,
    use_scheduler=True,
    scheduler_type="warmup_cosine",
    warmup_epochs=5,
    save_interval=20,
    keep_last=10,
    sample_interval=20,
    num_samples=64,
    eval_metrics=("fid", "is"),
)
