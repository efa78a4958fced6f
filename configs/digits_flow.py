"""Handwritten digits as digits_unet.py, with JiT's objective: flow matching, x_0 predicted, loss in v.

python train.py --config configs/digits_flow.py

Not yet run to the end.
"""

config = dict(
    _base_="digits_unet.py",
    process="flow",
    prediction_type="x_0",
    loss_space="v",
    timestep_sampling="logit_normal",
)
