"""What one fold trial does: backbones, data, the training loop, prediction. Knows no Ray."""
