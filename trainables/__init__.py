"""One fold trial: backbones, data, the training loop, prediction. Knows no Ray."""
